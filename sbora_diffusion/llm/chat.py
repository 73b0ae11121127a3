"""A conversation with a language model, streamed, with adapters that can be switched between answers."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import TextStreamer

from sbora_diffusion.llm.adapters import load_adapter, read_about
from sbora_diffusion.llm.base import load_base
from sbora_diffusion.llm.data import common_prefix, training_prompt
from sbora_diffusion.utils.errors import SboraError

NONE = "none"  # the base model without an adapter
HELP = """/adapter NAME  switch to an adapter ("none": the base model)
/adapters      list the adapters
/new           start a new conversation
/quit          leave"""


class Chat:
    """A model, the adapters in it, and the conversation so far.

    Args:
        model: causal; a PEFT model if there are adapters.
        adapters: the names that users see -> the names in the model; the last one is active.
        templates: the names that users see -> the templates of the training, if known.
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
        self.adapters, self.templates = dict(adapters), dict(templates or {})
        self._positions: int | None = getattr(model.config, "max_position_embeddings", None)
        self._max_tokens = max_tokens
        self._sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
        self.messages: list[dict[str, str]] = []
        self.active = NONE
        self.switch(next(reversed(self.adapters), NONE))

    def switch(self, name: str) -> None:
        """Activate an adapter; the conversation continues."""
        if name not in (*self.adapters, NONE):
            raise SboraError(f"no adapter {name!r}, choose from {', '.join((*self.adapters, NONE))}")
        self.active = name
        if name != NONE:
            self._model.set_adapter(self.adapters[name])

    def say(self, text: str, on_piece: Callable[[str], None]) -> str:
        """Generate the answer, pass its pieces to a callback, and return it; an exception of the callback stops it.

        Raises:
            SboraError: the conversation leaves no room for an answer, or the model failed; the message is dropped.
        """
        messages = [*self.messages, {"role": "user", "content": text}]
        ids = torch.tensor([self._prompt(messages)], device=self._model.device)
        options = self._sampling | {"max_new_tokens": self._room(ids.shape[1])}
        streamer: Any = _CallbackStreamer(self._tokenizer, on_piece)
        try:
            with torch.inference_mode(), self._adapter():
                self._model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), streamer=streamer, **options)
        except OSError:
            raise  # of the callback's output
        except Exception as error:
            raise SboraError(f"the model failed: {error}") from error
        self.messages = [*messages, {"role": "assistant", "content": streamer.text}]
        return streamer.text

    def command(self, line: str) -> str:
        """Execute a line that begins with a slash, and return the reply."""
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

    def _room(self, length: int) -> int:
        """Return the number of tokens that may follow."""
        if not self._positions:
            return self._max_tokens
        if length >= self._positions:
            raise SboraError(f"the conversation has {length} tokens, the model {self._positions} positions; try /new")
        return min(self._max_tokens, self._positions - length)

    def _prompt(self, messages: list[dict[str, str]]) -> list[int]:
        """Return the token ids of the conversation in the tokenizer's chat template.

        For an adapter that was trained on another template, that with only the last message as its instruction;
        without a chat template, Alpaca's.
        """
        template = self.templates.get(self.active, "chat")
        if template == "chat" and self._tokenizer.chat_template:
            return self._tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        text = training_prompt("alpaca" if template == "chat" else template, messages[-1]["content"])
        prompt, whole = (self._tokenizer(part)["input_ids"] for part in (text, f"{text}A"))
        return prompt[: common_prefix(prompt, whole)] if text.endswith(" ") else prompt  # a last blank is the answer's

    def _adapter(self) -> AbstractContextManager[Any]:
        disabled = self.active == NONE and isinstance(self._model, PeftModel)
        return self._model.disable_adapter() if disabled else nullcontext()


def load_chat(base: str, adapters: Sequence[str], quantize: str, max_tokens: int, temperature: float) -> Chat:
    """Load a base model and adapters, named after their files or folders, for a conversation.

    Raises:
        SboraError: two adapters of one name, or one named "none"; what `load_base` and `load_adapter` raise.
    """
    sources = {_name(source): source for source in adapters}
    if len(sources) < len(adapters) or NONE in sources:
        raise SboraError(
            f"got adapters named {', '.join(map(_name, adapters))}", f"names must differ, also from {NONE!r}"
        )
    model, tokenizer = load_base(base, "auto", quantize)
    inside = {name: f"chat-{number}" for number, name in enumerate(sources)}  # PEFT does not accept every name
    for name, source in sources.items():
        model = load_adapter(model, source, inside[name]).eval()
    templates = {name: read_about(source).get("config", {}).get("template", "chat") for name, source in sources.items()}
    return Chat(model, tokenizer, inside, max_tokens, temperature, templates)


def _name(source: str) -> str:
    """Return a file's name without its suffix, or a folder's whole name."""
    path = Path(source).resolve()
    return path.stem if path.is_file() else path.name


class _CallbackStreamer(TextStreamer):
    """Pass finished pieces of the answer to a callback."""

    def __init__(self, tokenizer: Any, on_piece: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._on_piece, self.text = on_piece, ""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:  # noqa: ARG002
        self.text += text
        self._on_piece(text)
