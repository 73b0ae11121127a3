"""lm-evaluation-harness's model with beam search whose texts do not depend on the batch."""

from typing import Any

from lm_eval.models.huggingface import HFLM
from torch import Tensor

_Harness: Any = HFLM  # its decorator hides its type


class FullBeamsModel(_Harness):
    """Run every beam to its own end of text.

    The harness ends a batch as soon as its first rows contain a stop sequence, and these are the beams of one question.
    Here `generate` gets no stop sequences with beams; the harness trims the texts afterwards.
    """

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **options: Any) -> Tensor:
        if options.get("num_beams", 1) > 1:
            stop, options = [], options | {"eos_token_id": self._ends()}
        return super()._model_generate(context, max_length, stop, **options)

    def _ends(self) -> list[int]:
        """Return the model's own ends of text and the tokenizer's, with which answers are trained."""
        own = self.model.generation_config.eos_token_id
        listed = own if isinstance(own, list) else [own]
        return sorted({end for end in (*listed, self.tokenizer.eos_token_id) if end is not None})
