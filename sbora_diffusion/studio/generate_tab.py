"""The Generate tab: a prompt, concepts with their strengths, images."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr

from sbora_diffusion.inference.image_file import read_settings
from sbora_diffusion.studio import fields
from sbora_diffusion.studio.messages import show_errors, warn_of_missing
from sbora_diffusion.studio.session import Session

PROMPT = "a 3d penguin on the beach"

INSERT = """(text) => {
  const area = document.querySelector("#prompt textarea"), token = %s;
  const at = area ? area.selectionStart : text.length, before = text.slice(0, at), after = text.slice(at);
  const gap = (side, edge) => (side && !edge.test(side) ? " " : "");
  return before + gap(before, /\\s$/) + token + gap(after, /^[\\s,.]/) + after;
}"""


def generate_tab(session: Session) -> fields.Refresh:
    """Lay out the tab and connect its events."""
    strengths = gr.State({})
    with gr.Row():
        with gr.Column(scale=2, min_width=320):
            prompt = gr.Textbox(PROMPT, label="Prompt", lines=2, max_lines=6, elem_id="prompt", autofocus=True)
            concepts = fields.concept_chips("concepts")
            sliders = gr.Column(elem_classes="strengths")
            sampling = fields.sampling_fields("generate", (1, 4, 9), 4)
        gallery, note = fields.image_output("generate", 2, "Generated images appear here.")

    with sliders:
        gr.render(inputs=[concepts, strengths, sampling.base], triggers=[concepts.change])(
            lambda names, values, base: _sliders(session, names, values, base, prompt, strengths)
        )
    settings = [*sampling.inputs(prompt, strengths), concepts]
    handler = partial(_generate, session)
    fields.on_model([sampling.button.click, prompt.submit], handler, [sampling.number, *settings], gallery, note)
    sampling.dropped.upload(show_errors(partial(_load_settings, session)), sampling.dropped, settings, queue=False)
    base = sampling.base
    base.input(lambda name: fields.concept_choices(session.concepts(name), ()), base, concepts, queue=False)
    choices = [base, concepts]
    return fields.Refresh(partial(_refresh, session), choices, choices)


def _refresh(session: Session, base: str, selected: Sequence[str]) -> tuple[Any, Any]:
    return gr.update(choices=session.bases()), fields.concept_choices(session.concepts(base), selected)


def _sliders(
    session: Session,
    names: Sequence[str],
    values: Mapping[str, float],
    base: str,
    prompt: gr.Textbox,
    strengths: gr.State,
) -> None:
    """Add a row for each selected concept: buttons that insert its tokens into the prompt, and its strength."""
    specs = session.concepts(base)
    for name in (name for name in names if name in specs):
        with gr.Row(equal_height=True, elem_classes="strength"):
            for token in specs[name].tokens:
                chip = gr.Button(token, size="sm", min_width=70, scale=0, elem_classes="token")
                chip.click(None, prompt, prompt, js=INSERT % json.dumps(token))
            fields.strength_slider(name, values, strengths)


def _generate(session: Session, count: int, *values: Any) -> Iterator[tuple[Any, str]]:
    *sampling, concepts = values
    settings = fields.settings_from_fields(*sampling)
    settings = replace(settings, concepts={name: settings.concepts.get(name, 1.0) for name in concepts})
    yield from fields.show_images(session.generate(settings, int(count)), settings.seed, int(count))


def _load_settings(session: Session, path: str) -> tuple[Any, ...]:
    """Return the settings of a dropped image for every field; missing concepts are left out with a warning."""
    settings = read_settings(Path(path))
    if settings.regions:
        gr.Warning("This image was generated in Regions. Drop it there to load its boxes.")
    elif settings.gated:
        gr.Warning("This image was generated with gated concepts. Here they act on the whole image.")
    known = session.concepts(session.base_or_default(settings.base))
    warn_of_missing(settings.concepts, known)
    return (*fields.fields_from_settings(session, settings), fields.concept_choices(known, settings.concepts))
