"""Adapters on anybody's diffusers pipeline: written into its weights, and removed again bit for bit."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline

from sbora_diffusion.adapters.file import Adapter
from sbora_diffusion.inference.generate import ConceptPatcher
from sbora_diffusion.library.library import Library, load_adapters
from sbora_diffusion.models.base import Base
from sbora_diffusion.utils.errors import SboraError

LEGACY_EOS = 2  # `eos_token_id` in the published configs of many CLIPs, by mistake
HANDLE = "_sbora_adapters"  # attribute of a denoiser that has adapters: they live as long as the model
PRECISIONS = {torch.bfloat16: "bf16", torch.float16: "fp16"}


class AppliedAdapters:
    """Handle of the adapters that are written into a pipeline; a context manager that removes them at the end.

    The weights depend only on which adapters are applied and how strongly, not on the order of the calls. Without any,
    weights, tokenizers and embeddings are the original ones, bit for bit. While adapters are applied, nothing else may
    change these weights.
    """

    def __init__(self, base: Base, library: Library | str | Path) -> None:
        self._base, self._library = base, library
        self._patcher, self._stack = ConceptPatcher(base), ExitStack()
        self._stack.callback(self._patcher.restore_all)
        self._stack.enter_context(_real_eos_tokens(base))
        vars(base.denoiser)[HANDLE] = self
        self._stack.callback(vars(base.denoiser).pop, HANDLE)

    @property
    def strengths(self) -> dict[str, float]:
        """The applied adapters' strengths by name."""
        return self._patcher.strengths

    def add(
        self,
        adapters: Adapter | str | Path | Sequence[Adapter | str | Path],
        strengths: Sequence[float] | None = None,
    ) -> None:
        """Apply further adapters, or none of them if one does not fit."""
        self._check_open()
        self._patcher.write(load_adapters(adapters, self._library), strengths)

    def remove(self, *names: str) -> None:
        """Remove adapters by name: the pipeline is as if they had never been applied."""
        self._check_open()
        self._patcher.restore(names)

    def set_strength(self, name: str, strength: float) -> None:
        """Make an applied adapter stronger or weaker."""
        self._check_open()
        self._patcher.set_strength(name, strength)

    def close(self) -> None:
        """Remove all adapters; calling it again does nothing."""
        self._stack.close()

    def _check_open(self) -> None:
        if vars(self._base.denoiser).get(HANDLE) is not self:
            raise SboraError("the handle is closed", "call sbora_diffusion.apply again")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        listed = ", ".join(f"{name}={strength:g}" for name, strength in self.strengths.items())
        return f"AppliedAdapters({listed})"


def apply(
    pipe: DiffusionPipeline,
    adapters: Adapter | str | Path | Sequence[Adapter | str | Path],
    strengths: Sequence[float] | None = None,
    *,
    library: Library | str | Path = "adapters",
) -> AppliedAdapters:
    """Write adapters into a diffusers pipeline of the base model that they were trained for, tokens included.

    Args:
        adapters: adapters, names in the library, or paths.
        strengths: one factor per adapter; None for 1. A strength scales the change of the weights, not the token.

    Raises:
        SboraError: a pipeline of an unknown kind, of other weights, or to which adapters are applied already; two
            adapters with the same name or token.
    """
    base = base_of(pipe)
    if current := vars(base.denoiser).get(HANDLE):
        names = ", ".join(current.strengths) or "none"
        raise SboraError(
            f"the pipeline has a handle already, with the adapters {names}", "use its add(), or close() it"
        )
    handle = AppliedAdapters(base, library)
    try:
        handle.add(adapters, strengths)
    except BaseException:
        handle.close()
        raise
    return handle


def base_of(pipe: DiffusionPipeline) -> Base:
    """Wrap a loaded pipeline, which stays as it is."""
    base = Base(str(pipe.config.get("_name_or_path") or type(pipe).__name__), pipe)
    if any(layer.weight.is_meta for layer in base.layers.values()):
        raise SboraError("the pipeline's weights are not in memory", "apply before enable_sequential_cpu_offload()")
    denoiser: Any = base.denoiser
    return replace(base, precision=PRECISIONS.get(denoiser.dtype, "fp32"))


@contextmanager
def _real_eos_tokens(base: Base) -> Iterator[None]:
    """Meanwhile let CLIPs pool at the token that ends the prompt, not at a learned token, whose id is higher."""
    with ExitStack() as stack:
        for spec in base.family.present(base.pipeline):
            encoder: Any = base.component(spec.component)
            end = base.tokenizer(spec).eos_token_id
            for part in (encoder.config, *encoder.modules()):
                if getattr(part, "eos_token_id", None) == LEGACY_EOS != end:
                    part.eos_token_id = end
                    stack.callback(setattr, part, "eos_token_id", LEGACY_EOS)
        yield
