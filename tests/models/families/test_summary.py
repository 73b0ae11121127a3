"""A prompt's summary (pooled text) says what comes after a learned token, whatever settings call the prompt's end."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sbora_diffusion.models.base import Base, load_base
from sbora_diffusion.models.tokens import added_tokens

from .conftest import SAVERS

ENDS = {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}  # of SDXL, SD3 and FLUX as they are published


def summaries(base: Base, *prompts: str) -> Tensor:
    pooled = base.encode_text(base.tokenize(list(prompts))).pooled
    assert pooled is not None
    return pooled


@torch.no_grad()
@pytest.mark.parametrize("kind", ["sdxl", "sd3", "flux"])
def test_what_is_said_after_a_token_is_in_the_summary(kind: str, tmp_path: Path) -> None:
    folder = SAVERS[kind](tmp_path / "base")
    base = load_base(str(folder))
    plain = summaries(base, "a dog at sea", "a dog in oil")
    for reader in base.learners:
        file = folder / reader.component / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | ENDS))
    published = load_base(str(folder))
    assert torch.equal(summaries(published, "a dog at sea", "a dog in oil"), plain)
    rows = {}
    for reader in published.learners:
        width = published.component(reader.component).get_input_embeddings().weight.shape[1]  # type: ignore[operator]
        rows[f"{reader.component}.<rex>"] = torch.full((1, width), 0.02)
    with added_tokens(published, rows):
        sea, oil = summaries(published, "a <rex> at sea", "a <rex> in oil")
    assert (sea - oil).abs().max() > 0.01
