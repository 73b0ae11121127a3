"""Several processes learn what one learns from the whole batch; the first alone writes, a stop loses nothing."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from sbora_diffusion.adapters.file import Adapter
from sbora_diffusion.cli.app import app
from sbora_diffusion.data.batches import BatchSampler, Sample, prepare_data
from sbora_diffusion.data.concept import Concept
from sbora_diffusion.library.library import Library
from sbora_diffusion.methods.live import injected_concept
from sbora_diffusion.models import distributed as processes
from sbora_diffusion.models.base import Base
from sbora_diffusion.models.distributed import SINGLE_PROCESS, Processes
from sbora_diffusion.training.checkpoint import read_log
from sbora_diffusion.training.trainer import Trainer
from sbora_diffusion.utils.errors import SboraError

from ..helpers import INTERVAL, short_config

WORKER = """
import os, signal, sys
from pathlib import Path
from torch import distributed
from typer.testing import CliRunner
from sbora_diffusion.cli.app import app
from sbora_diffusion.data import batches
from sbora_diffusion.training import run as run_module

def run(*more, folder):
    Path(folder).mkdir(exist_ok=True)
    os.chdir(folder)
    done = CliRunner().invoke(app, [*sys.argv[1:], *more])
    os.chdir("..")
    return done

def interrupting(device):
    global steps
    steps += 1
    if steps == 3:
        signal.raise_signal(signal.SIGINT)
    return plain(device)

distributed.init_process_group()
batches.PRIOR_SIZE = 8  # as in this process
is_first = distributed.get_rank() == 0
straight = run(folder="two")
written = ["adapters/dog.safetensors", "runs/dog/before-after.png"]
assert straight.stdout.split() == (written if is_first else []), straight.output
assert ("step 5/5" in straight.stderr) == ("concept <dog>" in straight.stderr) == is_first, straight.stderr

steps, plain, run_module.memory_bytes = 0, run_module.memory_bytes, interrupting
stopped = run(folder="stopped")
assert stopped.exit_code == 130, stopped.output
assert ("resume with: torchrun … -m sbora_diffusion " in stopped.stderr) == is_first, stopped.stderr
resumed = run("--resume", folder="stopped")
assert (resumed.exit_code, resumed.stdout) == (0, straight.stdout), resumed.output
assert "step 1/5" not in resumed.stderr
distributed.destroy_process_group()
"""


def command(base: Path, each: int) -> list[str]:
    settings = ["steps=5", "save_every=2", "sampling_steps=1", "crops=1", "preview_every=0", "preview_prompts={token}"]
    settings += ["prior_prompts=a cat", f"batch_size={2 * each}", f"prior_batch={each}"]
    words = ["train", "--concept", "dog", "--base", str(base)]
    return words + [word for setting in settings for word in ("--set", setting)]


def torchrun(folder: Path, worker: str, words: list[str]) -> subprocess.CompletedProcess[str]:
    """Run a program in two processes on the CPU, in a folder."""
    (folder / "worker.py").write_text(worker)
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "worker.py"]
    path = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [*start, *words], cwd=folder, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path}
    )


@pytest.fixture(scope="module")
def trained(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of the same training: `one` in one process, `two` in two, and `stopped`, which was resumed in two."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "one").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder / "one")
        assert CliRunner().invoke(app, command(tiny_folder, each=2)).exit_code == 0
    done = torchrun(folder, WORKER, command(tiny_folder, each=1))
    assert done.returncode == 0, done.stderr
    return folder


def test_two_processes_are_one_with_the_doubled_batch(trained: Path) -> None:
    one, two = (Adapter.load(trained / name / "adapters/dog.safetensors") for name in ("one", "two"))
    assert two.spec.metrics["loss"] == pytest.approx(one.spec.metrics["loss"], rel=1e-5)
    for key, factor in one.factors.items():
        assert torch.equal(factor.index, two.factors[key].index)
        scale = factor.weight.abs().max().item()  # Adam divides small gradients' rounding by themselves
        torch.testing.assert_close(two.factors[key].weight, factor.weight, rtol=1e-3, atol=1e-3 * scale)
    assert two.tokens.keys() == one.tokens.keys()
    for key, rows in one.tokens.items():
        torch.testing.assert_close(two.tokens[key], rows, rtol=1e-4, atol=1e-6)


def test_stopped_and_resumed_together_bit_for_bit(trained: Path) -> None:
    two, stopped = (trained / name / "adapters/dog.safetensors" for name in ("two", "stopped"))
    assert stopped.read_bytes() == two.read_bytes()
    assert [entry["step"] for entry in read_log(trained / "stopped/runs/dog")] == [1, 2, 3, 4, 5]
    assert not (trained / "stopped/runs/dog/checkpoint.pt").exists()


def test_the_first_alone_has_columns(trained: Path) -> None:
    """Nothing is reserved any more, and nothing was reserved twice."""
    (ledger,) = Library(trained / "two/adapters").ledgers()
    assert [(owner.name, owner.state, str(owner.interval)) for owner in ledger.owners] == [("dog", "trained", "0:8")]


@pytest.mark.parametrize("settings", [{}, {"buckets": "1", "masked_loss": "1", "noise_offset": "0.1"}])
def test_the_shares_are_what_one_process_draws(base: Base, tall: Concept, settings: dict[str, str]) -> None:
    more = {"shuffle_tags": "1", "caption_dropout": "0.4", "min_snr_gamma": "5", "class_images": "2", "flip": "0.5"}
    config = short_config(batch_size="2", prior_batch="1", **more, **settings)
    whole = config.with_settings(batch_size=6, prior_batch=3)
    data = prepare_data(tall, base, config)
    for seed in range(3):
        expected = drawn(BatchSampler(data, base, whole, SINGLE_PROCESS), seed)
        parts = [drawn(BatchSampler(data, base, config, Processes(index, 3)), seed) for index in range(3)]
        for one, shares in zip(expected, zip(*parts, strict=True), strict=True):
            assert torch.equal(torch.cat(shares), one)


def drawn(samples: BatchSampler, seed: int) -> list[torch.Tensor]:
    """Everything that is in the batches of a step."""
    generator = torch.Generator().manual_seed(seed)
    batches = samples.concept_batch(generator), samples.prior_batch(generator), samples.class_batch(generator)
    assert isinstance(batches[2], Sample)
    return [part for batch in batches if batch for part in vars(batch).values() if part is not None]


AVERAGED = """
import torch
from torch import distributed
from sbora_diffusion.models.distributed import Processes

