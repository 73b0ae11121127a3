"""Frozen weights in shares, one a process, learn what whole ones learn; base models are read as they are stored."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sbora_diffusion.adapters.file import Adapter
from sbora_diffusion.models.base import load_base
from sbora_diffusion.models.loading import load_pipeline, stored_in

from ..tiny_sdxl import save_tiny_sdxl
from ..tiny_transformers import save_tiny_flux
from .test_distributed import torchrun

WORKER = """
import os, sys, torch
from pathlib import Path
from torch import distributed
from typer.testing import CliRunner
from sbora_diffusion.cli.app import app
from sbora_diffusion.data import batches
from sbora_diffusion.training import run as run_module, train
from sbora_diffusion.adapters.linear_function import num_held

def run(folder, *words):
    Path(folder).mkdir(exist_ok=True)
    os.chdir(folder)
    done = CliRunner().invoke(app, ["train", "--concept", "dog", *words])
    os.chdir("..")
    return done

def watching(*args, **kwargs):
    base = plain(*args, **kwargs)
    if base.family.name == "flux":
        base.pipeline.default_sample_size = 8
    models = {name: base.component(name) for name in watched if hasattr(base.pipeline, name)}
    shares.append({name: count(model, num_held) / count(model, torch.numel) for name, model in models.items()})
    return base

def count(model, of_weight):
    return sum(map(of_weight, model.parameters()))

def stopping(device):
    global steps
    steps += 1
    if steps == 3:
        raise KeyboardInterrupt
    return memory_bytes(device)

distributed.init_process_group()
batches.PRIOR_SIZE = 8
watched, shares = ("transformer", "unet", "text_encoder", "text_encoder_2", "vae"), []
plain, train.load_base = train.load_base, watching
settings = ["steps=4", "save_every=2", "sampling_steps=1", "crops=1", "preview_every=2", "preview_prompts={token}",
            "prior_prompts=a cat", "batch_size=2", "prior_batch=1", "precision=fp32"]
settings = [word for setting in settings for word in ("--set", setting)]
for name, *more in (
    ("flux", "--set", "shuffle_tags=1"),
    ("sdxl", "--method", "mix-of-show", "--set", "gradient_checkpointing=1"),
):
    words = ["--base", sys.argv[1] + "/" + name, *settings, *more]
    for sharded in ("false", "true"):
        os.environ["ACCELERATE_USE_FSDP"] = sharded
        done = run(name + "-" + sharded, *words)
        assert done.exit_code == 0, done.output
flux_whole, flux, sdxl_whole, sdxl = shares
assert set(flux_whole.values()) == set(sdxl_whole.values()) == {1}
assert {name for name, share in flux.items() if share < 0.6} == {"transformer", "text_encoder_2"}, flux
assert {name for name, share in sdxl.items() if share < 0.6} == {"unet"}, sdxl

words = ["--base", sys.argv[1] + "/flux", *settings, "--set", "shuffle_tags=1"]
steps, memory_bytes, run_module.memory_bytes = 0, run_module.memory_bytes, stopping
assert run("stopped", *words).exit_code == 130
assert run("stopped", *words, "--resume").exit_code == 0

for method in ("dora", "custom-diffusion"):
    refused = run("refused", "--base", sys.argv[1] + "/sdxl", "--method", method, *settings)
    assert (refused.exit_code, "reads whole weights" in refused.stderr) == (1, True), refused.output
distributed.destroy_process_group()
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trainings of two processes, with whole and with sharded weights, and a sharded one that was resumed."""
    folder = tmp_path_factory.mktemp("sharded")
    save_tiny_flux(folder / "flux")
    save_tiny_sdxl(folder / "sdxl")
    done = torchrun(folder, WORKER, [str(folder)])
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("name", ["flux", "sdxl"])
def test_shares_learn_what_whole_weights_learn(trained: Path, name: str) -> None:
    """Up to rounding: whole weights are trained directly, shares by the fused kernel."""
    whole, shares = (Adapter.load(trained / f"{name}-{said}/adapters/dog.safetensors") for said in ("false", "true"))
    assert shares.spec.metrics["loss"] == pytest.approx(whole.spec.metrics["loss"], rel=1e-5)
    assert (shares.factors.keys(), shares.dense.keys()) == (whole.factors.keys(), whole.dense.keys())
    weights = [(shares.factors[key].weight, factor.weight) for key, factor in whole.factors.items()]
    weights += [(shares.dense[key].up, dense.up) for key, dense in whole.dense.items()]
    assert weights
    for found, expected in weights:
        scale = expected.abs().max().item()  # Adam divides small gradients' rounding by themselves
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3 * scale)


def test_previews_are_drawn_by_all_and_written_once(trained: Path) -> None:
    assert {path.name for path in (trained / "flux-true/runs/dog").glob("*.png")} == {
        "preview-000002.png",
        "before-after.png",
    }


def test_stopped_and_resumed_bit_for_bit(trained: Path) -> None:
    straight, stopped = (trained / name / "adapters/dog.safetensors" for name in ("flux-true", "stopped"))
    assert stopped.read_bytes() == straight.read_bytes()


def test_what_is_stored_in_half_precision_is_read_in_it(tmp_path: Path) -> None:
    """The same base model as by way of fp32, without ever holding it so."""
    folder = save_tiny_flux(tmp_path / "flux")
    for part in ("transformer", "text_encoder_2", "vae"):
        (path,) = (folder / part).glob("*.safetensors")
        save_file({key: value.bfloat16() for key, value in load_file(path).items()}, path, {"format": "pt"})
    assert stored_in(folder, torch.bfloat16) == ["text_encoder_2", "transformer", "vae"]
    assert stored_in(folder, torch.float32) == ["text_encoder"]
    pipeline = load_pipeline(str(folder), torch.bfloat16)
    types = {name: getattr(pipeline, name).dtype for name in ("transformer", "text_encoder", "text_encoder_2", "vae")}
    half, full = torch.bfloat16, torch.float32
    assert types == {"transformer": half, "text_encoder": full, "text_encoder_2": half, "vae": full}
    base, whole = load_base(str(folder), "bf16"), load_base(str(folder))
    assert base.fingerprint == whole.fingerprint
    weights = whole.denoiser.state_dict()
    assert all(torch.equal(weight, weights[key].bfloat16()) for key, weight in base.denoiser.state_dict().items())


def test_a_mixture_is_read_in_fp32(tmp_path: Path) -> None:
    (tmp_path / "transformer").mkdir()
    tensors = {"half": torch.zeros(2, dtype=torch.float16), "whole": torch.zeros(2)}
    save_file(tensors, tmp_path / "transformer" / "model.safetensors")
    assert stored_in(tmp_path, torch.float16) == []
