"""Training: what is learned, bitwise identical resume, several processes, errors."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from bitsandbytes.nn.modules import Linear4bit
from filelock import FileLock
from peft import PeftModel
from safetensors.torch import load_file

from sbora_diffusion.adapters.basis import Interval
from sbora_diffusion.adapters.file import Adapter
from sbora_diffusion.llm.adapters import export, load_adapter
from sbora_diffusion.llm.base import load_base
from sbora_diffusion.llm.config import METHODS, LlmConfig
from sbora_diffusion.llm.run_folder import Run, Trained
from sbora_diffusion.llm.train import train as train_or_none
from sbora_diffusion.utils.errors import SboraError
from sbora_diffusion.utils.files import full_disk_reported

from .tiny import save_data, save_gguf

SMALL = {"rank": "4", "alpha": "8", "steps": "4", "batch_size": "4", "save_every": "2", "dtype": "float32"}
SMALL |= {"warmup_steps": "0", "validation": "0", "cutoff": "512", "learning_rate": "0.01"}


def train(run: Run, config: LlmConfig, folder: Path, resume: bool = False) -> Trained:
    trained = train_or_none(run, config, folder, resume)
    assert trained is not None
    return trained


def small(**overrides: str) -> LlmConfig:
    return LlmConfig.from_recipe("commonsense", SMALL | overrides)


def assert_same(one: Path, other: Path) -> None:
    """Check that two PEFT directories hold the same weights, bit for bit."""
    weights, expected = (load_file(folder / "adapter_model.safetensors") for folder in (one, other))
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def losses_of(folder: Path) -> list[float]:
    return [entry["loss"] for entry in json.loads((folder / "losses.json").read_text())]


@pytest.mark.parametrize("quantize", ["none", "nf4"])
@pytest.mark.parametrize("method", METHODS)
def test_learns_and_plain_peft_loads_it(method: str, quantize: str, base: str, data: Path, tmp_path: Path) -> None:
    run = Run(base=base, data=data, method=method, quantize=quantize)
    adapter = train(run, small(steps="8"), tmp_path).adapter
    losses = losses_of(tmp_path)
    assert losses[-1] < losses[0]
    model, _ = load_base(base, quantize=quantize)
    inputs = torch.arange(3, 20)[None]
    before = model(inputs).logits
    after = PeftModel.from_pretrained(model, str(adapter))(inputs).logits
    assert not torch.equal(before, after)
    if method.startswith("sbora"):
        frozen = "lora_A" if method == "sbora-fa" else "lora_B"
        for name, factor in load_file(adapter / "adapter_model.safetensors").items():
            if frozen in name:
                assert sorted(factor.flatten().unique().tolist()) == [0.0, 1.0]
                assert factor.sum() == 4


@pytest.mark.parametrize(
    ("method", "dropout", "sampling"),
    [
        *((method, "0.05", "random") for method in METHODS),
        ("sbora-fa", "0.0", "random"),
        ("sbora-fa", "0.05", "group_by_length"),
    ],
)
def test_resume_is_bitwise_identical(method: str, dropout: str, sampling: str, base: str, tmp_path: Path) -> None:
    """Two epochs of three steps; the second one is interrupted after its first step."""
    records = [{"instruction": "x" * (7 * n % 23), "output": "y" * (5 * n % 13)} for n in range(12)]
    data = tmp_path / "records.json"
    data.write_text(json.dumps(records))
    run = Run(base=base, data=data, method=method, quantize="none")
    config = small(dropout=dropout, sampling=sampling, steps="6")
    whole, interrupted = train(run, config, tmp_path / "whole").adapter, tmp_path / "parts"
    shutil.copytree(tmp_path / "whole", interrupted)
    for name in ("checkpoint-6", "adapter"):
        shutil.rmtree(interrupted / name)
    again = train(run, config, interrupted, resume=True).adapter
    assert_same(again, whole)


@pytest.fixture(scope="module")
def finished(base: str, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder of SBoRA-FA with the checkpoints of steps 2 and 4."""
    folder = tmp_path_factory.mktemp("finished")
    train(Run(base=base, data=data, method="sbora-fa", quantize="none"), small(), folder)
    return folder