distributed.init_process_group("gloo")
rank = distributed.get_rank()
trained = [torch.nn.Parameter(torch.zeros(shape)) for shape in ((2, 2), (3,), (1,))]
trained[0].grad = torch.full((2, 2), rank + 1.0)
trained[1].grad = torch.full((3,), 5.0) if rank else None  # the token, where this share's captions are all dropped
assert Processes(rank, 2).average(trained, rank * 4.0) == 2
assert torch.equal(trained[0].grad, torch.full((2, 2), 1.5))
assert torch.equal(trained[1].grad, torch.full((3,), 2.5))
assert trained[2].grad is None
assert Processes(rank, 2).average([trained[2]], 3.0) == 3
distributed.destroy_process_group()
"""


def test_gradients_that_not_all_processes_have(tmp_path: Path) -> None:
    done = torchrun(tmp_path, AVERAGED, [])
    assert done.returncode == 0, done.stderr


def test_no_prior_samples_to_share() -> None:
    assert Processes(1, 2).share(torch.empty(0, 3)).shape == (0, 3)


@pytest.mark.parametrize("setting", [{"attention_weight": "0.1"}, {"erasure_weight": "1", "prior_batch": "1"}])
def test_what_looks_at_whole_batches_is_refused(base: Base, tall: Concept, setting: dict[str, str]) -> None:
    config = short_config(**setting)
    data = prepare_data(tall, base, config)
    with (
        injected_concept(tall, base, INTERVAL, config) as live,
        pytest.raises(SboraError, match="erasure_weight and attention_weight need whole batches"),
    ):
        Trainer(live, data, config, base, Processes(0, 2))


@pytest.mark.parametrize("asked", ["ACCELERATE_USE_DEEPSPEED", "FSDP_OFFLOAD_PARAMS"])
def test_other_ways_to_shard_are_refused(asked: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv(asked, "true")
    with pytest.raises(SboraError, match=f"got {asked}, but"), processes.joined():
        pass


def test_several_concepts_in_several_processes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    refused = CliRunner().invoke(app, ["train", "--concept", "dog", "--concept", "cat"])
    assert refused.exit_code == 1
    assert "but several concepts given" in refused.stderr
