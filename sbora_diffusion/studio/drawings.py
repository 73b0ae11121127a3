"""What the Merge tab draws in HTML: the ledger as a bar, and what a merge guarantees."""

import html
from collections.abc import Sequence

from sbora_diffusion.adapters.certificate import Certificate
from sbora_diffusion.library.ledger import Ledger

COLOURS = ("#4f46e5", "#0e7490", "#b45309", "#be185d", "#15803d", "#7c3aed", "#b91c1c", "#475569")


def ledger_bar(ledger: Ledger, picked: Sequence[str]) -> str:
    """Every owner's interval in place; those that are not picked are faded."""
    what = "columns" if ledger.side == "fa" else "rows"
    stop = ledger.width or max((owner.interval.stop for owner in ledger.owners), default=1)
    owners, parts, at = list(dict.fromkeys(owner.name for owner in ledger.first_owners)), [], 0
    colours = {name: COLOURS[place % len(COLOURS)] for place, name in enumerate(owners)}
    for owner in ledger.first_owners:
        start, end = max(at, owner.interval.start), owner.interval.stop
        if end <= start:  # several own it
            continue
        parts += [_free(start - at, stop)] if start > at else []
        faded = "" if not picked or owner.name in picked else " class='faded'"
        name = html.escape(owner.name)
        parts.append(
            f"<span{faded} title='{name}: {owner.interval}' "
            f"style='width:{100 * (end - start) / stop:.3f}%;background:{colours[owner.name]}'>{name}</span>"
        )
        at = end
    parts += [_free(stop - at, stop)] if stop > at else []
    room = "" if ledger.width is None else f": {sum(gap.rank for gap in ledger.gaps)} of {ledger.width} {what} are free"
    legend = "".join(
        f"<span><i style='background:{colours[name]}'></i>{html.escape(name)} "
        f"{', '.join(str(owner.interval) for owner in ledger.owners if owner.name == name)}</span>"
        for name in owners
    )
    legend += "".join(f"<span>{html.escape(name)}, merged</span>" for name in ledger.only_merged)
    label = f"who owns which {what}{room}"
    return (
        f"<p class='note'>{label[0].upper()}{label[1:]}</p>"
        f"<div class='ledger' role='img' aria-label='{label}'>{''.join(parts)}</div><div class='legend'>{legend}</div>"
    )


def certificate_list(certificate: Certificate) -> str:
    """What is guaranteed and what is not, a line each."""
    lines = []
    for line in certificate.describe().splitlines():
        kind, colon, rest = line.strip().partition(": ")
        mark = {"guaranteed": "✓", "disjoint": "✓", "not disjoint": "✗", "not guaranteed": "–"}.get(kind, "·")
        words = rest if mark == "✓" and colon else line.strip()
        lines.append(f"<li>{mark} {html.escape(words)}</li>")
    return f"<ul class='facts'>{''.join(lines)}</ul>"


def _free(width: int, stop: int) -> str:
    return f"<span class='free' style='width:{100 * width / stop:.3f}%'>free</span>"