@pytest.mark.parametrize("damaged", ["trainer_state.json", "optimizer.pt", "adapter_model.safetensors"])
def test_damaged_checkpoint_is_skipped(
    damaged: str, base: str, data: Path, finished: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / finished.name
    shutil.copytree(finished, folder)
    path = folder / "checkpoint-4" / damaged
    path.write_bytes(path.read_bytes()[:-20])
    run = Run(base=base, data=data, method="sbora-fa", quantize="none")
    assert_same(train(run, small(), folder, resume=True).adapter, finished / "adapter")
    assert "checkpoint-4 is skipped" in caplog.text


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_full_disk_is_reported(tmp_path: Path) -> None:
    with pytest.raises(SboraError, match="no space left"), full_disk_reported(tmp_path):
        torch.save(torch.zeros(100_000), "/dev/full")
    with pytest.raises(SboraError, match="no space left"), full_disk_reported(tmp_path):
        torch.save(torch.zeros(10), "/dev/full")
    with pytest.raises(RuntimeError, match="another matter"), full_disk_reported(tmp_path):
        raise RuntimeError("another matter")


def test_overwriting_or_resuming_another_training_is_rejected(base: str, data: Path, finished: Path) -> None:
    run = Run(base=base, data=data, method="sbora-fa", quantize="none")
    with pytest.raises(SboraError, match="contains a training"):
        train(run, small(), finished)
    with pytest.raises(SboraError, match="differs in config"):
        train(run, small(steps="6"), finished, resume=True)


def test_resume_with_other_records_or_weights_is_rejected(base: str, tmp_path: Path) -> None:
    data, same = save_data(tmp_path / "records.json"), tmp_path / "base"
    shutil.copytree(base, same)
    run = Run(base=str(same), data=data, method="lora", quantize="none")
    train(run, small(steps="2"), tmp_path / "run")
    model, _ = load_base(base)
    model.lm_head.weight[0] += 1
    model.save_pretrained(same)
    with pytest.raises(SboraError, match="differs in the base model's weights"):
        train(run, small(steps="2"), tmp_path / "run", resume=True)
    save_data(data, 15)
    with pytest.raises(SboraError, match="differs in the content of the data"):
        train(run, small(steps="2"), tmp_path / "run", resume=True)


def test_folder_in_use_is_rejected(base: str, data: Path, tmp_path: Path) -> None:
    with (
        FileLock(tmp_path / ".lock"),
        pytest.raises(SboraError, match="another training is running in"),
    ):
        train(Run(base=base, data=data, method="lora", quantize="none"), small(), tmp_path)


def test_resume_keeps_its_columns(base: str, data: Path, tmp_path: Path) -> None:
    run = Run(base=base, data=data, method="sbora-fa", quantize="none")
    train(replace(run, interval=Interval(8, 4)), small(steps="2"), tmp_path)
    described = json.loads((tmp_path / "run.json").read_text())
    del described["versions"]  # older run folders do not have them
    (tmp_path / "run.json").write_text(json.dumps(described))
    again = train(run, small(steps="2"), tmp_path, resume=True)
    assert again.concept is not None
    assert Adapter.load(again.concept).spec.intervals == (Interval(8, 4),)
    with pytest.raises(SboraError, match="differs in interval"):
        train(replace(run, interval=Interval(4, 4)), small(steps="2"), tmp_path, resume=True)


def test_two_processes_match_one_with_twice_the_batch(base: str, data: Path, tmp_path: Path) -> None:
    overrides = {"dropout": "0.0", "steps": "3"}
    train(Run(base=base, data=data, method="sbora-fa", quantize="none"), small(**overrides), tmp_path / "one")
    settings = SMALL | overrides | {"batch_size": "2"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["--module", "sbora_diffusion", "llm", "train", "--base", base, "--data", str(data)]
    command += ["--recipe", "commonsense", "--out", str(tmp_path / "two")]
    command += [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    path = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        command, check=True, capture_output=True, text=True, cwd=tmp_path, env=os.environ | {"PYTHONPATH": path}
    )
    assert done.stdout.split() == [str(tmp_path / "two" / "adapter"), "adapters/two.safetensors"]
    one, two = (json.loads((tmp_path / name / "losses.json").read_text()) for name in ("one", "two"))
    for single, double in zip(one, two, strict=True):
        assert double["loss"] == pytest.approx(single["loss"], rel=1e-4)
    weights = [load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("one", "two")]
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, rtol=1e-3, atol=1e-3)


def test_missing_model(data: Path, tmp_path: Path) -> None:
    with pytest.raises(SboraError, match="cannot load"):
        train(Run(base="/no/such", data=data, method="lora", quantize="none"), small(), tmp_path)


def test_4_bit_layers_are_not_repacked(base: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Train, load an adapter and generate as on a CPU with AVX512-BF16, where bitsandbytes enables repacking."""
    made = Linear4bit.__init__

    def enable_repacking(self: Linear4bit, *args: object, **kwargs: object) -> None:
        made(self, *args, **kwargs)  # type: ignore[arg-type]
        self.support_avx512bf16_for_cpu = True

    def repack(*_: object) -> None:
        raise AssertionError("a layer was repacked")

    monkeypatch.setattr(Linear4bit, "__init__", enable_repacking)
    monkeypatch.setattr("bitsandbytes.nn.modules._convert_weight_packed_for_cpu", repack)
    run = Run(base=base, data=data, method="lora", quantize="nf4")
    train(run, small(steps="1", validation="2", eval_every="1"), tmp_path)
    model, _ = load_base(base, quantize="nf4")
    layers = [module for module in model.modules() if isinstance(module, Linear4bit)]
    assert len(layers) == 14
    assert not any(layer.support_avx512bf16_for_cpu for layer in layers)
    with torch.inference_mode():
        load_adapter(model, str(tmp_path), "default").eval().generate(torch.arange(3, 9)[None], max_new_tokens=2)


@pytest.mark.parametrize("quantize", ["none", "nf4"])
def test_gradient_checkpointing_gives_the_same_training(quantize: str, base: str, data: Path, tmp_path: Path) -> None:
    run = Run(base=base, data=data, method="sbora-fa", quantize=quantize)
    settings = {"dropout": "0.0", "steps": "2"}
    expected = train(run, small(**settings), tmp_path / "plain").adapter
    got = train(run, small(**settings, gradient_checkpointing="true"), tmp_path / "checkpointed").adapter
    for name, weight in load_file(expected / "adapter_model.safetensors").items():
        torch.testing.assert_close(load_file(got / "adapter_model.safetensors")[name], weight, rtol=1e-4, atol=1e-5)


def test_bfloat16_learns(base: str, data: Path, tmp_path: Path) -> None:
    run = Run(base=base, data=data, method="sbora-fb", quantize="none")
    train(run, small(dtype="bfloat16", steps="8"), tmp_path)
    losses = losses_of(tmp_path)
    assert losses[-1] < losses[0]


@pytest.mark.filterwarnings("ignore:Could not find a config file:UserWarning:peft")  # a GGUF file is its own
@pytest.mark.parametrize("method", ["sbora-fa", "dora"])
def test_gguf_base_is_trained_and_merged(method: str, base: str, data: Path, tmp_path: Path) -> None:
    (tmp_path / "gguf").mkdir()
    gguf = save_gguf(Path(base), tmp_path / "gguf")
    train(Run(base=str(gguf), data=data, method=method, quantize="none"), small(steps="8"), tmp_path / "run")
    losses = losses_of(tmp_path / "run")
    assert losses[-1] < losses[0]
    merged = export(str(tmp_path / "run"), "model", tmp_path / "merged")
    inputs = torch.arange(3, 20)[None]
    expected = load_adapter(load_base(str(gguf))[0], str(tmp_path / "run"), "default").eval()(inputs).logits
    torch.testing.assert_close(load_base(str(merged))[0](inputs).logits, expected, rtol=1e-4, atol=1e-5)


def test_resume_of_a_finished_training_trains_no_further(base: str, data: Path, tmp_path: Path) -> None:
    """Six steps are one and a half epochs: in the middle of an epoch the Trainer alone makes a seventh."""
    run, config = Run(base=base, data=data, method="lora", quantize="none"), small(steps="6", scheduler="constant")
    steps: list[int] = []
    adapter = train(run, config, tmp_path).adapter
    losses = json.loads((tmp_path / "losses.json").read_text())
    adapter.rename(tmp_path / "whole")  # as after a crash just before the adapter is written
    train_or_none(run, config, tmp_path, resume=True, on_step=lambda step, *_: steps.append(step))
    assert_same(adapter, tmp_path / "whole")
    assert json.loads((tmp_path / "losses.json").read_text()) == losses
    assert steps == []


def test_diverging_training_is_stopped(base: str, data: Path, tmp_path: Path) -> None:
    run = Run(base=base, data=data, method="lora", quantize="none")
    with pytest.raises(SboraError, match="the loss is nan at step"):
        train(run, small(learning_rate="1e30", max_grad_norm="1e30"), tmp_path)
