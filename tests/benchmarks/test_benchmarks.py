"""Every benchmark runs end to end at toy size, and measures what it says."""

import json
import os
import re
from contextlib import ExitStack
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bench_common as common
import bench_gather
import bench_generation
import bench_gpu
import bench_layers
import bench_memory
import bench_models as models
import bench_startup
import bench_step
import bench_switch
import bench_threads
import bench_train
import pytest
import torch
import typer
from torch import nn
from typer.testing import CliRunner

BENCHMARKS = {
    "layers": bench_layers,
    "step": bench_step,
    "memory": bench_memory,
    "switch": bench_switch,
    "generation": bench_generation,
    "gpu": bench_gpu,
    "startup": bench_startup,
    "threads": bench_threads,
    "gather": bench_gather,
}
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def threads() -> Any:
    """Benchmarks measure on one thread."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.filterwarnings("ignore:.* has no adapter:UserWarning")
@pytest.mark.parametrize("name", BENCHMARKS)
def test_each_runs_and_records_the_machine(name: str, tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    arguments = (
        ["--tiny", "--out", str(out)]
        + (["--device", "cpu"] if name == "gpu" else [])
        + ([] if name == "memory" else ["--rounds", "1"])
    )
    outcome = CliRunner().invoke(BENCHMARKS[name].app, arguments, catch_exceptions=False)
    assert outcome.exit_code == 0
    assert outcome.stdout.strip().endswith(str(out))
    result = json.loads(out.read_text())
    assert result["benchmark"] == name
    assert result["command"].startswith(f"python benchmarks/bench_{name}.py")
    assert result["versions"]["torch"] == torch.__version__
    assert result["machine"]["threads"] == (os.cpu_count() if name == "threads" else 1)
    assert result["settings"]["tiny"] is True
    assert all(row.get("ms", 0) >= 0 for row in result["rows"])
    assert name == "gather" or {"base", "peft"} & {row["way"] for row in result["rows"]}


def test_train_benchmark_finds_every_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    profiles: list[Any] = []

    def rows_of(stats: Any) -> list[common.Row]:
        profiles.append(stats)
        return original(stats)

    original = bench_train.rows_of
    monkeypatch.setattr(bench_train, "rows_of", rows_of)
    arguments = ["--tiny", "--rounds", "1", "--threads", "1", "--out", str(tmp_path / "out.json")]
    outcome = CliRunner().invoke(bench_train.app, arguments, catch_exceptions=False)
    assert outcome.exit_code == 0
    parts = [row["part"] for row in json.loads((tmp_path / "out.json").read_text())["rows"]]
    plain = [f"the command, {what} of 1" for what in ("median", "least", "most")]
    assert parts == [*plain, *bench_train.PARTS, "everything else", "the whole, under the profiler"]
    calls = {part: calls for part, (calls, _) in bench_train.calls_and_seconds(profiles[0]).items()}
    assert calls.pop("save checkpoints") == 0, "the tiny training ends before the first one"
    assert calls["steps"] == calls["→ backward"] == calls["→ optimiser"] == 2
    assert min(calls.values()) > 0


def test_train_benchmark_adds_up_to_the_whole() -> None:
    codes = [function.__code__ for function in bench_train.PARTS.values()]
    package = str(Path(bench_train.__file__).parents[1])
    places = [(code.co_filename.replace(package, "/elsewhere"), 1, code.co_name) for code in codes]
    profile = SimpleNamespace(total_tt=10.0, stats={place: (1, 1, 0.0, 0.5, {}) for place in places})
    rows = {row["part"]: row for row in bench_train.rows_of(profile)}  # type: ignore[arg-type]
    assert all(rows[part] == {"part": part, "s": 0.5, "%": 5.0} for part in bench_train.PARTS)
    assert rows["everything else"]["s"] == 10 - 0.5 * sum(not part.startswith("→") for part in bench_train.PARTS)
    assert rows["the whole, under the profiler"] == {"part": "the whole, under the profiler", "s": 10.0, "%": 100.0}


def test_a_device_that_is_not_there() -> None:
    with pytest.raises(typer.BadParameter, match="got --device cuda:99"):
        common.prepare("cuda:99")
    outcome = CliRunner().invoke(bench_layers.app, ["--device", "nonsense"])
    assert outcome.exit_code == 2
    assert "nonsense" in outcome.output


def test_rows_are_ratios_of_medians() -> None:
    times = {"base": [0.001, 0.002, 0.009], "peft": [0.004, 0.004, 0.001], "fa": [0.003, 0.001, 0.03]}
    rows = common.compared(times, rank=8)
    assert rows[2] == {"rank": 8, "way": "fa", "ms": 3.0, "of peft": 0.75, "of base": 1.5}
    assert "of base" not in common.compared({"peft": [1.0]})[0]


def test_ways_take_turns_and_the_first_round_does_not_count() -> None:
    calls: list[str] = []
    times = common.take_turns({way: lambda way=way: calls.append(way) for way in "ab"}, 2, CPU, at_least=0)
    assert calls == ["a", "b"] * 3
    assert {way: len(turns) for way, turns in times.items()} == {"a": 2, "b": 2}


def test_short_variant_is_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    ticks = count()
    monkeypatch.setattr(common, "seconds", lambda _: next(ticks))
    times = common.take_turns({"a": lambda: calls.append(0)}, 1, CPU, at_least=3)
    assert len(calls) == 2 * 3  # a round that does not count, and one that does
    assert times == {"a": [4 / 3]}  # the clock is read before, after each call, and at the end


def test_the_stack_has_the_layers_of_sd15() -> None:
    with torch.device("meta"):
        stack = models.AttentionStack(models.SD15_BLOCKS)
    layers = [module for module in stack.modules() if isinstance(module, nn.Linear)]
    assert len(layers) == 128
    assert 4 * sum(layer.out_features for layer in layers) == 399_360  # parameters of SBoRA-FA at rank 4
    assert 4 * sum(layer.in_features for layer in layers) == 397_824  # and of SBoRA-FB
    unet = [
        tuple(module.weight.shape)
        for name, module in _meta_unet().named_modules()
        if isinstance(module, nn.Linear) and name.endswith(models.TARGETS)
    ]
    assert sorted(unet) == sorted(tuple(layer.weight.shape) for layer in layers)


def _meta_unet() -> nn.Module:
    with torch.device("meta"):
        return models.sd15_unet()


def test_copies_share_the_base_weights_and_train_only_their_own() -> None:
    base = models.AttentionStack([(32, 16, 1)])
    with ExitStack() as stack:
        copies = {way: models.adapted(base, way, 2, models.TARGETS, stack) for way in models.WAYS}
        for way, copied in copies.items():
            shared = {id(p) for p in base.parameters()} & {id(p) for p in copied.parameters()}
            assert len(shared) == len(list(base.parameters()))
            assert sum(p.numel() for p in models.trained(copied)) == {
                "base": 0,
                "peft": 2 * sum(sum(p.shape) for p in base.parameters() if p.ndim == 2),
            }.get(way, 2 * sum(p.shape[0 if way.startswith("fa") else 1] for p in base.parameters() if p.ndim == 2))


def test_fa_saves_fewer_activations_than_lora() -> None:
    saved = {way: bench_memory.saved_activations(way, 8, True) for way in ("base", "peft", "fa", "fa direct")}
    assert saved["base"] < saved["fa"] < saved["peft"]
    assert saved["fa direct"] == saved["fa"]


def test_the_documented_commands_exist() -> None:
    folder = common.RESULTS.parent
    for script in folder.glob("bench_*.py"):
        commands = re.findall(r"^    python (benchmarks/\S+\.py)", script.read_text(), re.MULTILINE)
        assert commands == ([] if script.stem in ("bench_common", "bench_models") else [f"benchmarks/{script.name}"])
