"""docs/benchmarks.md says what the committed results say."""

from string import ascii_lowercase

import bench_table as table


def test_ways_stand_side_by_side() -> None:
    rows = [
        {"rank": 8, "way": "base", "ms": 2.0, "of peft": 0.5, "of base": 1.0},
        {"rank": 8, "way": "peft", "ms": 4.0, "of peft": 1.0, "of base": 2.0},
        {"rank": 8, "way": "fa", "ms": 3.0, "of peft": 0.75, "of base": 1.5},
        {"rank": 32, "way": "base", "ms": 5.0, "of peft": 1.0, "of base": 1.0},
    ]
    assert table.table(table.side_by_side(rows)).splitlines() == [
        "| rank | base, ms | peft | fa |",
        "| --- | --- | --- | --- |",
        "| 8 | 2.0 | 1.00 / 2.00 | 0.75 / 1.50 |",
        "| 32 | 5.0 |  |  |",
    ]


def test_targets_next_to_measurements() -> None:
    rows = [
        {"layers": 128, "rank": 8, "way": "peft", "ms": 100.0, "of peft": 1.0},
        {"layers": 128, "rank": 8, "way": "fa, set_adapter", "ms": 1.0, "of peft": 0.01},
        {"layers": 128, "rank": 8, "way": "base", "ms": 0.5, "of peft": 0.005},
    ]
    results = [{"benchmark": "switch", "machine": {"device": "a CPU"}, "rows": rows}]
    line = table.targets(results).splitlines()[-1]
    assert line == (
        "| a CPU | switching a live concept, of PEFT's unmerge and merge: ≤ 0.05 | 0.010 (fa, set_adapter, r = 8) | "
        "0.005 (base, r = 8) |"
    )
    assert table.targets([]) == ""


def test_the_floor_of_a_whole_training() -> None:
    train = {"benchmark": "train", "machine": {"device": "a CPU"}, "rows": [{"part": "steps", "s": 80.0}]}
    train["rows"].append({"part": "the command, median of 3", "s": 90.0})
    ways = [{"model": "emoji64, `train`", "way": "base", "ms": 3.0}]
    ways.append({"model": "emoji64, `train`", "way": "fa direct, quiet", "ms": 4.0})
    step = {"benchmark": "step", "machine": {"device": "a CPU"}, "rows": ways}
    (line,) = table.whole_training([train, step])
    assert (line["measured"], line["the frozen model"]) == ("90 (the command, median of 3)", "60, its steps alone")
    assert table.whole_training([train, step | {"machine": {"device": "another"}}]) == []


def test_every_benchmark_explains_itself() -> None:
    for number, name in enumerate(table.ORDER):
        title, text = table.explanation(name)
        assert title.startswith(f"({ascii_lowercase[number]}) ")
        assert title.endswith(".")
        assert len(text) > 40


def test_the_document_is_up_to_date() -> None:
    assert table.DOCUMENT.read_text() == table.document(table.committed())
