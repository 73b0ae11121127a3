"""Prompts, exact to the blank, and the tokens that count in the loss."""

import json
from pathlib import Path
from typing import Any

import pytest

from sbora_diffusion.llm.config import LlmConfig
from sbora_diffusion.llm.data import IGNORED, check_lengths, evaluation_prompt, load_records, tokenise, training_prompt
from sbora_diffusion.utils.errors import SboraError

from .tiny import CHAT, merging_tokenizer, tokenizer

GAP = " " * 16
HEAD = "Below is an instruction that describes a task. Write a response that appropriately completes the request."


def decoded(ids: list[int]) -> Any:
    return tokenizer().decode(ids)


def config(**overrides: str) -> LlmConfig:
    return LlmConfig.from_recipe("commonsense", {"cutoff": "512"} | overrides)


def test_training_prompt_of_llm_adapters() -> None:
    expected = f"{HEAD}  \n\n{GAP}### Instruction:\n{GAP}Add.\n{GAP}\n{GAP}### Response:\n{GAP}"
    assert training_prompt("adapters", "Add.") == expected


def test_training_prompt_with_an_input_has_one_blank_after_the_request() -> None:
    text = training_prompt("adapters", "Add.", "1 2")
    assert "completes the request. \n\n" in text
    assert f"### Input:\n{GAP}1 2\n{GAP}\n{GAP}### Response:\n{GAP}" in text


def test_evaluation_prompt_of_llm_adapters() -> None:
    expected = f"{HEAD} \n\n{GAP}### Instruction:\n{GAP}Add.\n\n{GAP}### Response:\n{GAP}"
    assert evaluation_prompt("Add.") == expected


def test_alpaca_prompt() -> None:
    assert training_prompt("alpaca", "Add.") == f"{HEAD}\n\n### Instruction:\nAdd.\n\n### Response: "


def test_train_on_inputs_includes_the_prompt_in_the_loss() -> None:
    records = [{"instruction": "Add.", "output": "3"}]
    [counted] = tokenise(records, tokenizer(), config())
    [masked] = tokenise(records, tokenizer(), config(train_on_inputs="false"))
    assert counted["labels"] == counted["input_ids"] == masked["input_ids"]
    assert decoded([label for label in masked["labels"] if label != IGNORED]) == "3</s>"


def test_eos_only_if_nothing_was_truncated() -> None:
    records = [{"instruction": "Add.", "output": "3"}]
    [short] = tokenise(records, tokenizer(), config())
    [cut] = tokenise(records, tokenizer(), config(cutoff="50"))
    [full] = tokenise(records, tokenizer(), config(cutoff=str(len(short["input_ids"]) - 1)))
    assert short["input_ids"][-1] == 2
    assert len(cut["input_ids"]) == 50
    assert cut["input_ids"][-1] != 2
    assert full["input_ids"] == short["input_ids"][:-1]


def test_target_cutoff_truncates_separately() -> None:
    settings = {"template": "alpaca", "cutoff": "20", "target_cutoff": "3", "train_on_inputs": "false"}
    [example] = tokenise([{"instruction": "Add.", "output": "12345"}], tokenizer(), config(**settings))
    assert decoded(example["input_ids"]) == "<s>" + HEAD[:19] + "123"
    assert example["labels"] == [IGNORED] * 20 + example["input_ids"][20:]


def test_chat_masks_everything_before_the_answer() -> None:
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    settings = {"template": "chat", "train_on_inputs": "false"}
    [example] = tokenise([{"messages": messages}], tokenizer(), config(**settings))
    assert decoded(example["input_ids"]) == "<user>hi\n<assistant>ho\n"
    assert decoded([label for label in example["labels"] if label != IGNORED]) == "ho\n"


@pytest.mark.parametrize("template", ["alpaca", "adapters", "chat"])
def test_first_token_with_the_last_blank_of_the_prompt_counts(template: str) -> None:
    merging = merging_tokenizer(training_prompt("alpaca", "Is it?") + "yes it is")
    merging.chat_template = (
        "{% for message in messages %}{{ message.role }}: {{ message.content }}{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    record = {"instruction": "Is it?", "output": "yes"}
    if template == "chat":
        record = {"messages": [{"role": "user", "content": "Is it?"}, {"role": "assistant", "content": "yes"}]}
    [example] = tokenise([record], merging, config(template=template, train_on_inputs="false"))
    counted = [merging.decode([label]) for label in example["labels"] if label != IGNORED]
    assert counted == [" yes"] + ["</s>"] * (template != "chat")


def test_json_jsonl_and_parquet_are_equivalent(tmp_path: Path) -> None:
    records = [{"instruction": "a", "output": "b"}, {"instruction": "c", "output": "d"}]
    (tmp_path / "x.json").write_text(json.dumps(records))
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, records)))
    assert load_records(tmp_path / "x.json") == load_records(tmp_path / "x.jsonl") == records
    odd = [{"instruction": "a\u2028b\u0085c", "output": "d"}]
    (tmp_path / "odd.jsonl").write_text(json.dumps(odd[0], ensure_ascii=False) + "\r\n", encoding="utf-8")
    assert load_records(tmp_path / "odd.jsonl") == odd, "JSON may contain U+2028"
    (tmp_path / "bom.json").write_text(json.dumps(records), encoding="utf-8-sig")
    assert load_records(tmp_path / "bom.json") == records
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.Table.from_pylist(records), tmp_path / "x.parquet")
    assert load_records(tmp_path / "x.parquet") == records


def test_defects(tmp_path: Path) -> None:
    with pytest.raises(SboraError, match="is not a file"):
        load_records(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(SboraError, match="cannot read"):
        load_records(tmp_path / "bad.json")
    with pytest.raises(SboraError, match="record 0 has no text 'output', only instruction, answer"):
        tokenise([{"instruction": "a", "answer": "b"}], tokenizer(), config())
    for message in ({"role": "user", "content": None}, {"role": 1, "content": "x"}, "hello"):
        with pytest.raises(SboraError, match="record 0 has a message whose role or content is not text"):
            tokenise([{"messages": [message, {"role": "assistant", "content": "x"}]}], tokenizer(), config())
    with pytest.raises(SboraError, match="record 0 has no messages"):
        tokenise([{"messages": []}], tokenizer(), config())
    strict = tokenizer()
    strict.chat_template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHAT
    said = [{"role": role, "content": "x"} for role in ("system", "user", "assistant")]
    for messages, what in ((said, "no system"), (said[-1:], "empty")):
        with pytest.raises(SboraError, match=f"record 0 does not fit the base model's chat template .*{what}"):
            tokenise([{"messages": messages}], strict, config())
    with pytest.raises(SboraError, match="no token of an answer is left"):
        tokenise([{"instruction": "", "output": ""}], merging_tokenizer("x"), config(template="plain"))
    with pytest.raises(SboraError, match="a sequence has 3 tokens, the base model 2 positions"):
        check_lengths([{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}], 2)
    with pytest.raises(SboraError, match="longer than cutoff=10"):
        tokenise([{"instruction": "a", "output": "b"}], tokenizer(), config(cutoff="10", train_on_inputs="false"))
