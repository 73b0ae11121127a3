"""Write concepts into a base model, remove them bit for bit, and generate batches of images."""

import logging
import math
import re
import textwrap
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from PIL import Image

from sbora_diffusion.adapters.file import Adapter, Factor, check_fits
from sbora_diffusion.data.concept import ConceptImage
from sbora_diffusion.models.base import Base
from sbora_diffusion.models.families.base import expanded
from sbora_diffusion.models.tokens import added_tokens
from sbora_diffusion.utils.errors import SboraError, guess
from sbora_diffusion.utils.text import TOKEN, tokens_in

log = logging.getLogger(__name__)


class ConceptPatcher:
    """Write concepts into a base model, weights and tokens, and remove any of them again.

    The weights depend only on which concepts are written and how strongly, not on the order of the calls; without any,
    they are the original ones, bit for bit. A strength scales what a concept adds to the weights, not its token. In
    quantised layers, concepts add the same change to the layer's output instead.
    """

    def __init__(self, base: Base) -> None:
        from sbora_diffusion.adapters.weight_patcher import AdapterPatcher

        self._base = base
        self._weights = {component: AdapterPatcher(base.component(component)) for component in base.adapted}
        self._concepts: dict[str, tuple[Adapter, float]] = {}
        self._factors: dict[str, dict[str, Factor]] = {}
        self._tokens = ExitStack()

    @property
    def strengths(self) -> dict[str, float]:
        """The written concepts' strengths by name."""
        return {name: self._concepts[name][1] for name in sorted(self._concepts)}

    def write(self, adapters: Sequence[Adapter], strengths: Sequence[float] | None = None) -> None:
        """Write concepts into the base model, or none of them.

        Args:
            strengths: one factor per adapter; None for 1.

        Raises:
            SboraError: an adapter for another base model, a name or token that is already in use.
        """
        from sbora_diffusion.adapters.weight_patcher import needs_original, written_factors

        strengths = matching_strengths(adapters, strengths)
        for adapter in adapters:
            check_base(adapter, self._base)
        check_distinct([*(adapter for adapter, _ in self._concepts.values()), *adapters])
        if self._concepts and any(map(needs_original, adapters)):
            raise SboraError(
                "a DoRA adapter reads the base weights", "write it together with the others, not after them"
            )
        if not adapters:
            return
        before = dict(self._concepts)
        try:
            for adapter in adapters:
                self._factors[adapter.spec.name] = written_factors(adapter, self._base.layers)
            for adapter, strength in zip(adapters, strengths, strict=True):
                self._concepts[adapter.spec.name] = adapter, strength
            self._renew_tokens()
            for name in self._concepts.keys() - before.keys():
                self._write_weights(name)
        except BaseException:
            self._remove(self._concepts.keys() - before.keys())
            raise

    def set_strength(self, name: str, strength: float) -> None:
        """Make a written concept stronger or weaker, and leave the others unchanged."""
        self._check_written([name])
        adapter, before = self._concepts[name]
        try:
            self._concepts[name] = adapter, strength
            self._write_weights(name)
        except BaseException:
            self._concepts[name] = adapter, before
            raise

    def restore(self, names: Sequence[str]) -> None:
        """Remove concepts: the base model is as if they had never been written."""
        self._check_written(names)
        if names:
            self._remove(set(names))

    def restore_all(self) -> None:
        """Remove all concepts: the base model is the original one, bit for bit."""
        self._remove(set(self._concepts))

    def _check_written(self, names: Sequence[str]) -> None:
        for name in names:
            if name not in self._concepts:
                known = ", ".join(sorted(self._concepts)) or "nothing"
                raise SboraError(f"{name!r} is not written into the base model, only {known} is")

    def _write_weights(self, name: str) -> None:
        from sbora_diffusion.adapters.weight_patcher import written_side

        adapter, strength = self._concepts[name]
        for component, written in self._weights.items():
            own = {
                k.removeprefix(f"{component}."): f
                for k, f in self._factors[name].items()
                if k.split(".")[0] == component
            }
            written.write(name, own, written_side(adapter), strength)

    def _remove(self, names: set[str]) -> None:
        self._concepts = {name: concept for name, concept in self._concepts.items() if name not in names}
        for written in self._weights.values():
            for name in names.intersection(written.names):
                written.restore(name)
        self._renew_tokens()

    def _renew_tokens(self) -> None:
        """Replace the tokens by those of the written concepts, in the order of the names."""
        self._tokens.close()
        adapters = [adapter for _, (adapter, _) in sorted(self._concepts.items())]
        embeddings = {key: value for adapter in adapters for key, value in adapter.tokens.items()}
        if any(adapter.spec.embedding_layers for adapter in adapters):
            counts = {key: adapter.spec.embedding_layers for adapter in adapters for key in adapter.tokens}
            from sbora_diffusion.models.layerwise_tokens import layerwise_tokens

            self._tokens.enter_context(layerwise_tokens(self._base, embeddings, counts))
        elif embeddings:
            self._tokens.enter_context(added_tokens(self._base, embeddings))


@contextmanager
def applied(
    base: Base, adapters: Sequence[Adapter], strengths: Sequence[float] | None = None
) -> Iterator[ConceptPatcher]:
    """Write concepts into the base model, and restore its weights and tokens bit for bit at the end.

    Inside the block, the returned patcher can add, remove, strengthen and weaken concepts.

    Args:
        strengths: one factor per adapter; None for 1.

    Raises:
        SboraError: an adapter for another base model, or two with the same token.
    """
    concepts = ConceptPatcher(base)
    try:
        concepts.write(adapters, strengths)
        yield concepts
    finally:
        concepts.restore_all()


