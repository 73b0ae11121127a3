"""Rows (sbora-fb) and plain LoRA in every family: from training to the image that vanilla diffusers draws."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sbora_diffusion.adapters.basis import Interval
from sbora_diffusion.adapters.file import Adapter
from sbora_diffusion.inference.generate import applied
from sbora_diffusion.interchange.exporting import export
from sbora_diffusion.methods.merging import merge
from sbora_diffusion.methods.registry import configure
from sbora_diffusion.models.base import Base
from sbora_diffusion.utils.errors import SboraError

from ...training.test_train import snapshot
from .conftest import SAVERS, SETTINGS, draw_plain, last_of, make_concept, tiny_base, vanilla
from .test_life import TOLERANCE, load_tokens


@pytest.fixture(scope="module", params=list(SAVERS))
def known(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Base, Path]:
    """A base model, and the pipeline's folder that it was loaded from."""
    folder = tmp_path_factory.mktemp(request.param)
    return tiny_base(request.param, folder), folder / "tiny"


@pytest.mark.parametrize("method", ["sbora-fb", "lora"])
def test_from_training_to_vanilla_diffusers(known: tuple[Base, Path], method: str, tmp_path: Path) -> None:
    base, folder = known
    before = snapshot(base)
    quick = SETTINGS | {"prior_prompts": "", "output_penalty": "0"}
    config = configure(base.family.name, method, quick)
    rex, tom = make_concept(tmp_path, "rex", "red"), make_concept(tmp_path, "tom", "blue")
    places = [Interval(0, 4), Interval(4, 4)] if method == "sbora-fb" else [None, None]
    adapters = [
        last_of(one, base, place, config, tmp_path / one.name) for one, place in zip((rex, tom), places, strict=True)
    ]

    merged = merge(adapters, [1.0, 1.0], "sum", base)
    prompt = "a <rex> <rex>_1 and a <tom> <tom>_1" if base.family.name == "sd3" else "a <rex> and a <tom>"
    plain = draw(base, [], prompt)
    both, of_merge = draw(base, adapters, prompt), draw(base, [merged], prompt)
    assert np.abs(plain - both).max() > 1e-3
    np.testing.assert_allclose(of_merge, both, rtol=0, atol=TOLERANCE)
    assert all(torch.equal(value, before[key]) for key, value in snapshot(base).items())

    export(merged, base.layer_shapes, "diffusers", tmp_path, resolution=16, date="2026-01-02")
    pipeline: Any = vanilla(folder)
    pipeline.load_lora_weights(str(tmp_path), weight_name="pytorch_lora_weights.safetensors")
    load_tokens(pipeline, base, tmp_path)
    np.testing.assert_allclose(draw_plain(pipeline, prompt), both, rtol=0, atol=TOLERANCE)


def draw(base: Base, adapters: list[Adapter], prompt: str) -> np.ndarray:
    with applied(base, adapters):
        return draw_plain(base.pipeline, prompt)


@pytest.mark.parametrize("known", ["sd"], indirect=True, scope="module")
def test_whole_matrices_are_no_lora(known: tuple[Base, Path], tmp_path: Path) -> None:
    base, _ = known
    config = configure(base.family.name, "custom-diffusion", SETTINGS)
    trained = last_of(make_concept(tmp_path, "rex", "red"), base, None, config, tmp_path / "run")
    assert {key.partition(".")[0] for key in trained.dense} == {"unet"}
    assert all(dense.up.any() for dense in trained.dense.values())
    assert np.abs(draw(base, [trained], "a dog") - draw(base, [], "a dog")).max() > 1e-4
    with pytest.raises(SboraError, match="is no LoRA"):
        export(trained, base.layer_shapes, "diffusers", tmp_path, resolution=16, date="2026-01-02")


def test_negative_prompts(known: tuple[Base, Path]) -> None:
    base, _ = known
    settings = {"seeds": [0], "steps": 2, "guidance": 3.0, "as_latents": True}
    plain = base.sample(["a dog"], **settings)
    if base.family.name == "flux":
        with pytest.raises(SboraError, match="takes no negative prompt"):
            base.sample(["a dog"], negative_prompt="a cat", **settings)
        return
    assert not torch.equal(base.sample(["a dog"], negative_prompt="a cat", **settings), plain)
