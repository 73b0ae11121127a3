"""The estimate of memory against what a real pass keeps and a real training trains, and the advice that follows."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sbora_diffusion.adapters.basis import Interval
from sbora_diffusion.data.batches import prepare_data
from sbora_diffusion.data.concept import Concept
from sbora_diffusion.methods.live import injected_concept
from sbora_diffusion.models.base import Base, load_base
from sbora_diffusion.training.memory import Activations, activations, advice, estimate, is_out_of_memory
from sbora_diffusion.training.trainer import Trainer

from ..helpers import short_config, train
from ..tiny_sdxl import save_tiny_sdxl
from ..tiny_transformers import save_tiny_sd3

KEPT = Activations(everything=2 * 2**30, checkpointed=2**29)
NONE = Activations(everything=0, checkpointed=0)


class Held:
    """What autograd holds of a real pass, weights apart."""

    def __init__(self, base: Base) -> None:
        modules = base.family.modules(base.pipeline)
        self._own = {p.untyped_storage().data_ptr() for module in modules for p in module.parameters()}
        self._tensors: dict[int, Tensor] = {}

    def keep(self, tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in self._own:
            self._tensors[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    @property
    def num_bytes(self) -> int:
        return sum(tensor.untyped_storage().nbytes() for tensor in self._tensors.values())


def really_kept(base: Base, count: int) -> int:
    """Bytes that autograd holds after the denoiser's pass of real numbers, weights apart."""
    held = Held(base)
    size, channels = base.family.latent_size(base.pipeline), base.pipeline.vae.config.latent_channels
    noisy = torch.randn(count, channels, size, size, requires_grad=True)
    with torch.no_grad():
        text = base.encode_text(base.tokenize(["a dog"] * count))
    with torch.autograd.graph.saved_tensors_hooks(held.keep, lambda tensor: tensor):
        base.family.predict(base.pipeline, noisy, torch.full((count,), 500.0), text)
    return held.num_bytes


@pytest.fixture(scope="module")
def bases(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Base]:
    folder = tmp_path_factory.mktemp("bases")
    folders = {"sd": tiny_folder, "sdxl": save_tiny_sdxl(folder / "sdxl"), "sd3": save_tiny_sd3(folder / "sd3")}
    return {kind: load_base(str(path)) for kind, path in folders.items()}


@pytest.mark.parametrize("kind", ["sd", "sdxl", "sd3"])
def test_what_is_counted_is_what_is_kept(bases: dict[str, Base], kind: str) -> None:
    base = bases[kind]
    kept = activations(base, short_config())
    assert really_kept(base, 4) == pytest.approx(4 * kept.everything, rel=0.15)
    assert kept.checkpointed < kept.everything


def test_checkpointing_keeps_less_as_told(base: Base) -> None:
    kept, before = activations(base, short_config()), really_kept(base, 4)
    denoiser: Any = base.denoiser
    denoiser.train().enable_gradient_checkpointing()
    try:
        checkpointed = really_kept(base, 4)
    finally:
        denoiser.disable_gradient_checkpointing()
        denoiser.eval()
    assert checkpointed < before
    assert kept.checkpointed < kept.everything


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
@pytest.mark.parametrize(("class_images", "blocks"), [("0", ""), ("2", ""), ("0", "up_blocks")])
def test_a_real_step_keeps_what_is_estimated(
    bases: dict[str, Base], concept: Concept, kind: str, class_images: str, blocks: str
) -> None:
    """Text encoders and class images included, except what PEFT's layers and the losses keep."""
    base = bases[kind]
    settings = {"batch_size": "2", "prior_batch": "1", "sampling_steps": "1", "class_images": class_images}
    config = short_config(**settings, blocks=blocks)
    held, data = Held(base), prepare_data(concept, base, config)
    with injected_concept(concept, base, Interval(0, 4), config) as live:
        run = Trainer(live, data, config, base)
        with torch.autograd.graph.saved_tensors_hooks(held.keep, lambda tensor: tensor):
            run.train_step(0)
    assert held.num_bytes == pytest.approx(estimate(base, config, activations(base, config)).activations, rel=0.15)


@pytest.mark.parametrize("method", ["sbora-fa", "sbora-fb"])
@pytest.mark.parametrize("blocks", ["", "up_blocks"])
def test_what_is_trained(base: Base, concept: Concept, tmp_path: Path, method: str, blocks: str) -> None:
    config = short_config(method, steps="1", blocks=blocks)
    last = train(concept, base, Interval(0, 4), config, tmp_path / "run")
    assert last.adapter is not None
    assert estimate(base, config, KEPT).trained == 16 * last.adapter.num_weights()


def test_estimates_follow_the_settings(base: Base) -> None:
    def bytes_of(**settings: str) -> int:
        return estimate(base, short_config(**settings), KEPT).activations

    assert bytes_of(batch_size="3", prior_batch="1") == 4 * KEPT.everything
    assert bytes_of(batch_size="1", prior_batch="0", precision="bf16") == KEPT.everything // 2
    assert bytes_of(batch_size="2", prior_batch="0", gradient_checkpointing="1") == 2 * KEPT.checkpointed
    assert bytes_of(batch_size="2", prior_batch="1", class_images="3") == 5 * KEPT.everything


def test_advice_names_what_saves_most_first(base: Base) -> None:
    told = advice(base, short_config(batch_size="2", prior_batch="1"), KEPT)
    assert told.split(", ") == [
        "--set gradient_checkpointing=true (saves 4.5 GB)",
        "--set precision=bf16 (saves 3.0 GB)",
        "--set prior_batch=0 (saves 2.0 GB)",
        "--set batch_size=1 (saves 2.0 GB)",
    ]
    half = advice(
        base, short_config(batch_size="1", prior_batch="0", precision="bf16", gradient_checkpointing="1"), NONE
    )
    assert half.startswith("--set precision=nf4 (saves ")
    lean = {"batch_size": "1", "prior_batch": "0", "gradient_checkpointing": "1", "precision": "nf4"}
    assert "smaller base model" in advice(base, short_config(**lean), KEPT)


def test_a_failed_allocation_is_known() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(10**15)
    assert is_out_of_memory(caught.value)
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
