"""Beam search in lm-evaluation-harness matches plain `generate` at any batch size."""

from collections import Counter
from typing import Any

import pytest
from lm_eval.api.instance import Instance

from sbora_diffusion.llm.base import load_base
from sbora_diffusion.llm.beams import FullBeamsModel

PROMPTS = [f"{'ab' * number}?" for number in range(8)]


def generated(model: Any, tokenizer: Any) -> list[list[int]]:
    """Run plain `generate` with four beams, one prompt at a time."""
    made = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        made.append(model.generate(ids, num_beams=4, do_sample=False, max_new_tokens=32)[0, ids.shape[1] :].tolist())
    return made


@pytest.fixture
def ending(base: str) -> tuple[Any, Any]:
    """Return a model some of whose texts end early: its most frequent token and the end of text are swapped."""
    model, tokenizer = load_base(base)
    favourite, _ = Counter(token for ids in generated(model, tokenizer) for token in set(ids)).most_common(1)[0]
    model.lm_head.weight[[2, favourite]] = model.lm_head.weight[[favourite, 2]]
    return model, tokenizer


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_texts_do_not_depend_on_the_batch(batch_size: int, ending: tuple[Any, Any]) -> None:
    model, tokenizer = ending
    expected = [tokenizer.decode(ids, skip_special_tokens=True) for ids in generated(model, tokenizer)]
    assert len({len(text) for text in expected}) > 2
    model.generation_config.eos_token_id = None  # as in base models of which only the tokenizer has the end of a chat
    options = {"until": [], "do_sample": False, "num_beams": 4, "max_gen_toks": 32}
    requests = [Instance("generate_until", {}, (prompt, dict(options)), 0) for prompt in PROMPTS]
    got = FullBeamsModel(model, tokenizer=tokenizer, batch_size=batch_size, device="cpu").generate_until(requests, True)
    assert got == expected
