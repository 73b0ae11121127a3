"""A whole pipeline folder with concepts in weights and tokenizer, for programs without adapter support."""

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import nn

from sbora_diffusion import __version__
from sbora_diffusion.adapters.file import Adapter
from sbora_diffusion.adapters.merge import distinct_tokens
from sbora_diffusion.inference.generate import applied
from sbora_diffusion.models.base import Base
from sbora_diffusion.models.loading import RECORD
from sbora_diffusion.models.tokens import TokenEmbedding
from sbora_diffusion.utils.errors import SboraError
from sbora_diffusion.utils.files import whole_folder

_ORIGIN = {"_name_or_path", "is_local", "local_files_only"}  # in configs: where and how a model was loaded


def bake(
    base: Base, adapters: Sequence[Adapter], strengths: Sequence[float], folder: Path, force: bool = False
) -> list[str]:
    """Write a pipeline folder that `DiffusionPipeline.from_pretrained` loads, or nothing at all.

    Adapters of both sides, of any seed, and on the same columns can be combined, because dense weights hold any sum. A
    name or token that several have is renamed in all but the first. The base model is left unchanged.

    Returns:
        The concepts' tokens in the folder.

    Raises:
        SboraError: the folder exists (with `force`: and was not written by bake), an adapter is for another base model.
    """
    _check_free(folder, force)
    layerwise = [adapter.spec.name for adapter in adapters if adapter.spec.embedding_layers]
    if layerwise:
        raise SboraError(
            f"{layerwise[0]} has embeddings for each layer, which an ordinary pipeline cannot hold",
            "train it with --set layerwise_tokens=0",
        )
    named = distinct_tokens(adapters)
    with whole_folder(folder) as temporary:
        with applied(base, named, strengths), _plain_vocabularies(base):
            base.pipeline.save_pretrained(temporary)
        _forget_origin(temporary)
        record = _record(base, adapters, named, strengths)
        (temporary / RECORD).write_text(json.dumps(record, indent=1) + "\n")
    return [token for adapter in named for token in adapter.spec.tokens]


def _check_free(folder: Path, force: bool) -> None:
    if not folder.exists():
        return
    if not (folder / RECORD).is_file():
        raise SboraError(f"{folder} exists, and is no pipeline that was baked before", hint="Choose another folder.")
    if not force:
        raise SboraError(f"{folder} exists", hint="Choose another folder, or overwrite it with --force.")


@contextmanager
def _plain_vocabularies(base: Base) -> Iterator[None]:
    """Put learned tokens into the text encoders' own embeddings, so that they are saved as plain models."""
    with ExitStack() as stack:
        for reader in base.learners:
            encoder: Any = base.component(reader.component)
            extended = encoder.get_input_embeddings()
            if isinstance(extended, TokenEmbedding):
                stack.callback(encoder.set_input_embeddings, extended)
                stack.callback(setattr, encoder.config, "vocab_size", encoder.config.vocab_size)
                rows = torch.cat([extended.base.weight.detach(), extended.learned.detach()])
                encoder.set_input_embeddings(nn.Embedding.from_pretrained(rows))
                encoder.config.vocab_size = len(rows)
        yield


def _forget_origin(folder: Path) -> None:
    """Remove from the configs where and how the base model was loaded on this machine."""
    for path in folder.rglob("*.json"):
        settings = json.loads(path.read_text())
        if settings.keys() & _ORIGIN:
            kept = {key: value for key, value in settings.items() if key not in _ORIGIN}
            path.write_text(json.dumps(kept, indent=2, ensure_ascii=False) + "\n")


def _record(
    base: Base, adapters: Sequence[Adapter], named: Sequence[Adapter], strengths: Sequence[float]
) -> dict[str, object]:
    """Describe what the folder contains and what it was made from."""
    return {
        "base_id": base.id,
        "kind": base.kind,
        "base_fingerprint": base.fingerprint,
        "concepts": [
            {
                "name": new.spec.name,
                "tokens": new.spec.tokens,
                "strength": strength,
                "file": {"name": old.spec.name, "sha256": sha256(old.to_bytes()).hexdigest()},
            }
            for old, new, strength in zip(adapters, named, strengths, strict=True)
        ],
        "versions": {"sbora-diffusion": __version__, "diffusers": diffusers.__version__},
    }
