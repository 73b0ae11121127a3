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
ORDER = ("layers", "step", "memory", "switch", "generation", "startup", "train", "gather")
SIDE_BY_SIDE = ("layers", "step", "generation")  # their ways become columns
INTRODUCTION = """# Benchmarks

Written by `python benchmarks/bench_table.py` from the files in [benchmarks/results](../benchmarks/results), which the
commands below have made. PEFT is its plain LoRA of the same rank; base is the frozen model, in trainings with the
backward pass to its inputs: the floor. "direct" is `direct_training`, which `train` uses, without it the fused kernel.

Ways take turns, round by round, and each number is the median of its rounds; a ratio is one median over another of the
same run. On a CPU the clock is the process's own CPU time, on one thread: the machine had other work, which still
disturbs caches, so differences of a few percent between single cells mean nothing.
"""

app = new_app()


@app.command()
def main(out: Annotated[Path, typer.Option("--out", metavar="FILE")] = DOCUMENT) -> None:
    """Write the document."""
    results = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))]
    out.write_text(document(results))
    typer.echo(out)


def document(results: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: one section a result."""
    ordered = sorted(results, key=lambda result: ORDER.index(result["benchmark"]))
    return "\n".join([INTRODUCTION, *(section(result) for result in ordered)])


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
