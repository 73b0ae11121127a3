"""A baked folder is a pipeline like any other, and draws what the base model draws with the files."""

import json
from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline

from sbora_diffusion.adapters.basis import Interval, Side, indices
from sbora_diffusion.adapters.file import Adapter, Factor, Spec
from sbora_diffusion.inference.bake import bake
from sbora_diffusion.inference.generate import applied, generate
from sbora_diffusion.models.base import Base, load_base
from sbora_diffusion.utils.errors import SboraError


def concept(base: Base, name: str, side: Side, interval: str, seed: int = 0, vectors: int = 1) -> Adapter:
    """Random numbers, large enough to be seen."""
    generator, place = torch.Generator().manual_seed(len(name) + seed), Interval.parse(interval)
    factors = {}
    for key, (out_dim, in_dim) in base.layer_shapes.items():
        index = indices(key.split(".", 1)[1], in_dim if side == "fa" else out_dim, place, seed)
        size = (out_dim, place.rank) if side == "fa" else (place.rank, in_dim)
        factors[key] = Factor(index, 0.2 * torch.randn(size, generator=generator))
    spec = Spec(
        side=side, rank=place.rank, intervals=(place,), seed=seed, base_id=base.id, base_fingerprint=base.fingerprint,
        tokens={f"<{name}>": "dog"}, name=name,
    )  # fmt: skip
    width = base.pipeline.text_encoder.config.hidden_size
    return Adapter(spec, factors, {f"text_encoder.<{name}>": torch.randn(vectors, width, generator=generator)})


def state(base: Base) -> dict[str, torch.Tensor]:
    models = {name: base.component(name) for name in ("unet", "text_encoder", "vae")}
    return {
        f"{name}.{key}": value.clone() for name, model in models.items() for key, value in model.state_dict().items()
    }


def draw_plain(pipeline: Any, prompt: str) -> np.ndarray:
    """As anybody would, without a line of ours."""
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator("cpu").manual_seed(0)
    return np.asarray(pipeline(prompt, num_inference_steps=2, guidance_scale=7.5, generator=generator).images[0])


def draw(base: Base, prompt: str) -> np.ndarray:
    return np.asarray(generate(base, [prompt], seeds=[0], steps=2)[0])


def test_a_baked_pipeline_draws_the_same_without_our_code(base: Base, tmp_path: Path) -> None:
    adapters = [concept(base, "rex", "fa", "0:4"), concept(base, "tom", "fb", "2:6", vectors=2)]
    before, vocabulary = state(base), base.pipeline.text_encoder.config.vocab_size
    prompts = ["a <rex> and a <tom>", "a <tom>", "a dog"]
    with applied(base, adapters, [1.0, 0.5]):
        expected = [draw(base, prompt) for prompt in prompts]
    assert bake(base, adapters, [1.0, 0.5], tmp_path / "baked") == ["<rex>", "<tom>"]

    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "baked", safety_checker=None)
    for prompt, image in zip(prompts, expected, strict=True):
        assert np.array_equal(draw_plain(pipeline, prompt), image)
    again = load_base(str(tmp_path / "baked"))
    assert np.array_equal(draw(again, prompts[0]), expected[0])
    with pytest.raises(SboraError, match="was trained for"), applied(again, adapters[:1]):
        pass

    after = state(base)
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[key]) for key, value in before.items())
    assert base.pipeline.text_encoder.config.vocab_size == vocabulary
    assert not base.pipeline.tokenizer.get_added_vocab().keys() & {"<rex>", "<tom>"}


def test_everything_of_one_base_goes_together(base: Base, tmp_path: Path) -> None:
    """Both sides, several seeds, the same columns, name and token: nothing of this could be merged."""
    chosen = [
        concept(base, "rex", "fa", "0:4"),
        concept(base, "rex", "fb", "0:4"),
        concept(base, "rex", "fa", "0:4", 1),
    ]
    assert bake(base, chosen, [1.0] * 3, tmp_path / "baked") == ["<rex>", "<rex-2>", "<rex-3>"]
    again = load_base(str(tmp_path / "baked"))
    for key, layer in base.layers.items():
        expected = layer.weight.double()
        for adapter in chosen:
            factor, dim = adapter.factors[key], 1 if adapter.spec.side == "fa" else 0
            expected = expected.index_add(dim, factor.index, factor.weight.double())
        torch.testing.assert_close(again.layers[key].weight.double(), expected, rtol=1e-6, atol=1e-6)
    embedding, tokenizer = again.pipeline.text_encoder.get_input_embeddings(), again.pipeline.tokenizer
    for token, adapter in zip(("<rex>", "<rex-2>", "<rex-3>"), chosen, strict=True):
        assert torch.equal(
            embedding.weight[tokenizer.convert_tokens_to_ids(token)], adapter.tokens["text_encoder.<rex>"][0]
        )


