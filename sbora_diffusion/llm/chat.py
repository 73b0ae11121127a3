"""A conversation with a language model, answer by answer, with adapters switched in between."""

import threading
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import StoppingCriteriaList, TextIteratorStreamer

from sbora_diffusion.llm.data import common_prefix
from sbora_diffusion.llm.template import training_prompt
from sbora_diffusion.utils.errors import SboraError

NONE = "none"  # the base model alone
HELP = """/adapter NAME  switch to an adapter ("none": the base model alone)
/adapters      what there is
/new           forget the conversation
/quit          leave"""


class Chat:
    """A model, the adapters in it, and what was said.

    Args:
        model: causal; a PEFT model if there are adapters.
        adapters: what users call these -> their names in the model.
        templates: what users call these -> the template that they were trained on, where that is known.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        adapters: Mapping[str, str],
        max_tokens: int,
        temperature: float,
        templates: Mapping[str, str] | None = None,
    ) -> None:
        self._model, self._tokenizer = model, tokenizer
        self.adapters, self._templates = dict(adapters), dict(templates or {})
        self._positions: int | None = getattr(model.config, "max_position_embeddings", None)
        self._options: dict[str, Any] = {"max_new_tokens": max_tokens, "do_sample": temperature > 0}
        self._options |= {"temperature": temperature} if temperature > 0 else {}
        self.messages: list[dict[str, str]] = []
        self.active = NONE
        self.switch(next(reversed(self.adapters), NONE))

    def switch(self, name: str) -> None:
        """Make an adapter the active one; what was said stays."""
        if name not in (*self.adapters, NONE):
            raise SboraError(f"no adapter {name!r}, there are {', '.join((*self.adapters, NONE))}")
        self.active = name
        if name != NONE:
            self._model.set_adapter(self.adapters[name])

    def say(self, text: str) -> Iterator[str]:
        """The answer, piece by piece as it is made; whoever stops asking for pieces stops the making.

        Raises:
            SboraError: the conversation leaves no room for an answer, or the model failed; the text is forgotten.
        """
        asked = [*self.messages, {"role": "user", "content": text}]
        ids = torch.tensor([self._prompt(asked)], device=self._model.device)
        options = {"input_ids": ids, "attention_mask": torch.ones_like(ids)} | self._room(ids.shape[1])
        streamer = TextIteratorStreamer(self._tokenizer, skip_prompt=True, skip_special_tokens=True)
        stop, failures = threading.Event(), []
        worker = threading.Thread(target=self._generate, args=(options, streamer, stop, failures))
        worker.start()
        said = ""
        try:
            for piece in streamer:
                said += piece
                yield piece
        finally:
            stop.set()
            worker.join()
        if failures:
            raise SboraError(f"the model failed: {failures[0]}") from failures[0]
        self.messages = [*asked, {"role": "assistant", "content": said}]

    def _room(self, length: int) -> dict[str, int]:
        """How many tokens may follow."""
        wanted = self._options["max_new_tokens"]
        if self._positions and length >= self._positions:
            raise SboraError(f"the conversation has {length} tokens, the model {self._positions} positions; try /new")
        return {"max_new_tokens": min(wanted, self._positions - length) if self._positions else wanted}

    def command(self, line: str) -> str:
        """What a line that begins with a slash does, in words."""
        word, _, rest = line[1:].partition(" ")
        if word == "adapter" and rest.strip():
            self.switch(rest.strip())
            return f"now: {self.active}"
        if word == "adapters":
            return ", ".join((*self.adapters, NONE))
        if word == "new":
            self.messages.clear()
            return "a new conversation"
        return HELP

    def _prompt(self, messages: list[dict[str, str]]) -> list[int]:
        """Token ids of the conversation in the tokenizer's chat template, or of the last message as an instruction in
        the template that the active adapter was trained on, or Alpaca's where there is neither."""
        template = self._templates.get(self.active, "chat")
        if template == "chat" and self._tokenizer.chat_template:
            return self._tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        text = training_prompt("alpaca" if template == "chat" else template, messages[-1]["content"])
        prompt, whole = (self._tokenizer(part)["input_ids"] for part in (text, f"{text}A"))
        return prompt[: common_prefix(prompt, whole)] if text.endswith(" ") else prompt  # a last blank is the answer's

    def _generate(
        self,
        options: dict[str, Any],
        streamer: TextIteratorStreamer,
        stop: threading.Event,
        failures: list[Exception],
    ) -> None:
        def stopped(input_ids: Tensor, scores: Any, **_: Any) -> Tensor:  # noqa: ARG001
            return torch.full((len(input_ids),), stop.is_set(), device=input_ids.device)

        criteria: Any = StoppingCriteriaList([stopped])  # type: ignore[list-item]  # it is only called
        try:
            with torch.inference_mode(), self._active():
                self._model.generate(**self._options | options, streamer=streamer, stopping_criteria=criteria)
        except Exception as error:  # nobody would hear of it in this thread
            failures.append(error)
        finally:
            streamer.end()  # whoever waits for the next piece learns that there is none

    def _active(self) -> AbstractContextManager[Any]:
        has_to_be_off = self.active == NONE and isinstance(self._model, PeftModel)
        return self._model.disable_adapter() if has_to_be_off else nullcontext()
