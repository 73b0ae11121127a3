"""A concept's whole life in every family, against pipelines that know nothing of ours."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn

from sbora_diffusion.adapters.basis import Interval, indices
from sbora_diffusion.adapters.file import Adapter
from sbora_diffusion.adapters.fuse import fuse
from sbora_diffusion.adapters.merge import merge
from sbora_diffusion.inference.bake import bake
from sbora_diffusion.inference.generate import applied
from sbora_diffusion.interchange.exporting import export
from sbora_diffusion.interchange.importing import read_foreign, to_adapter
from sbora_diffusion.methods.calibration import SampledInputs
from sbora_diffusion.models.base import Base
from sbora_diffusion.utils.errors import SboraError

from .conftest import Life, draw_plain, vanilla

TOLERANCE = 1e-5  # of pixels between 0 and 1


def weights(base: Base) -> dict[str, Tensor]:
    modules = nn.ModuleDict({name: base.component(name) for name in base.adapted})
    return {key: value.clone() for key, value in modules.state_dict().items()}


def assert_same_adapter(one: Adapter, other: Adapter) -> None:
    assert one.factors.keys() == other.factors.keys()
    assert one.tokens.keys() == other.tokens.keys()
    for key, factor in one.factors.items():
        assert torch.equal(factor.index, other.factors[key].index)
        assert torch.equal(factor.weight, other.factors[key].weight)
    assert all(torch.equal(value, other.tokens[key]) for key, value in one.tokens.items())


def ours(life: Life, adapters: Sequence[Adapter], prompt: str = "") -> np.ndarray:
    with applied(life.base, adapters):
        return draw_plain(life.base.pipeline, prompt or life.prompt)


def test_every_part_was_trained(life: Life) -> None:
    rex, base = life.adapters[0], life.base
    assert rex.factors.keys() == base.layers.keys()
    assert {key.partition(".")[0] for key in rex.factors} == set(base.adapted)
    for key, factor in rex.factors.items():
        expected = indices(key.partition(".")[2], base.layer_shapes[key][1], Interval(0, 4), 0)
        assert torch.equal(factor.index, expected)
    for component in base.adapted:
        assert any(factor.weight.any() for key, factor in rex.factors.items() if key.startswith(f"{component}."))
    learners = [reader.component for reader in base.learners]
    assert rex.tokens.keys() == {f"{component}.<rex>" for component in learners}
    assert all(rows.shape[0] == 2 for rows in rex.tokens.values())


def test_the_file_and_the_merge_draw_what_was_written(life: Life, tmp_path: Path) -> None:
    before = weights(life.base)
    plain, both = ours(life, []), ours(life, life.adapters)
    assert np.abs(plain - both).max() > 1e-3  # it is not that nothing happens
    life.adapters[0].save(tmp_path / "rex.safetensors")
    assert_same_adapter(Adapter.load(tmp_path / "rex.safetensors"), life.adapters[0])
    summed = merge(life.adapters, [1.0, 1.0], "sum")
    np.testing.assert_allclose(ours(life, [summed]), both, rtol=0, atol=TOLERANCE)
    fused = fuse(life.adapters, [1.0, 1.0], SampledInputs(life.base, life.adapters, steps=1, seeds=1))
    assert np.isfinite(ours(life, [fused])).all()
    assert fused.factors.keys() == summed.factors.keys()
    assert all(torch.equal(value, before[key]) for key, value in weights(life.base).items())


def load_tokens(pipeline: Any, base: Base, folder: Path) -> None:
    """As docs/interchange.md says."""
    for name in ("rex", "tom"):
        held = load_file(folder / f"embeddings/{name}.safetensors")
        for number, reader in enumerate(base.learners):
            rows = held[("clip_l", "clip_g")[number]] if len(base.learners) > 1 else next(iter(held.values()))
            tokenizer, encoder = getattr(pipeline, reader.tokenizer), getattr(pipeline, reader.component)
            if hasattr(pipeline, "load_textual_inversion"):
                pipeline.load_textual_inversion(rows, f"<{name}>", tokenizer, encoder)
            else:
                append_token(tokenizer, encoder, f"<{name}>", rows)


def append_token(tokenizer: Any, encoder: Any, token: str, rows: Tensor) -> None:
    """As docs/interchange.md says for SD3, whose pipeline loads no tokens."""
    tokenizer.add_tokens([token, *(f"{token}_{number}" for number in range(1, len(rows)))])
    known = encoder.get_input_embeddings().weight.detach()
    encoder.set_input_embeddings(nn.Embedding.from_pretrained(torch.cat([known, rows])))


@pytest.mark.parametrize("to", ["diffusers", "kohya", "peft"])
def test_exported_it_is_the_same_in_vanilla_diffusers(life: Life, tmp_path: Path, to: str) -> None:
    merged, shapes = merge(life.adapters, [1.0, 1.0], "sum"), life.base.layer_shapes
    if to == "kohya" and life.base.family.denoiser == "transformer":
        with pytest.raises(SboraError, match="belongs to a transformer, this format is for unet"):
            export(merged, shapes, to, tmp_path, resolution=16, date="2026-01-02")
        return
    export(merged, shapes, to, tmp_path, resolution=16, date="2026-01-02")
    pipeline = vanilla(life.folder)
    if to == "peft":
        for component in life.base.adapted:
            loaded = PeftModel.from_pretrained(getattr(pipeline, component), tmp_path / component)
            setattr(pipeline, component, loaded.merge_and_unload())  # type: ignore[operator]
    else:
        name = "rex+tom.safetensors" if to == "kohya" else "pytorch_lora_weights.safetensors"
        pipeline.load_lora_weights(str(tmp_path), weight_name=name)
    load_tokens(pipeline, life.base, tmp_path)
    np.testing.assert_allclose(draw_plain(pipeline, life.prompt), ours(life, life.adapters), rtol=0, atol=TOLERANCE)
    again = to_adapter(read_foreign(tmp_path), shapes, (life.base.id, life.base.fingerprint), "rex+tom")
    assert_same_adapter(again, merged)


def test_baked_it_is_the_same_in_vanilla_diffusers(life: Life, tmp_path: Path) -> None:
    bake(life.base, life.adapters, [1.0, 1.0], tmp_path / "baked")
    pipeline = vanilla(tmp_path / "baked")
    assert type(pipeline) is type(life.base.pipeline)
    np.testing.assert_allclose(draw_plain(pipeline, life.prompt), ours(life, life.adapters), rtol=0, atol=TOLERANCE)


def test_our_own_drawing_is_the_pipelines(life: Life) -> None:
    """The same latents, in the shape that training has them; tokens of two vectors are written out where need be."""
    with applied(life.base, life.adapters):
        drawn = life.base.sample(["a <rex>"], seeds=[0], steps=2, guidance=3.0, as_latents=True)
        words = {"prompt": "a <rex> <rex>_1", "prompt_3": "a <rex>"} if life.base.family.name == "sd3" else {}
        plain: Any = life.base.pipeline(
            **{"prompt": "a <rex>"} | words,
            num_inference_steps=2,
            guidance_scale=3.0,
            generator=torch.Generator().manual_seed(0),
            output_type="latent",
            height=16,
            width=16,
        )
    assert drawn.shape == (1, 4, 8, 8)
    assert torch.equal(drawn.flatten().sort().values, plain.images.flatten().sort().values)  # FLUX's are packed


def test_taken_out_nothing_is_left(life: Life) -> None:
    before = weights(life.base)
    tokenizers = [life.base.tokenizer(reader) for reader in life.base.learners]
    with applied(life.base, life.adapters) as written:
        written.restore(["rex"])
        only_tom = draw_plain(life.base.pipeline, "a <tom>")
    assert np.array_equal(only_tom, ours(life, [life.adapters[1]], "a <tom>"))
    assert all(torch.equal(value, before[key]) for key, value in weights(life.base).items())
    assert [life.base.tokenizer(reader) for reader in life.base.learners] == tokenizers
