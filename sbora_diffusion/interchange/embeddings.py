"""Files of learned tokens, one each, in the layout of diffusers, kohya, or SDXL's two encoders."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sbora_diffusion.interchange.files import read_tensors
from sbora_diffusion.utils.errors import SboraError
from sbora_diffusion.utils.text import as_token

log = logging.getLogger(__name__)
BUNDLED = "bundle_emb."  # prefix of embeddings that A1111 stores in LoRA files
_TOKEN, _NOUN = "sbora.token", "sbora.noun"  # metadata
_PARTS = {"emb_params": "text_encoder", "clip_l": "text_encoder", "clip_g": "text_encoder_2"}
_BUNDLED_ENDS = (".string_to_param.*", *(f".{part}" for part in _PARTS))


@dataclass(frozen=True, eq=False)
class Embedding:
    """A learned token."""

    token: str
    noun: str | None  # of the token's class, if it is in the file
    vectors: dict[str, Tensor]  # component -> (n, hidden) float32


def embedding_file(embedding: Embedding, *, kohya: bool) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return tensors and metadata of a token's file.

    Args:
        kohya: store one encoder's embedding as `emb_params`, for ComfyUI and A1111, instead of under the token itself,
            for diffusers. Two encoders' embeddings are `clip_l` and `clip_g` in both layouts.
    """
    vectors = embedding.vectors
    if "text_encoder_2" in vectors:
        tensors = {part: vectors[_PARTS[part]] for part in ("clip_l", "clip_g") if _PARTS[part] in vectors}
    else:
        tensors = {"emb_params" if kohya else embedding.token: vectors["text_encoder"]}
    noun = {_NOUN: embedding.noun} if embedding.noun else {}
    return tensors, {"format": "pt", _TOKEN: embedding.token, **noun}


def read_embedding(path: Path) -> Embedding:
    """Read a token's file of any layout; a token that has no name, or one without letters, is named after the file."""
    metadata, tensors = read_tensors(path)
    try:
        return _embedding(metadata.get(_TOKEN), path.stem, metadata.get(_NOUN), tensors)
    except SboraError as defect:
        raise SboraError(f"{path}: {defect}", defect.hint) from None


def bundled_embeddings(tensors: Mapping[str, Tensor]) -> list[Embedding]:
    """Return the tokens in a LoRA file, whose keys begin with `BUNDLED`."""
    tokens: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        if key.startswith(BUNDLED):
            end = next((end for end in _BUNDLED_ENDS if key.endswith(end)), None)
            if end is None:
                raise SboraError(f"has the embedding {key!r}, expected one that ends in {', '.join(_BUNDLED_ENDS)}")
            part = "emb_params" if end == _BUNDLED_ENDS[0] else end[1:]
            tokens.setdefault(key.removeprefix(BUNDLED).removesuffix(end), {})[part] = tensor
    return [_embedding(None, name, None, parts) for name, parts in tokens.items()]


def _embedding(own: str | None, name: str, noun: str | None, tensors: Mapping[str, Tensor]) -> Embedding:
    found = name
    if tensors.keys() and tensors.keys() <= _PARTS.keys():
        vectors = {_PARTS[part]: tensor for part, tensor in tensors.items()}
        if len(vectors) < len(tensors):
            raise SboraError("has two embeddings for one text encoder, emb_params and clip_l")
    elif len(tensors) == 1:
        found, vectors = next(iter(tensors)), {"text_encoder": next(iter(tensors.values()))}
    else:
        raise SboraError(f"has {len(tensors)} keys, expected one token, or {', '.join(_PARTS)}")
    token = own or as_token(found, name)
    if found != token and own is None:
        log.info("the embedding %r is imported as the token %s: write %s in prompts", found, token, token)
    return Embedding(token, noun, {place: _matrix(token, tensor) for place, tensor in vectors.items()})


def _matrix(token: str, tensor: Tensor) -> Tensor:
    matrix = tensor.unsqueeze(0) if tensor.ndim == 1 else tensor
    if matrix.ndim != 2 or matrix.numel() == 0 or not matrix.is_floating_point():
        got = f"{tensor.dtype} {tuple(tensor.shape)}"
        raise SboraError(f"token {token!r}: got {got}, expected a floating-point matrix (n, hidden)")
    if not torch.isfinite(matrix).all():
        raise SboraError(f"token {token!r}: some values are not finite")
    return matrix.float()
