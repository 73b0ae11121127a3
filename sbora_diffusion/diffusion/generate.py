"""Pictures from a prompt, with any set of concepts written into the base model while they are made."""

import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from PIL import Image

from sbora_diffusion.adapter.file import Adapter, check_fits
from sbora_diffusion.adapter.written import WrittenWeights
from sbora_diffusion.diffusion.base import TARGETS, Base
from sbora_diffusion.diffusion.tokens import added_tokens
from sbora_diffusion.errors import SboraError

log = logging.getLogger(__name__)

TOKEN = re.compile(r"<[^<>\s]+>")


@contextmanager
def applied(base: Base, adapters: Sequence[Adapter], strengths: Sequence[float] | None = None) -> Iterator[None]:
    """Write concepts into the base model; at the end its weights and tokens are what they were, bit for bit.

    Args:
        strengths: one factor an adapter, 1 for all if None.

    Raises:
        SboraError: an adapter for another base model, or two that bring the same token.
    """
    strengths = strengths or [1.0] * len(adapters)
    if len(strengths) != len(adapters):
        raise SboraError(f"got {len(adapters)} adapters and {len(strengths)} strengths, expected one for each")
    for adapter in adapters:
        check_base(adapter, base)
    _check_distinct(adapters)
    with ExitStack() as stack:
        for component in TARGETS:
            written = WrittenWeights(base.component(component))
            stack.callback(written.restore_all)
            for adapter, strength in zip(adapters, strengths, strict=True):
                written.write(adapter.spec.name, adapter.component(component), adapter.spec.side, strength)
        embeddings = {key.split(".", 1)[1]: value for adapter in adapters for key, value in adapter.tokens.items()}
        if embeddings:
            stack.enter_context(added_tokens(base, embeddings))
        yield


def check_base(adapter: Adapter, base: Base) -> None:
    """SboraError unless the adapter was trained for this base model."""
    check_fits(adapter, base.layer_shapes)
    if adapter.spec.base_fingerprint != base.fingerprint:
        raise SboraError(
            f"adapter {adapter.spec.name!r} was trained for {adapter.spec.base_id} "
            f"[{adapter.spec.base_fingerprint}], the base model is {base.id} [{base.fingerprint}]",
            f"use --base {adapter.spec.base_id}, in the version that it was trained for",
        )


def _check_distinct(adapters: Sequence[Adapter]) -> None:
    for what, lists in (
        ("name", [[adapter.spec.name] for adapter in adapters]),
        ("token", [list(adapter.spec.tokens) for adapter in adapters]),
    ):
        seen: set[str] = set()
        for word in (word for words in lists for word in words):
            if word in seen:
                raise SboraError(f"two adapters bring the {what} {word!r}", "merge them: the merge renames tokens")
            seen.add(word)


def generate(
    base: Base,
    prompts: Sequence[str],
    *,
    seeds: Sequence[int],
    steps: int = 20,
    guidance: float = 3.0,
    negative_prompt: str = "",
) -> list[Image.Image]:
    """One picture for each prompt and seed, at the base model's own resolution.

    A picture depends on its own prompt and seed only, not on what else is in the call.

    Raises:
        SboraError: a `<token>` that no applied concept brings.
    """
    if len(prompts) != len(seeds) or not prompts:
        raise SboraError(f"got {len(prompts)} prompts and {len(seeds)} seeds, expected as many of both, at least one")
    known = set(base.pipeline.tokenizer.get_added_vocab())
    for prompt in prompts:
        missing = sorted(set(TOKEN.findall(prompt)) - known)
        if missing:
            have = ", ".join(sorted(token for token in known if TOKEN.fullmatch(token))) or "none"
            raise SboraError(f"no loaded concept brings the token {missing[0]}, known: {have}", "add --adapter FILE")
    result: Any = base.pipeline(
        list(prompts),
        num_inference_steps=steps,
        guidance_scale=guidance,
        negative_prompt=[negative_prompt] * len(prompts),
        generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
    )
    return result.images
