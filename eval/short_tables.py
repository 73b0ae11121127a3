"""The two short tables of docs/comparison.md, alone and all twelve merged, from what `compare` has found.

python eval/short_tables.py eval/results/methods.json
"""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

SIZES = {1: "alone", 12: "of twelve"}
METRICS = {"text_mos": "text", "image": "image", "success": "recognised"}
LAYERWISE = "layerwise_tokens=1,token_vectors=2"
LOUD = "learning_rate=1.2e-2,text_encoder_learning_rate=3e-3"
QUICK = "steps=160,batch_size=4,learning_rate=9e-3,text_encoder_learning_rate=2.25e-3"
SLOW = "token_learning_rate=3e-2"
NAMES = {  # variant -> as the document calls it
    "sbora-fa": "SBoRA-FA",
    f"sbora-fa:output_penalty=2,{LOUD}": "SBoRA-FA, loud",
    f"sbora-fa:output_penalty=2,{LOUD},{LAYERWISE}": "SBoRA-FA, loud, layer-wise tokens",
    f"sbora-fa:output_penalty=2,{LOUD},{LAYERWISE},prior_batch=1": "the same, one prior sample",
    f"sbora-fa:output_penalty=0,{LOUD}": "SBoRA-FA, loudest",
    f"sbora-fa:{SLOW}": "SBoRA-FA, token at 0.03",
    f"sbora-fa:{SLOW},batch_size=4": "the same, batches of 4",
    f"sbora-fa:{SLOW},{QUICK}": "the same, 160 steps of 4",
    f"sbora-fa:{SLOW},blocks=,output_penalty=100": "the same, all blocks",
    f"sbora-fb:{SLOW}": "SBoRA-FB, token at 0.03",
    f"sbora-fb:output_penalty=2,{LOUD}": "SBoRA-FB, loud",
    "mix-of-show": "Mix-of-Show",
    "orthogonal": "Orthogonal Adaptation",
    "lora": "LoRA",
    "dora": "DoRA",
    "textual-inversion": "Textual inversion",
    "custom-diffusion": "Custom Diffusion",
    "blocklora": "BlockLoRA",
}


def name_of(row: dict[str, Any]) -> str:
    """With how it is merged, where there is a choice, and its n, if it is not what most rows have."""
    said: str = row["variant"]
    variant, fused = said.removesuffix("merge=fuse").rstrip(":,"), said.endswith("merge=fuse")
    name = NAMES.get(variant) or variant
    if variant.startswith("sbora"):
        name += ", `fuse`" if fused else ", sum"
    return name if row["n"] == 36 else f"{name} (n = {row['n']})"


def means(rows: list[dict[str, Any]]) -> str:
    """Text and image of each variant, alone and of twelve, and what it costs."""
    lines = ["| | text alone | image alone | text of twelve | image of twelve | parameters | MB | seconds |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    of = {(row["variant"], row["size"]): row for row in rows}
    for variant in dict.fromkeys(row["variant"] for row in rows):
        alone, merged = of[variant, 1], of[variant, 12]
        scores = [f"{row[metric]['mean']['mean']:.3f}" for row in (alone, merged) for metric in ("text_mos", "image")]
        costs = (f"{alone['parameters']:,.0f}", f"{alone['bytes'] / 1e6:.2f}", f"{alone['seconds']:.0f}")
        lines.append(f"| {' | '.join((name_of(merged), *scores, *costs))} |")
    return "\n".join(lines)


def differences(pairs: list[dict[str, Any]]) -> str:
    """Each variant minus the first, pair by pair; bold without 0."""
    heads = [f"{metric} {where}" for where in SIZES.values() for metric in METRICS.values()]
    lines = [f"| | {' | '.join(heads)} |", f"|{'---|' * (len(heads) + 1)}"]
    of = {(pair["variant"], pair["size"]): pair for pair in pairs}
    for variant in dict.fromkeys(pair["variant"] for pair in pairs):
        cells = [told(of[variant, size][metric]) for size in SIZES for metric in METRICS]
        lines.append(f"| {name_of(of[variant, 12])} | {' | '.join(cells)} |")
    return "\n".join(lines)


def told(one: dict[str, float]) -> str:
    """A mean with its interval; nothing where there is no difference to be."""
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
