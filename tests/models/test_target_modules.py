"""Adapters in some blocks only: which layers train, and no gradient where nothing can change, against `no_grad`."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sbora_diffusion.adapters.basis import Interval
from sbora_diffusion.adapters.file import Adapter
from sbora_diffusion.adapters.merge import merge
from sbora_diffusion.data.batches import prepare_data
from sbora_diffusion.data.concept import Concept
from sbora_diffusion.methods.live import blocks_before, injected_concept
from sbora_diffusion.methods.registry import configure
from sbora_diffusion.models.base import Base, load_base
from sbora_diffusion.recipes.config import TrainConfig
from sbora_diffusion.training.trainer import Trainer
from sbora_diffusion.utils.errors import SboraError

from ..helpers import short_config, train, train_until
from ..tiny_sdxl import save_tiny_sdxl
from ..tiny_transformers import save_tiny_sd3
from ..training.test_train import assert_same, snapshot

UP = {"blocks": "up_blocks"}


@pytest.fixture
def emoji64() -> Base:
    return load_base("emoji64")


def recipe(**settings: str) -> TrainConfig:
    return configure("emoji64", "sbora-fa", settings)


def test_layers_by_the_beginnings_of_their_names(emoji64: Base) -> None:
    unet = {key.partition(".")[2] for key in emoji64.layers if key.startswith("unet.")}
    for blocks in ("up_blocks", "mid_block;up_blocks", "up_blocks.1", "up_blocks.1.attentions.0"):
        wanted = {name for name in unet if any(name.startswith(f"{block}.") for block in blocks.split(";"))}
        assert set(emoji64.adapted_layers(blocks.split(";"))["unet"]) == wanted
    assert set(emoji64.adapted_layers()["unet"]) == unet
    assert set(emoji64.adapted_layers(["up_blocks"], text_encoders=False)) == {"unet"}


def test_a_block_that_is_not_there_is_told(emoji64: Base) -> None:
    with pytest.raises(SboraError) as caught:
        emoji64.adapted_layers(["up_blocks", "up"])
    assert str(caught.value).startswith("got blocks=up,")
    assert "down_blocks, mid_block, up_blocks" in str(caught.value.hint)
    with pytest.raises(SboraError, match="adapts none"):
        short_config("textual-inversion", **UP)


def test_blocks_before_the_first_adapted_one(emoji64: Base, tmp_path: Path) -> None:
    down = ["down_blocks.0", "down_blocks.1", "down_blocks.2"]
    expected = {
        "": [],
        "down_blocks": down[:1],  # which has no attention
        "mid_block": down,
        "up_blocks": [*down, "mid_block"],
        "up_blocks.1": [*down, "mid_block", "up_blocks.0"],
    }
    for blocks, before in expected.items():
        assert blocks_before(emoji64, [blocks] if blocks else []) == before
    sd3 = load_base(str(save_tiny_sd3(tmp_path / "sd3")))  # whose blocks hand the text on to each other
    assert blocks_before(sd3, ["transformer_blocks.1"]) == []


@contextmanager
def without_gradients(base: Base, blocks: list[str]) -> Iterator[None]:
    """An independent way to the same."""
    modules = [base.denoiser.get_submodule(name) for name in blocks]
    try:
        for module in modules:
            module.forward = torch.no_grad()(module.forward)
        yield
    finally:
        for module in modules:
            del module.forward


def one_step(base: Base, concept: Concept, config: TrainConfig) -> dict[str, Tensor]:
    """What is trained, after one step."""
    data = prepare_data(concept, base, config)
    with injected_concept(concept, base, Interval(0, 4), config) as live:
        Trainer(live, data, config, base).train_step(0)
        factors, _, tokens = live.learned()
    return {key: factor.weight for key, factor in factors.items()} | tokens


@pytest.mark.parametrize(("kind", "layerwise"), [("sd", "0"), ("sd", "1"), ("sdxl", "0")])
def test_what_is_learned_is_what_no_grad_below_gives(
    base: Base, concept: Concept, tmp_path: Path, kind: str, layerwise: str
) -> None:
    if kind == "sdxl":
        base = load_base(str(save_tiny_sdxl(tmp_path / kind)))
    settings = {"layerwise_tokens": layerwise, "output_penalty": "0", "steps": "1", "warmup_steps": "0"}
    found = one_step(base, concept, short_config(**settings, **UP))
    everywhere = short_config(**settings)
    with without_gradients(base, blocks_before(base, ["up_blocks"])):
        expected = one_step(base, concept, everywhere)
    assert any(key.startswith("unet.up_blocks") for key in found)
    assert all(torch.equal(value, expected[key]) for key, value in found.items())
    assert not any(value.any() for key, value in expected.items() if key not in found)  # untouched: still zero
    plain = one_step(base, concept, everywhere)
    assert not torch.equal(plain["text_encoder"], found["text_encoder"])  # the token learns from all blocks there


@pytest.mark.parametrize("method", ["sbora-fa", "sbora-fb", "lora", "custom-diffusion"])
def test_trained_resumed_and_merged(base: Base, concept: Concept, tmp_path: Path, method: str) -> None:
    before, config = snapshot(base), short_config(method, **UP)
    interval = Interval(0, 4) if method.startswith("sbora") else None
    straight = train(concept, base, interval, config, tmp_path / "straight").adapter
    train_until(2, concept, base, interval, config, tmp_path / "run")
    resumed = train(concept, base, interval, config, tmp_path / "run", resume=True).adapter
    assert_same(resumed, straight)
    after = snapshot(base)
    assert all(torch.equal(before[key], after[key]) for key in before)
    names = straight.factors.keys() | straight.dense.keys()
    assert {name.split(".")[1] for name in names if name.startswith("unet.")} == {"up_blocks"}
    straight.save(tmp_path / "rex.safetensors")
    assert_same(Adapter.load(tmp_path / "rex.safetensors"), straight)


def test_merged_with_a_concept_that_is_everywhere(base: Base, concept: Concept, tmp_path: Path) -> None:
    """Each layer of the sum holds what its owners have there."""
    parts = [
        train(concept, base, Interval(start, 4), short_config(blocks=blocks), tmp_path / str(start)).adapter
        for start, blocks in ((0, "up_blocks"), (4, ""))
    ]
    whole = merge(parts, [1.0, 1.0], "sum")
    assert whole.factors.keys() == parts[1].factors.keys() > parts[0].factors.keys()
    for key, factor in whole.factors.items():
        assert len(factor.index) == 4 * sum(key in part.factors for part in parts)
