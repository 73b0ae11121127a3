"""The Python in docs/interchange.md runs as it stands."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import StableDiffusionXLPipeline
from PIL import Image

from sbora_diffusion.inference.generate import applied
from sbora_diffusion.interchange.exporting import export
from sbora_diffusion.models.base import load_base

from ..tiny_pipeline import save_tiny_pipeline
from ..tiny_sdxl import save_tiny_sdxl
from ..tiny_transformers import save_tiny_sd3
from .samples import layer_shapes, random_adapter

BLOCKS = re.findall(r"```python\n(.*?)```", (Path(__file__).parents[2] / "docs/interchange.md").read_text(), re.S)
DRAW = """
import torch
pipeline("a <dog> on the beach", generator=torch.Generator().manual_seed(0)).images[0].save("dog.png")
"""


@pytest.mark.parametrize(("to", "code"), [("diffusers", BLOCKS[0] + DRAW), ("peft", BLOCKS[4] + DRAW)])
def test_stable_diffusion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: str, code: str) -> None:
    monkeypatch.chdir(tmp_path)
    base = load_base(str(save_tiny_pipeline(tmp_path / "BASE")))
    adapter = random_adapter(base.layer_shapes, std=0.1, base_fingerprint=base.fingerprint)
    plain = image(DRAW, {"pipeline": base.pipeline})
    with applied(base, [adapter]):
        expected = image(DRAW, {"pipeline": base.pipeline})
    assert np.abs(plain - expected).max() > 5
    export(adapter, base.layer_shapes, to, Path(f"exports/dog-{to}"), resolution=16, date="")
    assert np.abs(image(code, {}) - expected).max() <= 1  # of 255: what is nearly the same may be rounded apart


def image(code: str, names: dict[str, Any]) -> np.ndarray:
    """The dog.png that some code writes."""
    exec(code, names)
    with Image.open("dog.png") as saved:
        return np.asarray(saved).astype(int)


def test_the_tokens_of_sdxl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    pipeline = StableDiffusionXLPipeline.from_pretrained(save_tiny_sdxl(tmp_path / "BASE"))
    shapes = layer_shapes({"text_encoder": pipeline.text_encoder, "text_encoder_2": pipeline.text_encoder_2})
    export(random_adapter(shapes), shapes, "diffusers", Path("exports/dog-diffusers"), resolution=16, date="")
    exec(BLOCKS[1], {"pipeline": pipeline})
    assert "<dog>" in pipeline.tokenizer.get_added_vocab()
    assert "<dog>" in pipeline.tokenizer_2.get_added_vocab()


def test_the_end_of_a_prompt(tmp_path: Path) -> None:
    pipeline = StableDiffusionXLPipeline.from_pretrained(save_tiny_sdxl(tmp_path / "BASE"))
    end = pipeline.tokenizer.eos_token_id
    parts = [part for one in (pipeline.text_encoder, pipeline.text_encoder_2) for part in one.modules()]
    told = [part for part in parts if hasattr(part, "eos_token_id")]
    assert len(told) == 2
    for part in told:
        part.eos_token_id = 2
    exec(BLOCKS[3], {"pipeline": pipeline})
    assert [part.eos_token_id for part in told] == [end, end]


def test_the_tokens_of_sd3(tmp_path: Path) -> None:
    base = load_base(str(save_tiny_sd3(tmp_path / "tiny")))
    tokenizer, encoder = base.pipeline.tokenizer, base.pipeline.text_encoder
    row = torch.full((1, encoder.config.hidden_size), 7.0)
    exec(BLOCKS[2], {"torch": torch, "tokenizer": tokenizer, "encoder": encoder, "pair": {"clip_l": row}})
    ids = torch.tensor(tokenizer("<dog>", add_special_tokens=False).input_ids)
    assert torch.equal(encoder.get_input_embeddings()(ids), row)
