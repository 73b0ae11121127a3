"""The Merge tab: select concepts, see what their merge guarantees, merge, and compare with each single concept."""

import html
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import gradio as gr
from PIL import Image

from sbora_diffusion.adapters.certificate import Certificate, certify
from sbora_diffusion.adapters.file import Adapter
from sbora_diffusion.adapters.merge import merged_name
from sbora_diffusion.inference.generate import generate
from sbora_diffusion.inference.image_grid import sheet
from sbora_diffusion.library.ledger import Ledger
from sbora_diffusion.methods.merging import merge
from sbora_diffusion.studio.fields import INSTANT, Refresh, concept_chips, concept_choices, hidden_image, on_model
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

COLOURS = ("#4f46e5", "#0e7490", "#b45309", "#be185d", "#15803d", "#7c3aed", "#b91c1c", "#475569")
MARKS = {"guaranteed": "✓", "disjoint": "✓", "not disjoint": "✗", "not guaranteed": "–"}


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


def ledger_bar(ledger: Ledger, selected: Sequence[str]) -> str:
    """Return the interval of every concept as a segment of a bar; concepts that are not selected are faded."""
    names = list(dict.fromkeys(owner.name for owner in ledger.first_owners))
    colours = {name: COLOURS[place % len(COLOURS)] for place, name in enumerate(names)}
    what = "columns" if ledger.side == "fa" else "rows"
    label = f"{what} by concept"
    if ledger.width is not None:
        label += f": {sum(gap.rank for gap in ledger.gaps)} of {ledger.width} {what} are free"
    return (
        f"<p class='note'>{label.capitalize()}</p>"
        f"<div class='ledger' role='img' aria-label='{label}'>{_segments(ledger, selected, colours)}</div>"
        f"<div class='legend'>{_legend(ledger, colours)}</div>"
    )


def _segments(ledger: Ledger, selected: Sequence[str], colours: dict[str, str]) -> str:
    stop = ledger.width or max((owner.interval.stop for owner in ledger.owners), default=1)
    parts, at = [], 0
    for owner in ledger.first_owners:
        start, end = max(at, owner.interval.start), owner.interval.stop
        if end <= start:  # shared with an owner that has a segment
            continue
        parts += [_free(start - at, stop)] if start > at else []
        faded = "" if not selected or owner.name in selected else " class='faded'"
        name = html.escape(owner.name)
        parts.append(
            f"<span{faded} title='{name}: {owner.interval}' "
            f"style='width:{100 * (end - start) / stop:.3f}%;background:{colours[owner.name]}'>{name}</span>"
        )
        at = end
    return "".join(parts + ([_free(stop - at, stop)] if stop > at else []))


def _legend(ledger: Ledger, colours: dict[str, str]) -> str:
    entries = []
    for name, colour in colours.items():
        intervals = ", ".join(str(owner.interval) for owner in ledger.owners if owner.name == name)
        entries.append(f"<span><i style='background:{colour}'></i>{html.escape(name)} {intervals}</span>")
    entries += [f"<span>{html.escape(name)}, merged</span>" for name in ledger.only_merged]
    return "".join(entries)


def _free(width: int, stop: int) -> str:
    return f"<span class='free' style='width:{100 * width / stop:.3f}%'>free</span>"


def certificate_list(certificate: Certificate) -> str:
    """Return what is guaranteed and what is not as a list."""
    items = []
    for line in certificate.describe().splitlines():
        kind, colon, rest = line.strip().partition(": ")
        mark = MARKS.get(kind, "·")
        items.append(f"<li>{mark} {html.escape(rest if mark == '✓' and colon else line.strip())}</li>")
    return f"<ul class='facts'>{''.join(items)}</ul>"
