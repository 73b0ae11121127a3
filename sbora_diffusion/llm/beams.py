"""lm-evaluation-harness's model, with beams that run to their own ends whatever else is in the batch."""

from typing import Any

from lm_eval.models.huggingface import HFLM
from torch import Tensor

_Harness: Any = HFLM  # its decorator hides what it is from type checkers


class WholeBeams(_Harness):
    """The harness stops a batch as soon as its first rows have met a stop, and with beams these are one question's.

    So beams get no stops: `generate` ends each at its end of text, and the harness trims the texts afterwards.
    """

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **options: Any) -> Tensor:
        if options.get("num_beams", 1) > 1:
            stop, options = [], options | {"eos_token_id": self._ends()}
        return super()._model_generate(context, max_length, stop, **options)

    def _ends(self) -> list[int]:
        """The model's own ends of text and the tokenizer's, which answers are trained with."""
        own = self.model.generation_config.eos_token_id
        listed = own if isinstance(own, list) else [own]
        return sorted({end for end in (*listed, self.tokenizer.eos_token_id) if end is not None})
