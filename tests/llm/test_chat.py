"""A conversation: streaming, history, switching adapters, errors."""

from pathlib import Path
from typing import Any

import pytest
import torch

from sbora_diffusion.llm.adapters import load_adapter
from sbora_diffusion.llm.base import load_base
from sbora_diffusion.llm.chat import HELP, Chat
from sbora_diffusion.llm.config import LlmConfig
from sbora_diffusion.llm.data import IGNORED, tokenise, training_prompt
from sbora_diffusion.llm.run_folder import Run
from sbora_diffusion.llm.train import train
from sbora_diffusion.utils.errors import SboraError

from .tiny import merging_tokenizer


def ignore(piece: str) -> None:
    """Drop a piece of an answer."""


def answers(chat: Chat, *names: str) -> list[str]:
    """Return the answers to one message with each adapter."""
    made = []
    for name in names:
        chat.command("/new")
        chat.switch(name)
        made.append(chat.say("What is 3 + 1?", ignore))
    return made


def test_switching_matches_separately_loaded_adapters(base: str, data: Path, tmp_path: Path) -> None:
    for name, method in (("first", "sbora-fa"), ("second", "lora")):
        settings = {"rank": "4", "steps": "8", "learning_rate": "0.05"}
        run = Run(base=base, data=data, method=method, quantize="none")
        train(run, LlmConfig.from_recipe("small", settings), tmp_path / name)
    expected = []
    for names in ([], ["first"], ["second"]):
        model, tokenizer = load_base(base)
        for name in names:
            model = load_adapter(model, str(tmp_path / name), name).eval()
        expected += answers(
            Chat(model, tokenizer, dict(zip(names, names, strict=True)), 12, 0.0), names[0] if names else "none"
        )
    model, tokenizer = load_base(base)
    for name in ("first", "second"):
        model = load_adapter(model, str(tmp_path / name), name).eval()
    together = answers(
        Chat(model, tokenizer, {"first": "first", "second": "second"}, 12, 0.0), "none", "first", "second"
    )
    assert together == expected
    assert len(set(expected)) == 3


def test_answers_are_streamed_and_remembered(base: str) -> None:
    torch.manual_seed(0)
    model, tokenizer = load_base(base)
    chat = Chat(model, tokenizer, {}, 8, 0.5)
    pieces: list[str] = []
    chat.say("hi", pieces.append)
    assert len(pieces) > 1
    assert [message["role"] for message in chat.messages] == ["user", "assistant"]
    assert chat.messages[1]["content"] == "".join(pieces)


def prompt_ids(chat: Chat, model: Any, text: str, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return the token ids of the prompt."""
    seen: list[int] = []
    generate = model.generate

    def watched(**options: Any) -> Any:
        seen.extend(options["input_ids"][0].tolist())
        return generate(**options)

    monkeypatch.setattr(model, "generate", watched)
    chat.say(text, ignore)
    return seen


@pytest.mark.parametrize("template", ["adapters", "alpaca", "plain", "chat"])
def test_prompt_uses_the_known_template(template: str, base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = load_base(base)
    chat = Chat(model, tokenizer, {}, 4, 0.0, {"none": template})
    expected = training_prompt(template, "hi") if template != "chat" else "<user>hi\n<assistant>"
    assert prompt_ids(chat, model, "hi", monkeypatch) == tokenizer(expected)["input_ids"]


def test_prompt_leaves_the_last_blank_to_the_answer(base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = load_base(base)
    merging = merging_tokenizer("### Response: yes A")
    model.resize_token_embeddings(1000)
    chat = Chat(model, merging, {}, 4, 0.0)
    [example] = tokenise([{"instruction": "hi", "output": "yes"}], merging, LlmConfig.from_recipe("small", {}))
    before = [token for token, label in zip(*example.values(), strict=True) if label == IGNORED]
    assert prompt_ids(chat, model, "hi", monkeypatch) == before


def test_commands(base: str) -> None:
    chat = Chat(*load_base(base), {}, 8, 0.0)
    assert chat.command("/adapters") == "none"
    assert chat.command("/adapter none") == "now: none"
    assert chat.command("/nonsense") == HELP
    with pytest.raises(SboraError, match="no adapter 'x', choose from none"):
        chat.command("/adapter x")


def test_a_conversation_without_room_for_an_answer_is_rejected(base: str) -> None:
    chat = Chat(*load_base(base), {}, 8, 0.0)
    with pytest.raises(SboraError, match=r"has 2\d\d\d tokens, the model 1024 positions; try /new"):
        chat.say("x" * 2000, ignore)
    assert chat.messages == []
    chat.say("x" * (1022 - len("<user>\n<assistant>")), ignore)  # two are left
    assert len(chat.messages) == 2


def test_a_failure_of_the_model_is_reported(base: str) -> None:
    model, tokenizer = load_base(base)
    chat = Chat(model, tokenizer, {}, 8, 0.0)
    model.lm_head = torch.nn.Linear(7, 7)
    with pytest.raises(SboraError, match="the model failed: mat1 and mat2 shapes"):
        chat.say("hi", ignore)
    assert chat.messages == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, BrokenPipeError])
def test_an_exception_of_the_callback_stops_the_model(error: type[BaseException], base: str) -> None:
    chat, pieces = Chat(*load_base(base), {}, 900, 0.0), []

    def stop(piece: str) -> None:
        pieces.append(piece)
        raise error

    with pytest.raises(error):
        chat.say("hi", stop)
    assert len(pieces) == 1
    assert chat.messages == []
