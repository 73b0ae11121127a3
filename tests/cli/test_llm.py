"""The llm commands end to end on a tiny model, and their errors."""

import errno
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from sbora_diffusion.adapters.basis import Interval
from sbora_diffusion.adapters.file import Adapter
from sbora_diffusion.cli.app import app
from sbora_diffusion.evaluation import llm_accuracy
from sbora_diffusion.llm import chat as llm_chat
from sbora_diffusion.llm.chat import Chat
from sbora_diffusion.utils.errors import SboraError

from ..llm.tiny import save_base, save_data, save_tasks

QUICK = [word for setting in ("rank=4", "steps=2", "save_every=1") for word in ("--set", setting)]


def run(*words: str | int | Path, stdin: str | None = None) -> Result:
    return CliRunner().invoke(app, ["llm", *map(str, words)], input=stdin)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def here() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture(scope="module")
def work(base: Path, tmp_path_factory: pytest.TempPathFactory, here: pytest.MonkeyPatch) -> Path:
    """A folder with data, tasks and three trainings: one, two (its seed is another one) and lora."""
    folder = tmp_path_factory.mktemp("work")
    here.chdir(folder)
    save_data(folder / "sums.json")
    save_tasks(folder / "tasks")
    for name, *words in (("one",), ("two", "--set", "seed=1"), ("lora", "--method", "lora")):
        command = ["train", "--base", base, "--data", folder / "sums.json", "--out", folder / name, *QUICK, *words]
        result = run(*command)
        assert result.exit_code == 0, result.output
        written = [str(folder / name / "adapter")] + ([f"adapters/{name}.safetensors"] if name != "lora" else [])
        assert result.stdout.split() == written
    return folder


def test_repeated_train_needs_resume(base: Path, work: Path) -> None:
    command = ["train", "--base", base, "--data", work / "sums.json", "--out", work / "one", *QUICK]
    result = run(*command)
    assert result.exit_code == 1
    assert "contains a training" in result.stderr
    assert "--resume" in result.stderr
    assert run(*command, "--resume").exit_code == 0


def test_trainings_get_disjoint_columns(work: Path) -> None:
    intervals = [Adapter.load(work / "adapters" / f"{name}.safetensors").spec.intervals for name in ("one", "two")]
    assert intervals == [(Interval(0, 4),), (Interval(4, 4),)]
    ledger = CliRunner().invoke(app, ["ledger"])
    assert "one" in ledger.stdout
    assert "4:8" in ledger.stdout


def test_concept_of_the_library_is_not_overwritten(base: Path, work: Path) -> None:
    result = run("train", "--base", base, "--data", work / "sums.json", "--out", work / "elsewhere" / "one", *QUICK)
    assert result.exit_code == 1
    assert "adapters/one.safetensors exists" in result.stderr
    taken = run("train", "--base", base, "--data", work / "sums.json", "--out", "new", "--interval", "2:6", *QUICK)
    assert "the interval 2:6 is taken (0:4 by one, 4:8 by two)" in taken.stderr


def test_eval_combines_seeds_in_one_row(base: Path, work: Path) -> None:
    command = ["eval", "--base", base, "--tasks", "adapters_boolq,qlora_mmlu", "--data", work / "tasks", "--limit", 1]
    command += ["--adapter", work / "one", "--adapter", work / "two", "--adapter", work / "lora"]
    result = run(*command, "--out", work / "scores.json", "--set", "batch_size=2")
    assert result.exit_code == 0, result.output
    head, _, sbora, lora = result.stdout.strip().split("\n")
    assert head == "| model | parameters | seeds | boolq | qlora_mmlu | mean | no answer found |"
    assert sbora.startswith("| SBoRA-FA r=4 | 2,304 | 2 |")
    assert lora.startswith("| LoRA r=4 | 4,352 | 1 |")
    results = json.loads((work / "scores.json").read_text())
    assert [model["label"] for model in results["models"]] == ["SBoRA-FA r=4", "SBoRA-FA r=4", "LoRA r=4"]
    assert results["models"][0]["tasks"]["adapters_boolq"]["failure_rate"] == 1.0
    again = run(*command, "--out", work / "scores.json")
    assert "--force" in again.stderr
    twice = run(*command, "--adapter", work / "one" / "adapter")
    assert (twice.exit_code, "one/adapter are one adapter" in twice.stderr.replace("\n", "")) == (1, True)


def test_eval_keeps_results_if_a_later_model_fails(base: Path, work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = ["eval", "--base", base, "--tasks", "adapters_boolq", "--data", work / "tasks", "--limit", 1]
    command += ["--adapter", work / "one", "--adapter", work / "lora", "--out", work / "kept.json"]
    loaded = llm_accuracy.load_adapter

    def fail_of_lora(model: Any, source: str, name: str) -> Any:
        if source.endswith("lora"):
            raise SboraError("no more")
        return loaded(model, source, name)

    monkeypatch.setattr(llm_accuracy, "load_adapter", fail_of_lora)
    result = run(*command)
    assert (result.exit_code, "no more" in result.stderr) == (1, True)
    assert "| SBoRA-FA r=4 |" in result.stdout
    assert [model["label"] for model in json.loads((work / "kept.json").read_text())["models"]] == ["SBoRA-FA r=4"]


def test_eval_of_the_base_model(base: Path, work: Path, capfd: pytest.CaptureFixture[str]) -> None:
    result = run("eval", "--base", base, "--tasks", "adapters_boolq", "--data", work / "tasks", "--limit", 1)
    assert "| base |  | 1 | 0.0% [0.0%, 0.0%] | 0.0% | 100.0% |" in result.stdout
    assert "git" not in capfd.readouterr().err, "no complaint that this folder is not a repository"


def _no_space(descriptor: int) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(descriptor))


