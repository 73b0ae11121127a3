"""Published parameter counts by `llm train --dry-run`, from configurations without weights."""

from pathlib import Path

import pytest
from transformers import LlamaConfig
from typer.testing import CliRunner

from sbora_diffusion.cli.app import app
from sbora_diffusion.llm.config import METHODS

FIVE, SEVEN = "q_proj;k_proj;v_proj;up_proj;down_proj", "q_proj;k_proj;v_proj;o_proj;gate_proj;up_proj;down_proj"
LLAMA_7B = LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32)
LLAMA_13B = LlamaConfig(hidden_size=5120, intermediate_size=13824, num_hidden_layers=40, num_attention_heads=40)
LLAMA3_8B = LlamaConfig(
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    vocab_size=128256,
    tie_word_embeddings=False,
)
TABLE = [  # by method in the order of METHODS
    ("commonsense", LLAMA_7B, FIVE, 32, (56_098_816, 56_975_360, 28_049_408, 28_049_408)),
    ("arithmetic", LLAMA_7B, FIVE, 64, (None, 113_074_176, None, None)),  # the others double
    ("commonsense", LLAMA3_8B, FIVE, 32, (56_623_104, 57_409_536, 25_165_824, 31_457_280)),
    ("arithmetic", LLAMA3_8B, FIVE, 64, (None, 114_032_640, None, None)),
    ("qsbora", LLAMA_7B, SEVEN, 64, (159_907_840, 161_267_712, 87_031_808, 72_876_032)),
    ("qsbora", LLAMA_13B, SEVEN, 64, (250_347_520, 252_477_440, 136_314_880, 114_032_640)),
    ("qsbora", LLAMA3_8B, SEVEN, 64, (167_772_160, 169_148_416, 88_080_384, 79_691_776)),
]


def test_order_of_the_methods() -> None:
    assert METHODS == ("lora", "dora", "sbora-fa", "sbora-fb")


CASES = [
    pytest.param(
        recipe, shape, targets, rank, method, count, id=f"{recipe}-{shape.hidden_size}-{rank}-{method}-{count}"
    )
    for recipe, shape, targets, rank, counts in TABLE
    for method, count in zip(METHODS, counts, strict=True)
    if count
]


@pytest.mark.parametrize(("recipe", "shape", "targets", "rank", "method", "count"), CASES)
def test_published_parameter_counts(
    recipe: str, shape: LlamaConfig, targets: str, rank: int, method: str, count: int, tmp_path: Path
) -> None:
    shape.save_pretrained(tmp_path)
    command = ["llm", "train", "--base", str(tmp_path), "--dry-run", "--recipe", recipe, "--method", method]
    result = CliRunner().invoke(app, [*command, "--set", f"rank={rank}", "--set", f"targets={targets}"])
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith(f"{method}\t{count:,} trained\t")


def test_size_of_the_base_model(tmp_path: Path) -> None:
    LLAMA3_8B.save_pretrained(tmp_path)
    result = CliRunner().invoke(app, ["llm", "train", "--base", str(tmp_path), "--dry-run"])
    assert "\t8,030,261,248 in the base model\t" in result.stdout
