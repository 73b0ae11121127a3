"""What the text encoders make of captions that a training cannot change, read once and kept."""

import torch
from torch import Tensor

from sbora_diffusion.models.base import Base
from sbora_diffusion.models.families.base import TextConditioning
from sbora_diffusion.models.tokens import is_learned

REMEMBERED = 256  # captions


class TextEmbeddingCache:
    """Reads as `base.read` does while the text encoders are frozen: only captions with a learned token change.

    What is kept is read by itself, not in a batch, so that it is the same whenever it is read.

    Args:
        learns_token: whether the token's embeddings are trained; if not, every caption stays as it is.
    """

    def __init__(self, base: Base, learns_token: bool) -> None:
        self._base, self._learns_token = base, learns_token
        self._known: dict[bytes, TextConditioning] = {}

    def __call__(self, ids: Tensor) -> TextConditioning:
        """Token ids (n, length) to what the text encoders make of them."""
        changes = is_learned(self._base, ids).any(1) if self._learns_token else torch.zeros(len(ids), dtype=torch.bool)
        fresh = iter(_rows(self._base.encode_text(ids[changes])) if changes.any() else ())
        rows = [next(fresh) if new else self._remembered(row) for row, new in zip(ids, changes.tolist(), strict=True)]
        pooled = [row.pooled for row in rows if row.pooled is not None]
        return TextConditioning(torch.stack([row.states for row in rows]), torch.stack(pooled) if pooled else None)

    @torch.no_grad()
    def _remembered(self, ids: Tensor) -> TextConditioning:
        key = ids.cpu().numpy().tobytes()
        found = self._known.get(key) or _rows(self._base.encode_text(ids[None]))[0]
        self._known[key] = found
        if len(self._known) > REMEMBERED:
            self._known.pop(next(iter(self._known)))
        return found


def _rows(text: TextConditioning) -> list[TextConditioning]:
    pooled = [None] * len(text.states) if text.pooled is None else list(text.pooled)
    return [TextConditioning(states, summary) for states, summary in zip(text.states, pooled, strict=True)]
