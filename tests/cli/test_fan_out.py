"""Several concepts in one command: columns for all at first, a process each, and going on after a stop."""

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from sbora_diffusion.adapters.file import Adapter
from sbora_diffusion.cli.app import app
from sbora_diffusion.library.library import Library
from sbora_diffusion.methods.registry import configure
from sbora_diffusion.training.fan_out import COMMAND, _again, in_a_process

from ..library.reserving import save_adapter
from ..tiny_pipeline import save_tiny_pipeline

SETTINGS = ("steps=3", "save_every=1", "sampling_steps=1", "crops=1", "preview_every=0", "preview_prompts={token}")
QUICK = [word for setting in (*SETTINGS, "prior_prompts=a cat") for word in ("--set", setting)]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_pipeline(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return Path()


def train(base: Path, *words: str) -> Result:
    return CliRunner().invoke(app, ["train", *words, "--base", str(base), *QUICK])


def test_each_gets_its_own_columns_and_the_rest_is_done_later(
    here: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of three fails at first: the others are done, it keeps its columns, and the same command does the rest."""
    calls: list[str] = []

    def failing(command: list[str], *_: object) -> int:
        calls.append(command[command.index("--concept") + 1])
        if calls == ["dog", "cat"]:
            return 1
        return CliRunner().invoke(app, command[len(COMMAND) - 1 :]).exit_code

    monkeypatch.setattr("sbora_diffusion.training.fan_out.in_a_process", failing)
    three = ("--concept", "dog", "--concept", "cat", "--concept", "penguin")
    first = train(base, *three)
    assert first.exit_code == 1
    assert "1 of 3 trainings failed: cat" in first.stderr
    assert Library(here / "adapters").names() == ["dog", "penguin"]
    assert Adapter.load("adapters/penguin.safetensors").spec.intervals[0].start == 16

    again = train(base, *three)
    assert again.exit_code == 0, again.output
    assert calls == ["dog", "cat", "penguin", "cat"]
    assert again.stdout.split() == [f"adapters/{name}.safetensors" for name in ("dog", "cat", "penguin")]
    adapters = [Adapter.load(path) for path in again.stdout.split()]
    assert [str(adapter.spec.intervals[0]) for adapter in adapters] == ["0:8", "8:16", "16:24"]


def test_two_at_a_time_are_what_each_is_alone(here: Path, base: Path) -> None:
    both = train(base, "--concept", "dog", "--concept", "cat", "--set", "jobs=2")
    assert both.exit_code == 0, both.output
    assert "train --concept cat" in (here / "runs/cat/process.log").read_text()
    among = Adapter.load(here / "adapters/cat.safetensors")
    assert train(base, "--concept", "cat", "--force").exit_code == 0
    alone = Adapter.load(here / "adapters/cat.safetensors")
    assert alone.spec.intervals == among.spec.intervals
    for key, factor in alone.factors.items():
        assert torch.equal(factor.weight, among.factors[key].weight)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--concept", "dog", "--concept", "dog"), "two concepts are called dog"),
        (("--concept", "dog", "--concept", "nosuch"), "nosuch"),
        (("--concept", "dog", "--concept", "cat", "--set", "jobs=0"), "got jobs=0, expected at least 1"),
        (("--concept", "dog", "--concept", "cat", "--set", "rank=20"), "no 20 consecutive positions"),  # the second
        (("--concept", "dog", "--concept", "cat", "--set", "nonsense=1"), "unknown setting 'nonsense'"),
    ],
)
def test_nothing_starts_after_a_mistake(here: Path, base: Path, words: tuple[str, ...], message: str) -> None:
    done = train(base, *words)
    assert done.exit_code == 1
    assert message in done.stderr
    assert not (here / "runs").exists()
    assert Library(here / "adapters").ledgers() == []


@pytest.mark.parametrize("method", ["sbora-fa", "sbora-fb"])
def test_a_refused_fan_out_leaves_finished_concepts(here: Path, base: Path, method: str) -> None:
    """The second does not fit beside the first: the reservation of the first is taken back, its file stays."""
    adapters = here / "adapters"
    for place, name in enumerate(("dog", "cat")):
        save_adapter(Library(adapters), name, f"{4 * place}:{4 * place + 4}", base="other model")
    before = {path.name: path.read_bytes() for path in adapters.glob("*.safetensors")}
    done = train(base, "--concept", "dog", "--concept", "cat", "--method", method, "--set", "rank=20", "--force")
    assert (done.exit_code, "no 20 consecutive positions" in done.stderr) == (1, True)
    assert {path.name: path.read_bytes() for path in adapters.glob("*.safetensors")} == before
    assert all(owner.state == "trained" for ledger in Library(adapters).ledgers() for owner in ledger.owners)


def test_force_goes_on_with_the_same_settings_only(tmp_path: Path) -> None:
    config, other = (configure("emoji64", "sbora-fa", {"steps": steps}) for steps in ("5", "6"))
    assert _again(tmp_path, config, True) == ["--force"]
    (tmp_path / "checkpoint.pt").touch()
    (tmp_path / "run.json").write_text(json.dumps({"config": config.to_dict()}))
    assert _again(tmp_path, config, True) == ["--resume", "--force"]
    assert _again(tmp_path, config, False) == _again(tmp_path, other, False) == ["--resume"]
    assert _again(tmp_path, other, True) == ["--force"]
    (tmp_path / "run.json").write_text("[]")
    assert _again(tmp_path, config, True) == ["--force"]


def test_one_interval_is_not_for_several(base: Path) -> None:
    assert train(base, "--concept", "dog", "--concept", "cat", "--interval", "0:8").exit_code == 2


def test_the_command_is_ours(tmp_path: Path) -> None:
    assert in_a_process([*COMMAND, "--help"], Path("log/help.txt"), tmp_path) == 0
    assert "--concept" in (tmp_path / "log/help.txt").read_text()


def test_on_a_local_ray_cluster(here: Path, base: Path) -> None:
    ray = pytest.importorskip("ray")
    ray.init(num_cpus=2, log_to_driver=False)
    done = train(base, "--concept", "dog", "--concept", "cat", "--set", "cluster=1")
    assert done.exit_code == 0, done.output
    assert Library(here / "adapters").names() == ["cat", "dog"]
    first = (here / "adapters/dog.safetensors").read_bytes()
    assert train(base, "--concept", "dog", "--concept", "cat", "--set", "cluster=1").exit_code == 0
    assert (here / "adapters/dog.safetensors").read_bytes() == first


def test_out_of_memory_ends_in_advice(here: Path, base: Path, caplog: pytest.LogCaptureFixture) -> None:
    done = train(base, "--concept", "dog", "--set", "batch_size=1000000000000")
    assert done.exit_code == 1
    assert "memory: about" in caplog.text
    assert "error: out of memory: this training needs about" in done.stderr
    assert "hint: --set batch_size=1 (saves" in done.stderr
    assert Library(here / "adapters").ledgers() == []