def test_merge_and_export(work: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    merged = run("merge", work / "one", work / "two", "--out", work / "both.safetensors")
    assert merged.exit_code == 0, merged.output
    assert merged.stdout.strip() == str(work / "both.safetensors")
    assert "written by at most one" in caplog.text
    assert [str(i) for i in Adapter.load(work / "both.safetensors").spec.intervals] == ["0:4", "4:8"]
    for kind in ("peft", "model"):
        result = run("export", work / "both.safetensors", "--to", kind, "--out", work / kind)
        assert result.exit_code == 0, result.output
    with monkeypatch.context() as patch:
        patch.setattr("sbora_diffusion.utils.files.os.fsync", _no_space)
        failed = run("export", work / "both.safetensors", "--to", "peft", "--out", work / "full")
    assert "cannot write" in failed.stderr
    assert "No space left" in failed.stderr
    assert not [path for path in work.iterdir() if "full" in path.name], (
        "no partial folder that the next attempt would find"
    )
    assert (work / "peft" / "adapter_config.json").is_file()
    assert (work / "model" / "model.safetensors").is_file()
    assert "has no concept file" in run("merge", work / "lora", work / "one").stderr


def test_chat_answers_and_switches(base: Path, work: Path, caplog: pytest.LogCaptureFixture) -> None:
    lines = "hello\n/adapter lora\n/adapter nobody\n/adapters\n/quit\n"
    command = ["chat", "--base", base, "--adapter", work / "one", "--adapter", work / "lora", "--max-tokens", 4]
    result = run(*command, stdin=lines)
    assert result.exit_code == 0, result.output
    assert "now: lora" in result.stderr
    assert "error: no adapter 'nobody', choose from one, lora, none" in result.stderr
    assert result.stdout.strip()
    assert "other weights" not in caplog.text


def test_chat_uses_the_template_of_the_training(base: Path, work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = {}
    monkeypatch.setattr(llm_chat, "Chat", lambda *given: seen.update(given[-1]) or Chat(*given))
    for name in ("v1.5", "two"):
        shutil.copytree(work / "one", work / "copies" / name)
    words = [word for name in ("v1.5", "two") for word in ("--adapter", work / "copies" / name)]
    result = run("chat", "--base", base, *words, stdin="/quit\n")
    assert result.exit_code == 0, result.output
    assert seen == {"v1.5": "alpaca", "two": "alpaca"}


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (["train", "--base", "BASE"], 2, "--data"),
        (["train", "--base", "BASE", "--data", "/no.json"], 1, "is not a file"),
        (["train", "--base", "/no/such", "--data", "DATA"], 1, "cannot load /no/such"),
        (
            ["train", "--base", "BASE", "--data", "DATA", "--method", "poem"],
            1,
            "unknown method 'poem', choose from lora, dora, sbora-fa, sbora-fb",
        ),
        (["train", "--base", "BASE", "--data", "DATA", "--recipe", "cake"], 1, "unknown recipe 'cake'"),
        (["train", "--base", "BASE", "--data", "DATA", "--quantize", "q2"], 1, "choose from none, nf4"),
        (["train", "--base", "BASE", "--data", "DATA", "--set", "cutoff=3"], 1, "longer than cutoff=3"),
        (["train", "--base", "BASE", "--data", "DATA", "--set", "targets=nose"], 1, "the targets nose do not fit"),
        (["train", "--base", "BASE", "--data", "DATA", "--interval", "31:47"], 1, "31:47 does not fit: the narrowest"),
        (["train", "--base", "BASE", "--data", "DATA", "--interval", "0:8"], 1, "8 positions, rank 16 needs 16"),
        (["train", "--base", "BASE", "--data", "DATA", "--interval", "8"], 1, "expected start:stop such as 8:16"),
        (["train", "--base", "BASE", "--data", "DATA", "--interval", "0:16", "--method", "lora"], 1, "owns no columns"),
        (["eval", "--base", "BASE", "--tasks", "adapters_x"], 1, "unknown tasks adapters_x"),
        (["eval", "--base", "BASE", "--tasks", "adapters_boolq"], 1, "with --data DIR"),
        (["eval", "--base", "BASE", "--tasks", "adapters_boolq", "--set", "speed=9"], 1, "unknown setting 'speed'"),
        (["eval", "--base", "BASE", "--tasks", ","], 1, "got no task"),
        (
            ["eval", "--base", "/no/such", "--tasks", "adapters_boolq", "--out", "/dev/null/x"],
            1,
            "cannot write /dev/null",
        ),
        (["eval", "--base", "/no/such", "--tasks", "adapters_boolq", "--out", ".", "--force"], 1, "it is a folder"),
        (["export", "/no/such", "--to", "peft", "--out", "x"], 1, "is not a run folder"),
        (["merge", "/no/such"], 1, "is not a run folder"),
        (["chat", "--base", "/no/such"], 1, "cannot load /no/such"),
    ],
)
def test_mistakes_are_one_line_errors(
    words: list[str], status: int, message: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    known = {"BASE": str(base), "DATA": str(save_data(tmp_path / "sums.json"))}
    result = run(*(known.get(word, word) for word in words))
    assert result.exit_code == status, result.output
    assert message in result.stderr
    assert "Traceback" not in result.output
