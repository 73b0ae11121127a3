"""Fields that several tabs have alike."""

from collections.abc import Mapping

import gradio as gr

from sbora_diffusion.models.loading import usual_sampling
from sbora_diffusion.studio.messages import told
from sbora_diffusion.studio.session import DEFAULT_BASE

MAX_SEED = 2**31 - 1

More = tuple[gr.Textbox, gr.Slider, gr.Slider, gr.Dropdown, gr.File]


def seed_field(elem_id: str) -> gr.Number:
    """Of the first image."""
    return gr.Number(0, label="Seed", precision=0, minimum=0, maximum=MAX_SEED, min_width=90, elem_id=elem_id)


def more_fields(prefix: str, steps_label: str, dropped_label: str) -> More:
    """What few want to change: negative prompt, steps, guidance, base model, and an image whose settings come back.

    Args:
        prefix: of the ids in the page.
        steps_label: the sliders of two tabs must not be called the same.
    """
    usual = usual_sampling(DEFAULT_BASE)
    negative = gr.Textbox("", label="What should it not show?", elem_id=f"{prefix}negative")
    with gr.Row():
        steps = gr.Slider(1, 100, usual.steps, step=1, label=steps_label, min_width=140)
        guidance = gr.Slider(
            0, 12, usual.guidance, step=0.5, label="Guidance", info="how literally the prompt is taken", min_width=140
        )
    base = gr.Dropdown([DEFAULT_BASE], value=DEFAULT_BASE, label="Base model", elem_id=f"{prefix}base")
    dropped = gr.File(label=dropped_label, file_types=[".png"], height=170, elem_id=f"{prefix}dropped")
    base.input(told(_usual), base, [steps, guidance], queue=False, show_progress="hidden")
    return negative, steps, guidance, base, dropped


def _usual(base: str) -> tuple[int, float]:
    """Steps and guidance for a base model that was chosen."""
    sampling = usual_sampling(base)
    return sampling.steps, sampling.guidance


def image_gallery(elem_id: str, columns: int) -> gr.Gallery:
    """Where drawn images appear, large and with sharp pixels."""
    return gr.Gallery(
        label="Images",
        show_label=False,
        columns=columns,
        object_fit="contain",
        height="auto",
        elem_id=elem_id,
        elem_classes="pixels",
        interactive=False,
        buttons=["download", "fullscreen"],
    )


def strength_slider(name: str, factors: Mapping[str, float], strengths: gr.State) -> None:
    """One for a concept, to be called while the page is drawn; `strengths` holds name -> strength of those moved."""
    slider = gr.Slider(
        0, 1.5, factors.get(name, 1.0), step=0.05, label=f"Strength of {name}", min_width=140, interactive=True
    )
    slider.change(
        lambda value, all_factors: {**all_factors, name: value}, [slider, strengths], strengths, queue=False
    )  # fmt: skip
