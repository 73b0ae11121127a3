"""The log of a training that others can read while it runs."""

import shutil
from pathlib import Path

import pytest

from sbora_diffusion.data.concept import default_roots
from sbora_diffusion.training.checkpoint import LOG, append_log, read_log
from sbora_diffusion.training.train import train

from ..tiny_pipeline import save_tiny_pipeline

QUICK = {"steps": "4", "save_every": "2", "sampling_steps": "1", "crops": "1", "preview_every": "2", "prior_batch": "0"}


def test_a_repeated_step_is_told_once_and_a_half_written_line_not_at_all(tmp_path: Path) -> None:
    assert read_log(tmp_path) == []
    for step, loss in ((1, 0.5), (2, 0.4), (3, 0.3), (2, 0.25)):
        append_log(tmp_path, {"step": step, "loss": loss})
    with (tmp_path / LOG).open("a") as file:
        file.write('{"step": 4, "lo')
    assert [(entry["step"], entry["loss"]) for entry in read_log(tmp_path)] == [(1, 0.5), (2, 0.25), (3, 0.3)]
    append_log(tmp_path, {"step": 1, "loss": 0.7})
    assert read_log(tmp_path) == [{"step": 1, "loss": 0.7}]


def test_a_training_tells_every_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    base = save_tiny_pipeline(tmp_path / "base")
    packaged = default_roots()[1]
    shutil.copytree(packaged / "dog", tmp_path / "concepts" / "dog")
    runs = tmp_path / "runs"
    train("dog", str(base), runs=runs, settings=QUICK)
    log = read_log(runs / "dog")
    assert [entry["step"] for entry in log] == [1, 2, 3, 4]
    assert {entry["steps"] for entry in log} == {4}
    assert [entry["done"] for entry in log] == [False, False, False, True]
    assert all(entry["loss"] > 0 and entry["samples_per_second"] > 0 for entry in log)
    assert [entry["time"] for entry in log] == sorted(entry["time"] for entry in log)
    assert [entry["image"] for entry in log] == [None, "preview-000002.png", None, "before-after.png"]
    assert all((runs / "dog" / entry["image"]).is_file() for entry in log if entry["image"])
