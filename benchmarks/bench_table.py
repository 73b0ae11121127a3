"""docs/benchmarks.md, from the files in results/.

    python benchmarks/bench_table.py [--out docs/benchmarks.md]

One section a file, with the text of the script that made it.
"""

import ast
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from bench_common import RESULTS, Row, new_app

DOCUMENT = RESULTS.parents[1] / "docs" / "benchmarks.md"
ORDER = ("layers", "step", "memory", "switch", "generation", "startup", "train", "studio", "threads", "gather", "gpu")
SIDE_BY_SIDE = ("layers", "step", "generation")  # their ways become columns
INTRODUCTION = """# Benchmarks

Written by `python benchmarks/bench_table.py` from the files in [benchmarks/results](../benchmarks/results), which the
commands below have made. PEFT is its plain LoRA of the same rank; base is the frozen model, in trainings with the
backward pass to its inputs: the floor. "direct" is `inplace_training`, which `train` uses, without it the fused kernel.

Ways take turns, round by round, and each number is the median of its rounds; a ratio is one median over another of the
same run. On a CPU the clock is the process's own CPU time, on one thread: the machine had other work, which still
disturbs caches, so differences of a few percent between single cells mean nothing.
"""
STACK, EMOJI64 = {"model": "SD1.5's attention layers"}, {"model": "emoji64, `train`"}
DIRECT, TWELVE = ("fa direct", "fb direct"), {"concepts": 12}
FLOOR = """The frozen model's own forward and backward pass is in every step that trains all adapted layers: no
such step takes less than the last column says. Where that is above the target, the target is out of reach on that
machine."""
WHOLE_TRAINING = 60  # seconds at most
TARGETS = (  # what, benchmark, which rows, of which ways, the ratio, its limit
    ("a training step of SD1.5's attention layers, of PEFT's", "step", STACK, DIRECT, "of peft", 0.75),
    ("the same, of the frozen layers' forward and backward", "step", STACK, DIRECT, "of base", 1.10),
    ("a whole training step of emoji64, of PEFT's", "step", EMOJI64, DIRECT, "of peft", 0.90),
    ("switching a live concept, of PEFT's unmerge and merge", "switch", {}, ("fa, set_adapter",), "of peft", 0.05),
    ("switching a written concept, the same", "switch", {}, ("fa, written", "fb, written"), "of peft", 0.05),
    ("a step of drawing with 12 written, of the base's", "generation", TWELVE, ("fa, written",), "of base", 1.0),
)

app = new_app()


@app.command()
def main(out: Annotated[Path, typer.Option("--out", metavar="FILE")] = DOCUMENT) -> None:
    """Write the document."""
    out.write_text(document(committed()))
    typer.echo(out)


def committed() -> list[dict[str, Any]]:
    """The results of these benchmarks; others may lie beside them."""
    paths = [path for path in sorted(RESULTS.glob("*.json")) if path.stem.rsplit("-", 1)[0] in ORDER]
    return [json.loads(path.read_text()) for path in paths]


def document(results: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: one section a result."""
    ordered = sorted(results, key=lambda result: ORDER.index(result["benchmark"]))
    return "\n".join([INTRODUCTION, targets(ordered), *(section(result) for result in ordered)])


def targets(results: Sequence[Mapping[str, Any]]) -> str:
    """What this project asks of itself, and what was measured, on every device at hand."""
    lines: list[Row] = []
    for what, name, which, ways, ratio, limit in TARGETS:
        for result in results:
            if result["benchmark"] != name:
                continue
            cases = [row for row in result["rows"] if which.items() <= row.items()]
            if any(row["way"] in ways for row in cases):
                lines.append({
                    "device": result["machine"]["device"],
                    "target": f"{what}: ≤ {limit:.2f}",
                    "measured": _told(cases, ways, ratio),
                    "the frozen model": _told(cases, ("base",), ratio) if ratio == "of peft" else "",
                })  # fmt: skip
    lines += whole_training(results)
    return f"## Targets\n{FLOOR}\n\n{table(lines)}\n" if lines else ""


def whole_training(results: Sequence[Mapping[str, Any]]) -> list[Row]:
    """Targets of whole trainings, in seconds: the frozen model's share of a step is its share of all steps."""
    lines: list[Row] = []
    steps = {result["machine"]["device"]: result["rows"] for result in results if result["benchmark"] == "step"}
    for result in results:
        device = result["machine"]["device"]
        if result["benchmark"] != "train" or device not in steps:
            continue
        seconds = {row["part"]: row["s"] for row in result["rows"]}
        ways = {row["way"]: row["ms"] for row in steps[device] if EMOJI64.items() <= row.items()}
        frozen = seconds["steps"] * ways["base"] / ways["fa direct, quiet"]
        lines.append({
            "device": device,
            "target": f"`sbora-diffusion train --concept dog`, seconds: ≤ {WHOLE_TRAINING}",
            "measured": ", ".join(f"{s:.0f} ({part})" for part, s in seconds.items() if part.startswith("the command")),
            "the frozen model": f"{frozen:.0f}, its steps alone",
        })  # fmt: skip
    return lines


def _told(rows: Sequence[Row], ways: Sequence[str], ratio: str) -> str:
    return ", ".join(f"{row[ratio]:.3f} ({_short(row)})" for row in rows if row["way"] in ways)


def _short(row: Row) -> str:
    """Which of several rows it is: the way, and the rank or the model."""
    return f"{row['way']}, {row['model']}" if "concepts" in row else f"{row['way']}, r = {row['rank']}"


def section(result: Mapping[str, Any]) -> str:
    """What was measured, in its script's own words, on what, and the table."""
    name, machine = result["benchmark"], result["machine"]
    title, text = explanation(name)
    versions = ", ".join(f"{package} {number}" for package, number in result["versions"].items())
    about = ", ".join(f"{key} {value}" for key, value in machine.items())
    rows = side_by_side(result["rows"]) if name in SIDE_BY_SIDE else result["rows"]
    note = "A cell is the time as a share of PEFT's / of the base's.\n\n" if name in SIDE_BY_SIDE else ""
    return f"## {title}\n{text}\n\n`{result['command']}`: {about}; {versions}.\n\n{note}{table(rows)}\n"


def explanation(name: str) -> tuple[str, str]:
    """The first line of a script's docstring, and what follows the line of its command."""
    source = (RESULTS.parent / f"bench_{name}.py").read_text()
    title, _, *text = (ast.get_docstring(ast.parse(source)) or "").split("\n\n")
    return title, "\n\n".join(text)


def side_by_side(rows: Sequence[Row]) -> list[Row]:
    """One row a case, with the base's milliseconds and for every other way its two ratios."""
    cases: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        about = {key: value for key, value in row.items() if key not in ("way", "ms", "of peft", "of base")}
        case = cases.setdefault(tuple(about.values()), about)
        if row["way"] == "base":
            case["base, ms"] = row["ms"]
        else:
            case[row["way"]] = f"{row['of peft']:.2f} / {row['of base']:.2f}"
    return list(cases.values())


def table(rows: Sequence[Row]) -> str:
    """A Markdown table of all columns that occur."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = [columns, ["---"] * len(columns), *([str(row.get(key, "")) for key in columns] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    app()
