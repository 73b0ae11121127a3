"""The Merge tab: pick concepts, see what their merge guarantees, make it, and look at it beside each alone."""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import gradio as gr
from PIL import Image

from sbora_diffusion.adapters.certificate import certify
from sbora_diffusion.adapters.file import Adapter
from sbora_diffusion.adapters.fuse import fuse
from sbora_diffusion.adapters.merge import merge, merged_name
from sbora_diffusion.inference.generate import generate
from sbora_diffusion.inference.image_grid import sheet
from sbora_diffusion.methods.calibration import SampledInputs
from sbora_diffusion.studio.drawings import certificate_list, ledger_bar
from sbora_diffusion.studio.messages import sentence, told
from sbora_diffusion.studio.session import Workshop
from sbora_diffusion.studio.uploads import check_name
from sbora_diffusion.utils.errors import SboraError

SCENES = ("a {} on the beach", "a {} in the snow", "a {} at night")
HOW = (
    ("Sum: exact, any of them can be taken out again", "sum"),
    ("Fuse: solved so that each disturbs the others least", "fuse"),
)
PICK = "<p class='note'>Pick two concepts or more.</p>"
FUSED = "Only the concepts' own columns are written, and the merge can be taken out as a whole, to the bit."


def merge_tab(workshop: Workshop) -> tuple[gr.CheckboxGroup, gr.HTML]:
    """Lay it out and wire it up; the choice of concepts and the ledger, to be renewed."""
    with gr.Row():
        with gr.Column(scale=2, min_width=320):
            picked = gr.CheckboxGroup([], label="Concepts", elem_id="merge-concepts", elem_classes="chips")
            how = gr.Radio(list(HOW), value="sum", label="How", elem_id="how")
            name = gr.Textbox("", label="Name of the merge", info="empty: made of the concepts’", elem_id="merge-name")
            button = gr.Button("Merge", variant="primary", size="lg", elem_id="merge")
            note = gr.Markdown("", elem_classes="note", elem_id="merge-note")
        with gr.Column(scale=3, min_width=320):
            bar = gr.HTML("", elem_id="ledger")
            facts = gr.HTML(PICK, elem_id="certificate")
            grid = gr.Image(
                label="Alone and merged",
                show_label=False,
                visible=False,
                interactive=False,
                format="png",
                elem_id="merge-grid",
                buttons=["download", "fullscreen"],
            )
    picked.change(told(partial(_examine, workshop)), picked, [bar, facts], queue=False, show_progress="hidden")
    button.click(
        told(partial(_merge, workshop)),
        [picked, how, name],
        [note, grid],
        concurrency_id="model",
        concurrency_limit=1,
        show_progress_on=grid,
    )
    return picked, bar


def mergeable(workshop: Workshop, chosen: Sequence[str]) -> tuple[Any, str]:
    """The concepts that there are now, single ones, and the ledger."""
    names = [name for base in workshop.bases() for name, spec in workshop.concepts(base).items() if not spec.parents]
    kept = [name for name in chosen if name in names]
    return gr.update(choices=names, value=kept), _ledgers(workshop, kept)


def _ledgers(workshop: Workshop, picked: Sequence[str]) -> str:
    ledgers = workshop.library.ledgers()
    if not ledgers:
        return "<p class='note'>The library is empty: train a concept first.</p>"
    return "".join(ledger_bar(ledger, picked) for ledger in ledgers)


def _examine(workshop: Workshop, picked: Sequence[str]) -> tuple[str, str]:
    """The ledger, and what a sum of these guarantees or why they cannot be merged."""
    bar = _ledgers(workshop, picked)
    if len(picked) < 2:
        return bar, PICK
    adapters = [workshop.load(name) for name in picked]
    spec = adapters[0].spec
    try:
        return bar, certificate_list(certify(adapters, workshop.library.widths(spec.base_fingerprint, spec.side)))
    except SboraError as reason:
        return bar, f"<p>{sentence(str(reason))} {sentence(reason.hint or '')}</p>"


def _merge(workshop: Workshop, picked: Sequence[str], how: str, name: str | None) -> Iterator[tuple[str, Any]]:
    """Write the merge, then draw the grid of each concept alone and merged."""
    if len(picked) < 2:
        raise SboraError("a merge needs two concepts", "Pick two or more.")
    adapters = [workshop.load(each) for each in picked]
    name = (name or "").strip() or merged_name(adapters)
    for part in name.split("+"):
        check_name(part)
    path = workshop.library.path(name)
    if path.exists():
        raise SboraError(f"there is a concept {name} already", "Choose another name.")
    yield "Merging …", gr.skip()
    base = adapters[0].spec.base_id
    merged = merge(adapters, [1.0] * len(adapters), "sum") if how == "sum" else _fuse(workshop, base, adapters)
    merged.save(path)
    made = f"**{name}** is in Generate now."
    yield f"{made} SampleRequest what it does …", gr.skip()
    image = _before_after(workshop, base, list(picked), adapters, name)
    yield made if how == "sum" else f"{made} {FUSED}", gr.update(value=image, visible=True)


def _fuse(workshop: Workshop, base: str, adapters: Sequence[Adapter]) -> Adapter:
    weights = [1.0] * len(adapters)
    return workshop.with_model(base, {}, lambda model: fuse(adapters, weights, SampledInputs(model, adapters)))


def _before_after(
    workshop: Workshop, base: str, picked: Sequence[str], adapters: Sequence[Adapter], merged: str
) -> Image.Image:
    """A row for each concept alone, and one for it in the merge, same seeds."""
    rows = []
    for name, adapter in zip(picked, adapters, strict=True):
        token = next(iter(adapter.spec.tokens))
        prompts = [scene.format(token) for scene in SCENES]
        drawing = partial(generate, prompts=prompts, seeds=range(len(prompts)))
        for what in (name, merged):
            images = workshop.with_model(base, {what: 1.0}, drawing)
            title = f"{token} alone" if what == name else f"{token} in {merged}"
            rows.append((title, list(zip(prompts, images, strict=True))))
    return sheet(rows, cell=192)
