"""A conversation with a language model, answer by answer, with adapters switched in between."""

import threading
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from peft import PeftModel
from transformers import TextIteratorStreamer

from sbora_diffusion.errors import SboraError
from sbora_diffusion.llm.template import training_prompt

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
    """

    def __init__(
        self, model: Any, tokenizer: Any, adapters: Mapping[str, str], max_tokens: int, temperature: float
    ) -> None:
        self._model, self._tokenizer = model, tokenizer
        self.adapters = dict(adapters)
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
        """The answer, piece by piece as it is made."""
        self.messages.append({"role": "user", "content": text})
        inputs = self._tokenizer(self._prompt(), add_special_tokens=False, return_tensors="pt").to(self._model.device)
        streamer = TextIteratorStreamer(self._tokenizer, skip_prompt=True, skip_special_tokens=True)
        worker = threading.Thread(target=self._generate, args=(dict(inputs), streamer))
        worker.start()
        said = ""
        for piece in streamer:
            said += piece
            yield piece
        worker.join()
        self.messages.append({"role": "assistant", "content": said})

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

    def _prompt(self) -> str:
        """The conversation in the tokenizer's chat template; without one, the last message as an Alpaca instruction."""
        if self._tokenizer.chat_template:
            return self._tokenizer.apply_chat_template(self.messages, add_generation_prompt=True, tokenize=False)
        return (self._tokenizer.bos_token or "") + training_prompt("alpaca", self.messages[-1]["content"])

    def _generate(self, inputs: Mapping[str, Any], streamer: TextIteratorStreamer) -> None:
        try:
            with torch.inference_mode(), self._active():
                self._model.generate(**inputs, **self._options, streamer=streamer)
        finally:
            streamer.end()  # whoever waits for the next piece learns that there is none

    def _active(self) -> AbstractContextManager[Any]:
        has_to_be_off = self.active == NONE and isinstance(self._model, PeftModel)
        return self._model.disable_adapter() if has_to_be_off else nullcontext()
