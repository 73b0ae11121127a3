"""The retention study end to end on a tiny base model: every cell computed once, summarised from the results."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import fusion_times
import pytest
import retention
import retention_bench
from fuse_layers import GROUPS, score_groups, with_own_layers
from PIL import Image
from retention_study import HOWS, Interval, Study, columns_of
from retention_summary import summarise

from sbora_diffusion.adapters.file import Adapter

from ..tiny_clip import save_tiny_clip
from ..tiny_pipeline import save_tiny_pipeline

NAMES = ("dog", "cat")
QUICK = {"steps": "1", "crops": "1", "sampling_steps": "1", "save_every": "1", "warmup_steps": "1"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Study:
    """A study whose cells are all computed."""
    folder = tmp_path_factory.mktemp("study")
    suite = folder / "two.txt"
    suite.write_text("a <TOK>\na red <TOK>\n")
    base, judge = save_tiny_pipeline(folder / "tiny"), save_tiny_clip(folder / "clip")
    study = Study(
        folder=folder / "study",
        results=folder / "found",
        sampling_steps=1,
        base=str(base),
        judge=str(judge),
        suite=str(suite),
        concepts=NAMES,
        sizes=(2,),
        overrides=QUICK,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(retention, "_in_a_process", retention.train_one)
        patch.setattr(retention_bench, "STEPS", {"unet": 2, "text_encoder": 2})
        retention.run(study, ["disjoint", "shared"], [0], 1, folder / "out.json")
    return study


@pytest.fixture
def study(finished: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Study:
    """A copy of it, to be changed; nothing is trained or scored any more."""
    monkeypatch.setattr(retention_bench, "STEPS", {"unet": 2, "text_encoder": 2})
    shutil.copytree(finished.folder.parent, tmp_path / "copy")
    return replace(finished, folder=tmp_path / "copy/study", results=tmp_path / "copy/found")


def test_summary_of_a_finished_study(study: Study) -> None:
    out = study.folder.parent / "out.json"
    summary = summarise(study, ["disjoint", "shared"], [0])
    assert summary["missing cells"] == 0
    rows = {(row["scheme"], row["how"], row["size"]): row for row in summary["rows"]}
    assert len(rows) == 2 * (1 + len(HOWS))
    for row in rows.values():
        assert row["cells"] == 2
    single = rows["disjoint", "single", 1]
    assert (single["image retention"], single["image change"]["mean"], single["seconds"]) == (1, 0, None)
    full, fused, summed = (rows["disjoint", how, 2]["objective"] for how in ("full", "fuse", "sum"))
    assert full <= fused * 1.001
    assert fused <= summed * 1.001
    times = fusion_times.compared(retention_bench.Bench(study, "disjoint", 0), 2)
    assert times["objective, closed form"] <= times["objective, LBFGS"] * 1.001
    assert min(times["closed form, s"], times["times faster"]) > 0
    intervals = [Adapter.load(study.adapter_path("disjoint", 0, name)).spec.intervals for name in NAMES]
    assert [str(each) for (each,) in intervals] == ["0:8", "8:16"]
    with Image.open(out.with_suffix(".png")) as plot:
        assert plot.width > plot.height > 300
    assert out.with_suffix(".md").read_text().count("\n") == 2 + len(rows)


def test_every_cell_is_computed_once(study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a cell was computed again")

    out = tmp_path / "out.json"
    monkeypatch.setattr(retention, "train_one", refuse)
    monkeypatch.setattr(retention, "_in_a_process", refuse)
    monkeypatch.setattr(retention_bench.Bench, "score", refuse)
    retention.run(study, ["disjoint", "shared"], [0], 1, out)
    path = study.results / "disjoint-0.json"
    found = json.loads(path.read_bytes())
    del found["scores"]["sum-2-cat"]
    path.write_text(json.dumps(found))
    with pytest.raises(AssertionError, match="again"):
        retention.run(study, ["disjoint"], [0], 1, out)
    assert summarise(study, ["disjoint"], [0])["missing cells"] == 1
    shutil.rmtree(study.folder)  # as on another machine: the results are enough
    retention.run(study, ["shared"], [0], 1, out)


def test_unmerged_groups_of_layers(study: Study) -> None:
    """No layer is the merge, all are the single concept; every group is scored, once."""
    groups = replace(study, results=study.folder / "layers", hows=tuple(GROUPS))
    score_groups(groups, 0)
    assert not groups.missing("disjoint", 0)
    found, merged = groups.found("disjoint", 0), study.found("disjoint", 0)
    assert found.scores("single", 1, "dog") == merged.scores("single", 1, "dog")

    bench = retention_bench.Bench(study, "disjoint", 0)
    fused, own = bench.merged("fuse", NAMES)[0], bench.adapters["dog"]
    assert with_own_layers(fused, own, GROUPS["no layer"]).factors == fused.factors
    half = with_own_layers(fused, own, GROUPS["text encoder"]).factors
    assert {key for key in half if half[key] is own.factors[key]} == {key for key in half if key.startswith("text")}
    matching = [key for key in half for name in ("text encoder", "U-Net") if re.search(GROUPS[name], key)]
    assert sorted(matching) == sorted(half)


def test_columns() -> None:
    assert columns_of("disjoint", 1, 2) == (Interval(16, 8), 0)
    assert columns_of("shared", 1, 2) == (Interval(0, 8), 0)
    seeds = {columns_of("random", seed, number) for seed in range(3) for number in range(12)}
    assert len(seeds) == 36


def test_every_concept_is_in_one_merge_of_each_size() -> None:
    study = Study(folder=Path("nowhere"))
    for size in study.sizes:
        groups = study.groups(size)
        assert sorted(name for group in groups for name in group) == sorted(study.concepts)
        assert {len(group) for group in groups} == {size}