def test_the_folder_says_what_is_in_it_and_not_where_it_was_made(base: Base, tmp_path: Path) -> None:
    rex = concept(base, "rex", "fa", "0:4")
    rex.save(tmp_path / "rex.safetensors")
    bake(base, [rex], [0.5], tmp_path / "baked")
    record = json.loads((tmp_path / "baked/sbora.json").read_text())
    (entry,) = record["concepts"]
    assert record["base_fingerprint"] == base.fingerprint
    assert (entry["name"], entry["tokens"], entry["strength"]) == ("rex", {"<rex>": "dog"}, 0.5)
    assert entry["file"]["sha256"] == sha256((tmp_path / "rex.safetensors").read_bytes()).hexdigest()
    for path in (tmp_path / "baked").rglob("*.json"):
        if path.name != "sbora.json":
            assert str(Path(base.id).parent) not in path.read_text(), path


def test_concepts_without_tokens(base: Base, tmp_path: Path) -> None:
    rex = concept(base, "rex", "fa", "0:4")
    rex = replace(rex, spec=replace(rex.spec, tokens={}), tokens={})
    assert bake(base, [rex], [1.0], tmp_path / "baked") == []
    again = load_base(str(tmp_path / "baked"))
    assert not torch.equal(next(iter(again.layers.values())).weight, next(iter(base.layers.values())).weight)


def test_nothing_is_overwritten_unasked(base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rex, tom = concept(base, "rex", "fa", "0:4"), concept(base, "tom", "fa", "4:8")
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "diary.txt").write_text("dear diary")
    for force in (False, True):
        with pytest.raises(SboraError, match="mine exists, and is no pipeline that was baked before"):
            bake(base, [rex], [1.0], mine, force)
    assert (mine / "diary.txt").read_text() == "dear diary"
    bake(base, [rex], [1.0], tmp_path / "baked")
    with pytest.raises(SboraError, match="baked exists") as caught:
        bake(base, [tom], [1.0], tmp_path / "baked")
    assert "--force" in str(caught.value.hint)
    monkeypatch.chdir(tmp_path / "baked")
    bake(base, [tom], [1.0], Path(), force=True)
    assert "<tom>" in load_base(str(tmp_path / "baked")).pipeline.tokenizer.get_added_vocab()
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["baked", "mine"]


@pytest.mark.parametrize("spoil", ["disk", "adapter"])
def test_a_failure_leaves_nothing_behind(
    base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spoil: str
) -> None:
    rex = concept(base, "rex", "fa", "0:4")
    bake(base, [rex], [1.0], tmp_path / "baked")
    before, good = state(base), (tmp_path / "baked/sbora.json").read_bytes()
    if spoil == "adapter":
        rex = replace(rex, spec=replace(rex.spec, base_fingerprint="beef"))
    else:
        write: Callable[..., Any] = Path.write_text

        def fail(path: Path, *arguments: Any, **keywords: Any) -> Any:
            if path.name == "sbora.json":
                raise OSError(28, "No space left on device")
            return write(path, *arguments, **keywords)

        monkeypatch.setattr(Path, "write_text", fail)
    with pytest.raises(SboraError, match=r"cannot write .*baked \(No space left on device\)|was trained for"):
        bake(base, [rex], [1.0], tmp_path / "baked", force=True)
    assert (tmp_path / "baked/sbora.json").read_bytes() == good
    assert [path.name for path in tmp_path.iterdir()] == ["baked"]
    after = state(base)
    assert all(torch.equal(value, after[key]) for key, value in before.items())
