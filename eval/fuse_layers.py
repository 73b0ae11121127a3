"""In which layers `fuse` of 12 concepts loses: each concept generated with one group of its layers unmerged.

    python eval/fuse_layers.py FOLDER [--seeds 1]

FOLDER is that of eval/retention.py with trainings of disjoint columns. The gain in scores is what merging that group of
layers costs, as far as groups are additive. Scores go to the folder beside --out, so that the command can be killed and
run again; the summary is --out.
"""

import logging
import re
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from retention_bench import Bench
from retention_study import Study
from retention_summary import summarise, write_table

from sbora_diffusion.adapters.file import Adapter

log = logging.getLogger("fuse_layers")

FUSE = "fuse:0.3"  # the optimum, before `merge --how fuse` scales it
GROUPS = {  # name -> pattern of the layers' names
    "no layer": r"(?!)",
    "text encoder": r"^text_encoder\.",
    "U-Net": r"^unet\.",
    "self-attention": r"\.attn1\.",
    "cross-attention": r"\.attn2\.",
    "queries and keys": r"\.to_[qk]$",
    "values and outputs": r"\.to_(v|out\.0)$",
    "going down": r"\.down_blocks\.",
    "in the middle": r"\.mid_block\.",
    "going up": r"\.up_blocks\.",
}


def with_own_layers(fused: Adapter, own: Adapter, pattern: str) -> Adapter:
    """Return the merge, with the layers whose names match taken from one of its concepts."""
    factors = {key: (own if re.search(pattern, key) else fused).factors[key] for key in fused.factors}
    return replace(fused, factors=factors)


def score_groups(study: Study, seed: int) -> None:
    """Compute what is missing of a seed, concept by concept."""
    missing, found = study.missing("disjoint", seed), study.found("disjoint", seed)
    if not missing:
        return
    bench = Bench(study, "disjoint", seed)
    fused, _ = bench.merged(FUSE, study.concepts)
    for how, size, names in missing:
        for name in [name for name in names if not found.scores(how, size, name)]:
            own = bench.adapters[name]
            adapter = own if how == "single" else with_own_layers(fused, own, GROUPS[how])
            log.info("disjoint-%d: %s, %s", seed, name, how)
            found.add((how, size, (name,)), bench.score(adapter, (how, size, (name,))), {})


def main(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder of the trainings.")],
    seeds: Annotated[str, typer.Option(metavar="N,…", help="Of trainings and images.")] = "1",
    out: Annotated[Path, typer.Option(metavar="FILE", help="The summary.")] = Path("eval/results/fuse-layers.json"),
) -> None:
    """Measure in which layers a merge loses."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", force=True)
    study = Study(folder=folder, results=out.with_suffix(""), hows=tuple(GROUPS), sizes=(12,))
    numbers = [int(seed) for seed in seeds.split(",")]
    for seed in numbers:
        score_groups(study, seed)
    write_table(summarise(study, ["disjoint"], numbers), out)


if __name__ == "__main__":
    typer.run(main)