def matching_strengths(adapters: Sequence[Adapter], strengths: Sequence[float] | None) -> Sequence[float]:
    """Return one strength per adapter: the given ones, or 1 for each."""
    strengths = strengths or [1.0] * len(adapters)
    if len(strengths) != len(adapters):
        raise SboraError(f"got {len(adapters)} adapters and {len(strengths)} strengths, expected one for each")
    if wrong := [strength for strength in strengths if not math.isfinite(strength)]:
        raise SboraError(f"got the strength {wrong[0]}, expected a number")
    return strengths


def check_base(adapter: Adapter, base: Base) -> None:
    """Raise SboraError unless the adapter was trained for this base model and its embeddings fit the text encoders."""
    check_fits(adapter, base.layer_shapes)
    if adapter.spec.base_fingerprint != base.fingerprint:
        raise SboraError(
            f"adapter {adapter.spec.name!r} was trained for {adapter.spec.base_id} "
            f"[{adapter.spec.base_fingerprint}], the base model is {base.id} [{base.fingerprint}]",
            f"use --base {adapter.spec.base_id}, in the version that it was trained for",
        )
    for key, rows in adapter.tokens.items():
        encoder: Any = getattr(base.pipeline, key.partition(".")[0], None)
        if encoder is not None and rows.shape[1] != (width := encoder.config.hidden_size):
            raise SboraError(
                f"the embedding {key} of {adapter.spec.name!r} has {rows.shape[1]} dimensions, not {width}",
                f"it belongs to other text encoders than {base.id} has: train it anew, or import it with its own",
            )


def check_distinct(adapters: Sequence[Adapter]) -> None:
    """Raise SboraError if two adapters share a name or a token; tokenizers ignore case."""
    for what, lists in (
        ("name", [[adapter.spec.name] for adapter in adapters]),
        ("token", [[token.casefold() for token in adapter.spec.tokens] for adapter in adapters]),
    ):
        seen: set[str] = set()
        for word in (word for words in lists for word in words):
            if word in seen:
                raise SboraError(f"two adapters bring the {what} {word!r}", "merge or bake them: that renames tokens")
            seen.add(word)


def generate(
    base: Base,
    prompts: Sequence[str],
    *,
    seeds: Sequence[int],
    steps: int | None = None,
    guidance: float | None = None,
    negative_prompt: str = "",
) -> list[Image.Image]:
    """Generate one image for each pair of prompt and seed, at the base model's own resolution.

    An image depends on its own prompt and seed only, not on what else is in the call.

    Args:
        steps, guidance: None for the base model's defaults.

    Raises:
        SboraError: a `<token>` that no applied concept provides.
    """
    if len(prompts) != len(seeds) or not prompts:
        raise SboraError(
            f"got {len(prompts)} prompts and {len(seeds)} seeds, expected the same number of both, at least one"
        )
    check_tokens(base, [*prompts, negative_prompt])
    return base.sample(prompts, seeds=seeds, steps=steps, guidance=guidance, negative_prompt=negative_prompt)


def check_tokens(base: Base, prompts: Sequence[str]) -> None:
    """Raise SboraError for a `<token>` that no loaded concept provides, or that the end of a long prompt cuts off."""
    known = {word for reader in base.learners for word in base.tokenizer(reader).get_added_vocab()}
    for prompt in prompts:
        if any("\ud800" <= letter <= "\udfff" for letter in prompt):  # command-line bytes that are not UTF-8
            raise SboraError(f"got the prompt {prompt!r}, expected text in UTF-8")
        if missing := sorted({*tokens_in(prompt)} - known):
            special = {mark for reader in base.learners for mark in base.tokenizer(reader).all_special_tokens}
            have = sorted(set(filter(TOKEN.fullmatch, known)) - special)
            raise SboraError(
                f"no loaded concept brings the token {missing[0]}, known: {', '.join(have) or 'none'}",
                f"{guess(missing[0], have)}or add --adapter FILE" if have else "add --adapter FILE",
            )
        _check_read(base, prompt, repr(textwrap.shorten(prompt, 60, placeholder=" …")))


def check_captions(base: Base, images: Sequence[ConceptImage]) -> None:
    """Raise SboraError if a caption's end cuts a learned token off; warn of captions that are read in part."""
    cut = [image.path.name for image in images if _check_read(base, image.caption, f"the caption of {image.path}")]
    if cut:
        length = base.tokenizer(base.learners[0]).model_max_length
        log.warning("captions are truncated to the %d tokens that the text encoder reads: %s", length, ", ".join(cut))


def _check_read(base: Base, prompt: str, described: str) -> bool:
    """Return whether the first text encoder reads only a part of a prompt.

    Raises:
        SboraError: it does not read every vector of a learned token.
    """
    tokenizer = base.tokenizer(base.learners[0])
    whole = Counter(tokenizer(expanded([prompt], tokenizer)[0], verbose=False).input_ids)
    read = Counter(base.family.split(base.pipeline, base.tokenize([prompt]))[0][0].tolist())
    lost = whole - read
    names = [re.sub(r"(?<=>)_\d+$", "", tokenizer.convert_ids_to_tokens(number)) for number in lost]
    if named := [name for name in names if TOKEN.fullmatch(name) and name not in tokenizer.all_special_tokens]:
        raise SboraError(
            f"{described} is too long: {named[0]} is beyond its {read.total()} tokens", "name the concept earlier"
        )
    return bool(lost)
