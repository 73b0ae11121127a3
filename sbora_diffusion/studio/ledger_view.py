"""HTML of the Merge tab: the ledger as a bar, and what a merge guarantees."""

import html
from collections.abc import Sequence

from sbora_diffusion.adapters.certificate import Certificate
from sbora_diffusion.library.ledger import Ledger

COLOURS = ("#4f46e5", "#0e7490", "#b45309", "#be185d", "#15803d", "#7c3aed", "#b91c1c", "#475569")
MARKS = {"guaranteed": "✓", "disjoint": "✓", "not disjoint": "✗", "not guaranteed": "–"}


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
