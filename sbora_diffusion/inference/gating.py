"""Live concepts: beside the weights instead of in them, each acting only where its mask is not zero (token gating).

An SBoRA adapter adds a separate small term to a layer's output, so it can be left out position by position: in the text
encoder and in the keys and values of cross-attention before the concept's token, elsewhere outside the concept's place
in the image. Where no mask applies, the output is the base model's, bit for bit.
"""

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from sbora_diffusion.adapters.basis import Side
from sbora_diffusion.adapters.file import Adapter, Factor
from sbora_diffusion.inference.generate import check_base, check_distinct, check_tokens, matching_strengths
from sbora_diffusion.models.base import Base
from sbora_diffusion.models.families.base import TextConditioning
from sbora_diffusion.models.quantization import DTYPE
from sbora_diffusion.models.tokens import added_tokens
from sbora_diffusion.utils.errors import SboraError

Masks = Mapping[str, Tensor]  # concept -> from 0 (off) to 1 (as strong as trained); missing concepts are off
MaskSource = Callable[[str, torch.Size], Masks]  # layer "<component>.<layer>", (rows, positions) -> masks of that shape


class LiveConcepts:
    """Concepts hooked to a base model's layers; they act only within `acting`, where its masks are not zero."""

    def __init__(self, base: Base, adapters: Sequence[Adapter], strengths: Sequence[float]) -> None:
        self._base = base
        self._adapters = {adapter.spec.name: adapter for adapter in adapters}
        self._deltas: dict[str, dict[str, tuple[Factor, Side]]] = {}  # layer -> concept -> delta, concepts by name
        for name, strength in sorted(zip(self._adapters, strengths, strict=True)):
            for key, factor in self._adapters[name].factors.items():
                ready = _ready(factor, strength, base.layers[key].weight)
                self._deltas.setdefault(key, {})[name] = ready, self._adapters[name].spec.side
        self._source: MaskSource | None = None

    def text_masks(self, prompt: str, chosen: Collection[str] = ()) -> dict[str, Tensor]:
        """Return where in a prompt each concept acts: from its token on, because the text encoder is causal.

        Args:
            chosen: names of concepts that act on the whole prompt even if it does not name them.

        Returns:
            concept -> (tokens,) of zeros and ones; concepts that do not act are missing.

        Raises:
            SboraError: an unknown token or name, a token beyond the end of a long prompt.
        """
        check_tokens(self._base, [prompt])
        for name in chosen:
            if name not in self._adapters:
                raise SboraError(f"got concept {name!r}, loaded are {', '.join(self._adapters) or 'none'}")
        places = self.token_positions(prompt)
        size = self._base.pipeline.tokenizer.model_max_length
        starts = {name: min(positions) for name, positions in places.items()} | {
            name: 0 for name in chosen if name not in places
        }
        positions = torch.arange(size, device=self._base.device)
        return {name: (positions >= start).to(self._base.pipeline.unet.dtype) for name, start in starts.items()}

    def token_positions(self, prompt: str) -> dict[str, list[int]]:
        """Return the positions of each concept's tokens in a prompt; a token of several vectors has several."""
        pipeline: Any = self._base.pipeline
        ids = _token_ids(pipeline, prompt)
        vocabulary, found = pipeline.tokenizer.get_added_vocab(), {}
        for name, adapter in self._adapters.items():
            own = {vocabulary[word] for word in _words(adapter)}
            positions = [position for position, number in enumerate(ids) if number in own]
            if positions:
                found[name] = positions
            elif token := next((token for token in adapter.spec.tokens if token in prompt), None):
                raise SboraError(
                    f"the prompt is too long: {token} is beyond its {len(ids)} tokens", hint="Name the concept earlier."
                )
        return found

    @torch.no_grad()
    def encode(self, prompts: Sequence[str], masks: Masks) -> TextConditioning:
        """Encode the same prompt n times, or several without concepts, with these masks: states (n, tokens, hidden)."""
        pipeline: Any = self._base.pipeline
        with self.acting(lambda _key, shape: {name: mask.expand(shape) for name, mask in masks.items()}):
            made = pipeline.encode_prompt(
                list(prompts), device=self._base.device, num_images_per_prompt=1, do_classifier_free_guidance=False
            )
        return TextConditioning(made[0], made[2] if len(made) > 2 else None)

    def encode_negative(self, prompt: str, number: int) -> TextConditioning:
        """Encode the negative prompt n times, without any concept; for SDXL an empty one is all zeros."""
        text = self.encode([prompt] * number, {})
        if prompt or not self._base.pipeline.config.get("force_zeros_for_empty_prompt"):
            return text
        return TextConditioning(
            torch.zeros_like(text.states), None if text.pooled is None else torch.zeros_like(text.pooled)
        )

    @contextmanager
    def acting(self, source: MaskSource) -> Iterator[None]:
        """Let `source` decide in every layer where each concept acts."""
        before, self._source = self._source, source
        try:
            yield
        finally:
            self._source = before

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """Hook the layers, and remove the hooks at the end."""
        handles = [self._base.layers[key].register_forward_hook(self._hook(key)) for key in self._deltas]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, key: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def add(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            masks = self._source(key, inputs[0].shape[:-1]) if self._source else {}
            for name, (factor, side) in self._deltas[key].items():
                if name in masks:
                    add_delta(output, inputs[0], masks[name], factor, side)

        return add


def add_delta(output: Tensor, inputs: Tensor, mask: Tensor, factor: Factor, side: Side) -> None:
    """Add mask · ΔW x to a layer's output, in place and only where the mask is not zero.

    Args:
        output: (rows, positions, out), contiguous.
        inputs: (rows, positions, in), the layer's x.
        mask: (rows, positions).
        factor: index (r,), and weight (out, r) for fa or (r, in) for fb, in the dtype of `output`.
    """
    where = mask.reshape(-1).nonzero().squeeze(1)
    if len(where) == 0:
        return
    x, strength = inputs.flatten(0, 1)[where], mask.reshape(-1)[where, None].to(output)
    flat = output.view(-1, output.shape[-1])
    if side == "fa":
        flat.index_add_(0, where, x[:, factor.index] @ factor.weight.T * strength)
    else:
        flat[where[:, None], factor.index] += x @ factor.weight.T * strength


@contextmanager
def live_concepts(
    base: Base, adapters: Sequence[Adapter], strengths: Sequence[float] | None = None
) -> Iterator[LiveConcepts]:
    """Load concepts beside the base model's weights, which are never changed, and their tokens until the end.

    Args:
        strengths: one factor per adapter; None for 1.

    Raises:
        SboraError: an adapter for another base model, or two with the same name or token.
    """
    if base.family.denoiser != "unet":
        raise SboraError(
            f"regions and gating support Stable Diffusion 1.x, 2.x and XL, {base.id} is a {base.family.pipeline}",
            "leave out --region and gated",
        )
    strengths = matching_strengths(adapters, strengths)
    if not all(map(math.isfinite, strengths)):
        raise SboraError(f"got strengths {', '.join(map(str, strengths))}, expected finite numbers")
    for adapter in adapters:
        check_base(adapter, base)
        if adapter.dense or adapter.spec.embedding_layers:
            raise SboraError(
                f"{adapter.spec.name} is of the method {adapter.spec.method}: regions and gating support SBoRA only",
                "leave out --region and gated",
            )
    check_distinct(adapters)
    live = LiveConcepts(base, adapters, strengths)
    ordered = sorted(adapters, key=lambda adapter: adapter.spec.name)
    embeddings = {key: value for adapter in ordered for key, value in adapter.tokens.items()}
    with live.hooked(), added_tokens(base, embeddings) if embeddings else nullcontext():
        yield live


def _ready(factor: Factor, strength: float, weight: Tensor) -> Factor:
    dtype = weight.dtype if weight.is_floating_point() else DTYPE
    return Factor(factor.index.to(weight.device), (factor.weight * strength).to(weight.device, dtype))


def _token_ids(pipeline: Any, prompt: str) -> list[int]:
    """Return the ids that the text encoder gets, padding included."""
    tokenizer = pipeline.tokenizer
    text = pipeline.maybe_convert_prompt(prompt, tokenizer)
    size = tokenizer.model_max_length
    return tokenizer(text, padding="max_length", max_length=size, truncation=True).input_ids


def _words(adapter: Adapter) -> list[str]:
    """Return the vocabulary's entries of an adapter's tokens, as tokens.added_tokens names them."""
    sizes = {key.split(".", 1)[1]: len(vectors) for key, vectors in adapter.tokens.items()}
    return [word for token, size in sizes.items() for word in (token, *(f"{token}_{n}" for n in range(1, size)))]
