"""diffusers and PEFT, without any code of ours, draw the same from the exported files as we do."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import StableDiffusionXLPipeline
from peft import PeftModel
from safetensors.torch import load_file

from sbora_diffusion.adapters.basis import Interval, Side
from sbora_diffusion.adapters.file import Adapter
from sbora_diffusion.adapters.merge import merge
from sbora_diffusion.adapters.weight_patcher import WeightPatcher
from sbora_diffusion.inference.generate import applied
from sbora_diffusion.interchange.exporting import export
from sbora_diffusion.models.base import Base, load_base

from ..adapters.tiny import KINDS, TARGETS, Kind, Tiny, run
from ..tiny_pipeline import save_tiny_pipeline
from ..tiny_sdxl import save_tiny_sdxl
from .samples import layer_shapes, random_adapter

PROMPT = "a <dog> and a <cat> in the snow"
TOLERANCE = 1e-5  # of pixels between 0 and 1
COMPONENTS = ("unet", "text_encoder", "text_encoder_2")

each_side = pytest.mark.parametrize("side", ["fa", "fb"])
each_lora_file = pytest.mark.parametrize(
    ("to", "name"), [("diffusers", "pytorch_lora_weights.safetensors"), ("kohya", "cat+dog.safetensors")]
)


@pytest.fixture(scope="module")
def sd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_pipeline(tmp_path_factory.mktemp("sd") / "tiny")


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_sdxl(tmp_path_factory.mktemp("sdxl") / "tiny")


def concepts(shapes: dict[str, tuple[int, int]], side: Side, **changes: Any) -> list[Adapter]:
    """Two that are disjoint: one has a token of two vectors, the other only every second layer."""
    dog = random_adapter(shapes, side, Interval(0, 4), std=0.1, vectors=2, **changes)
    some = dict(list(shapes.items())[::2])
    return [dog, random_adapter(some, side, Interval(4, 3), 1, 0.1, name="cat", tokens={"<cat>": "cat"}, **changes)]


def draw(pipeline: Any, prompt: str = PROMPT) -> np.ndarray:
    """(height, width, 3) numbers between 0 and 1."""
    generator = torch.Generator().manual_seed(0)
    options = {"num_inference_steps": 3, "guidance_scale": 3.0, "output_type": "np"}
    return pipeline(prompt, height=16, width=16, generator=generator, **options).images[0]


def assert_same_image(got: np.ndarray, expected: np.ndarray, plain: np.ndarray) -> None:
    assert np.isfinite(got).all()
    assert np.abs(plain - expected).max() > 1e-3  # it is not that nothing happens
    np.testing.assert_allclose(got, expected, rtol=0, atol=TOLERANCE)


def write(adapter: Adapter, shapes: dict[str, tuple[int, int]], to: str, folder: Path) -> None:
    export(adapter, shapes, to, folder, resolution=16, date="2026-01-02")


def vanilla(folder: Path) -> Any:
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@each_side
@each_lora_file
def test_stable_diffusion(sd: Path, tmp_path: Path, side: Side, to: str, name: str) -> None:
    base = load_base(str(sd))
    adapters = concepts(base.layer_shapes, side, base_id=base.id, base_fingerprint=base.fingerprint)
    plain = draw(base.pipeline, "a dog and a cat in the snow")
    strengths = [0.8, 1.3]
    with applied(base, adapters, strengths):
        expected = draw(base.pipeline)
    write(merge(adapters, strengths, "sum"), base.layer_shapes, to, tmp_path)

    pipeline = vanilla(sd)
    assert isinstance(pipeline, StableDiffusionPipeline)
    pipeline.load_lora_weights(str(tmp_path), weight_name=name)
    for token in ("dog", "cat"):
        loaded = f"<{token}>" if to == "kohya" else None
        pipeline.load_textual_inversion(str(tmp_path / f"embeddings/{token}.safetensors"), token=loaded)
    assert_same_image(draw(pipeline), expected, plain)


@each_side
@each_lora_file
def test_stable_diffusion_xl(sdxl: Path, tmp_path: Path, side: Side, to: str, name: str) -> None:
    ours = vanilla(sdxl)
    assert isinstance(ours, StableDiffusionXLPipeline)
    parts = {component: getattr(ours, component) for component in COMPONENTS}
    shapes = layer_shapes(parts)
    adapters = concepts(shapes, side)
    plain = draw(ours, "a dog and a cat in the snow")
    for component, model in parts.items():
        written = WeightPatcher(model)
        for adapter in adapters:
            written.write(adapter.spec.name, adapter.component(component), side)
    add_tokens(ours.tokenizer, ours.text_encoder, adapters, "text_encoder")
    add_tokens(ours.tokenizer_2, ours.text_encoder_2, adapters, "text_encoder_2")
    expected = draw(ours)
    write(merge(adapters, [1.0, 1.0], "sum"), shapes, to, tmp_path)

    pipeline = vanilla(sdxl)
    pipeline.load_lora_weights(str(tmp_path), weight_name=name)
    for token in ("dog", "cat"):
        pair = load_file(tmp_path / f"embeddings/{token}.safetensors")
        for key, encoder, tokenizer in (
            ("clip_l", pipeline.text_encoder, pipeline.tokenizer),
            ("clip_g", pipeline.text_encoder_2, pipeline.tokenizer_2),
        ):
            pipeline.load_textual_inversion(pair[key], f"<{token}>", tokenizer, encoder)
    assert_same_image(draw(pipeline), expected, plain)


def add_tokens(tokenizer: Any, encoder: Any, adapters: Sequence[Adapter], component: str) -> None:
    """A learned token of n vectors is n new rows of the vocabulary, `<dog>`, `<dog>_1` …"""
    weight = encoder.get_input_embeddings().weight
    rows = []
    for adapter in adapters:
        for token in adapter.spec.tokens:
            vectors = adapter.tokens[f"{component}.{token}"]
            tokenizer.add_tokens([token, *(f"{token}_{number}" for number in range(1, len(vectors)))])
            rows.append(vectors)
    encoder.set_input_embeddings(torch.nn.Embedding.from_pretrained(torch.cat([weight.detach(), *rows])))


@each_side
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "llama-nf4"])
def test_peft(tiny: Tiny, kind: Kind, side: Side, tmp_path: Path) -> None:
    model = tiny.load(kind)
    component = {"unet": "unet", "clip": "text_encoder", "llama": "model"}[kind]
    shapes = model_shapes(model, component)
    adapter = random_adapter(shapes, side, Interval(0, 4), std=0.1)
    few = dict(list(shapes.items())[:3])  # a merge in which these layers have another rank than the others
    more = random_adapter(few, side, Interval(4, 2), 1, 0.1, name="cat", tokens={"<cat>": "cat"})
    merged = merge([adapter, more], [1.0, 1.0], "sum")
    plain = run(kind, model)
    written = WeightPatcher(model)
    written.write("all", merged.component(component), side)
    expected = run(kind, model)
    written.restore_all()
    write(merged, shapes, "peft", tmp_path)

    loaded = PeftModel.from_pretrained(model, tmp_path / component).eval()
    got = run(kind, loaded)
    assert (expected - plain).abs().max() > 1e-3
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def model_shapes(model: Any, component: str) -> dict[str, tuple[int, int]]:
    names = tuple(TARGETS[{"model": "llama", "unet": "unet", "text_encoder": "clip"}[component]])
    return {
        f"{component}.{name}": (module.out_features, module.in_features)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name.endswith(names)
    }


@each_side
def test_peft_with_the_second_text_encoder_of_sdxl(sdxl: Path, tmp_path: Path, side: Side) -> None:
    encoder = vanilla(sdxl).text_encoder_2
    shapes = layer_shapes({"text_encoder_2": encoder})
    adapter = random_adapter(shapes, side, std=0.1)
    ids = torch.arange(14).reshape(2, 7)
    plain = encoder(ids).text_embeds
    written = WeightPatcher(encoder)
    written.write("dog", adapter.component("text_encoder_2"), side)
    expected = encoder(ids).text_embeds
    written.restore_all()
    write(adapter, shapes, "peft", tmp_path)
    got = PeftModel.from_pretrained(encoder, tmp_path / "text_encoder_2").eval()(ids).text_embeds
    assert (expected - plain).abs().max() > 1e-3
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_exports_leave_the_base_alone(sd: Path, tmp_path: Path) -> None:
    base: Base = load_base(str(sd))
    before = {key: value.clone() for key, value in base.pipeline.unet.state_dict().items()}
    write(random_adapter(base.layer_shapes), base.layer_shapes, "kohya", tmp_path)
    assert all(torch.equal(value, before[key]) for key, value in base.pipeline.unet.state_dict().items())
