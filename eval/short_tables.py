"""The two short tables of docs/comparison.md, single concepts and 12-concept merges, from the results of `compare`.

python eval/short_tables.py eval/results/methods.json
"""

import json
import re
from pathlib import Path
from typing import Annotated, Any

import typer

SIZES = {1: "single", 12: "12 merged"}
METRICS = {"text_mos": "text", "image": "image", "success": "recognised"}
LAYERWISE = "layerwise_tokens=1,token_vectors=2"
QUICK = "steps=160,batch_size=4,learning_rate=9e-3,text_encoder_learning_rate=2.25e-3"
SUM_SAFE = "recipe=sum-safe"
SLOW = f"{SUM_SAFE},token_learning_rate=3e-2"
NAMES = {  # variant -> its name in the document
    f"sbora-fa:{SUM_SAFE}": "SBoRA-FA, sum-safe",
    "sbora-fa": "SBoRA-FA",
    f"sbora-fa:{LAYERWISE}": "SBoRA-FA, layer-wise tokens",
    f"sbora-fa:{LAYERWISE},prior_batch=1": "the same, one prior sample",
    "sbora-fa:output_penalty=0": "SBoRA-FA, no output penalty",
    f"sbora-fa:{SLOW}": "SBoRA-FA, sum-safe, token at 0.03",
    f"sbora-fa:{SLOW},batch_size=4": "the same, batches of 4",
    f"sbora-fa:{SLOW},{QUICK}": "the same, 160 steps of 4",
    f"sbora-fa:{SLOW},blocks=,output_penalty=100": "the same, all blocks",
    f"sbora-fb:{SLOW}": "SBoRA-FB, sum-safe, token at 0.03",
    "sbora-fb": "SBoRA-FB",
    "mix-of-show": "Mix-of-Show",
    "orthogonal": "Orthogonal Adaptation",
    "lora": "LoRA",
    "dora": "DoRA",
    "textual-inversion": "Textual inversion",
    "custom-diffusion": "Custom Diffusion",
    "blocklora": "BlockLoRA",
}


def name_of(row: dict[str, Any]) -> str:
    """Return the name, with the way to merge if there is a choice, and n if it is not that of most rows."""
    variant, _, how = re.sub(r"[:,]merge=", " ", row["variant"]).partition(" ")
    name = NAMES.get(variant) or variant
    if how:
        name += ", `fuse`" if how == "fuse" else f", {how}"
    return name if row["n"] == 36 else f"{name} (n = {row['n']})"


def means(rows: list[dict[str, Any]]) -> str:
    """Return text and image of each variant, single and 12 merged, and its costs."""
    heads = [f"{metric} {size}" for size in SIZES.values() for metric in ("text", "image")]
    lines = [f"| | {' | '.join(heads)} | parameters | MB | seconds |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    of = {(row["variant"], row["size"]): row for row in rows}
    for variant in dict.fromkeys(row["variant"] for row in rows):
        single, merged = of[variant, 1], of[variant, 12]
        scores = [f"{row[metric]['mean']['mean']:.3f}" for row in (single, merged) for metric in ("text_mos", "image")]
        costs = (f"{single['parameters']:,.0f}", f"{single['bytes'] / 1e6:.2f}", f"{single['seconds']:.0f}")
        lines.append(f"| {' | '.join((name_of(merged), *scores, *costs))} |")
    return "\n".join(lines)


def differences(pairs: list[dict[str, Any]]) -> str:
    """Return each variant minus the first, pair by pair; bold if the interval does not contain 0."""
    heads = [f"{metric} {where}" for where in SIZES.values() for metric in METRICS.values()]
    lines = [f"| | {' | '.join(heads)} |", f"|{'---|' * (len(heads) + 1)}"]
    of = {(pair["variant"], pair["size"]): pair for pair in pairs}
    for variant in dict.fromkeys(pair["variant"] for pair in pairs):
        cells = [difference(of[variant, size][metric]) for size in SIZES for metric in METRICS]
        lines.append(f"| {name_of(of[variant, 12])} | {' | '.join(cells)} |")
    return "\n".join(lines)


def difference(one: dict[str, float]) -> str:
    """Return a mean with its interval, or "the same" if all pairs are equal."""
    if not any(one.values()):
        return "the same"
    text = f"{one['mean']:+.3f} [{one['low']:+.3f}, {one['high']:+.3f}]".replace("-", "−")
    return text if one["low"] <= 0 <= one["high"] else f"**{text}**"


def main(path: Annotated[Path, typer.Argument(metavar="TABLE.json")]) -> None:
    """Print both."""
    found = json.loads(path.read_bytes())
    typer.echo(f"{means(found['rows'])}\n\n{differences(found['differences'])}")


if __name__ == "__main__":
    typer.run(main)
