"""The Merge tab: select concepts, see what their merge guarantees, merge, and compare with each single concept."""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import gradio as gr
from PIL import Image

from sbora_diffusion.adapters.certificate import certify
from sbora_diffusion.adapters.file import Adapter
from sbora_diffusion.adapters.merge import merged_name
from sbora_diffusion.inference.generate import generate
from sbora_diffusion.inference.image_grid import sheet
from sbora_diffusion.methods.merging import merge
from sbora_diffusion.studio.fields import INSTANT, Refresh, concept_chips, concept_choices, hidden_image, on_model
from sbora_diffusion.studio.ledger_view import certificate_list, ledger_bar
from sbora_diffusion.studio.messages import error_text, show_errors
from sbora_diffusion.studio.session import Session
from sbora_diffusion.studio.uploads import check_name
from sbora_diffusion.utils.errors import SboraError

SCENES = ("a {} on the beach", "a {} in the snow", "a {} at night")
HOW = (
    ("Sum: exact; any concept can be removed again", "sum"),
    ("Fuse: concepts disturb each other least", "fuse"),
)
SELECT = "<p class='note'>Select two or more concepts.</p>"
FUSED = "Only the concepts' own columns are changed. The merge can be removed as a whole, bit for bit."


def merge_tab(session: Session) -> Refresh:
    """Lay out the tab and connect its events."""
    with gr.Row():
        with gr.Column(scale=2, min_width=320):
            selected = concept_chips("merge-concepts")
            how = gr.Radio(list(HOW), value="sum", label="Method", elem_id="how")
            name = gr.Textbox("", label="Name", info="empty: made from the concepts' names", elem_id="merge-name")
            button = gr.Button("Merge", variant="primary", size="lg", elem_id="merge")
            note = gr.Markdown("", elem_classes="note", elem_id="merge-note")
        with gr.Column(scale=3, min_width=320):
            bar = gr.HTML("", elem_id="ledger")
            facts = gr.HTML(SELECT, elem_id="certificate")
            grid = hidden_image("merge-grid", "Single concepts and merge", "download", "fullscreen")
    selected.change(show_errors(partial(_examine, session)), selected, [bar, facts], **INSTANT)
    on_model(button.click, partial(_merge, session), [selected, how, name], grid, note)
    return Refresh(partial(_refresh, session), selected, [selected, bar])


def _refresh(session: Session, selected: Sequence[str]) -> tuple[Any, str]:
    choices = concept_choices([name for base in session.bases() for name in session.singles(base)], selected)
    return choices, _ledgers(session, choices["value"])


def _ledgers(session: Session, selected: Sequence[str]) -> str:
    bars = [ledger_bar(ledger, selected) for ledger in session.library.ledgers()]
    return "".join(bars) or "<p class='note'>The library is empty. Train a concept first.</p>"


def _examine(session: Session, selected: Sequence[str]) -> tuple[str, str]:
    """Return the ledger, and what the sum guarantees or why these cannot be merged."""
    bar = _ledgers(session, selected)
    if len(selected) < 2:
        return bar, SELECT
    adapters = [session.load(name) for name in selected]
    spec = adapters[0].spec
    try:
        return bar, certificate_list(certify(adapters, session.library.widths(spec.base_fingerprint, spec.side)))
    except SboraError as error:
        return bar, f"<p>{error_text(error)}</p>"


def _merge(session: Session, selected: Sequence[str], how: str, name: str | None) -> Iterator[tuple[Any, str]]:
    """Save the merge, then generate images of each concept, single and merged."""
    if len(selected) < 2:
        raise SboraError(f"got {len(selected)} concepts, expected at least two", "Select two or more.")
    adapters = [session.load(each) for each in selected]
    name = (name or "").strip() or merged_name(adapters)
    for part in name.split("+"):
        check_name(part)
    path = session.library.path(name)
    if path.exists():
        raise SboraError(f"the concept {name} already exists", "Choose another name.")
    yield gr.skip(), "Merging …"
    base = adapters[0].spec.base_id
    if how == "sum":
        merged = merge(adapters, how=how)
    else:
        merged = session.with_model(base, {}, lambda model: merge(adapters, how=how, base=model))
    merged.save(path)
    note = f"**{name}** is now available in Generate."
    yield gr.skip(), f"{note} Generating a comparison …"
    image = _comparison(session, base, list(selected), adapters, name)
    yield gr.update(value=image, visible=True), note if how == "sum" else f"{note} {FUSED}"


def _comparison(
    session: Session, base: str, selected: Sequence[str], adapters: Sequence[Adapter], merged: str
) -> Image.Image:
    """Generate two rows for each concept, single and merged, with the same seeds."""
    rows = []
    for name, adapter in zip(selected, adapters, strict=True):
        token = next(iter(adapter.spec.tokens))
        prompts = [scene.format(token) for scene in SCENES]
        sample = partial(generate, prompts=prompts, seeds=range(len(prompts)))
        for source, title in ((name, f"{token}, single"), (merged, f"{token}, merged in {merged}")):
            images = session.with_model(base, {source: 1.0}, sample)
            rows.append((title, list(zip(prompts, images, strict=True))))
    return sheet(rows, cell=192)
