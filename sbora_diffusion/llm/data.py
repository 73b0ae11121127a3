"""Records from JSON, JSONL or Parquet, the prompts of published protocols, and token ids with labels."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import TemplateError  # torch depends on it

from sbora_diffusion.llm.config import LlmConfig
from sbora_diffusion.utils.errors import SboraError
from sbora_diffusion.utils.files import read_bytes
from sbora_diffusion.utils.text import parse_json

IGNORED = -100  # label of tokens that do not count in the loss
_INDENT = " " * 16
_TASK = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
_TASK_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request."
)

Example = dict[str, list[int]]  # "input_ids" and "labels", equally long


def load_records(path: Path) -> list[dict[str, Any]]:
    """Read records from a JSON list, from JSONL (one object per line) or from a Parquet table."""
    if not path.is_file():
        raise SboraError(f"{path} is not a file", hint="Give a .json, .jsonl or .parquet file.")
    try:
        records = _parse(path)
    except (ValueError, OSError) as error:
        raise SboraError(
            f"cannot read {path} ({error})", hint="Give a .json, .jsonl (one object per line) or .parquet file."
        ) from None
    if not isinstance(records, list) or not records or not all(isinstance(record, dict) for record in records):
        raise SboraError(f"{path} contains no list of records", hint='Such as [{"instruction": "…", "output": "…"}].')
    return records


def _parse(path: Path) -> Any:
    if path.suffix == ".parquet":
        try:
            from pyarrow import parquet
        except ImportError:
            raise SboraError("Parquet needs pyarrow", 'pip install "sbora-diffusion[llm]"') from None
        return parquet.read_table(path).to_pylist()
    text = read_bytes(path).decode("utf-8-sig")
    return (
        [parse_json(line) for line in text.split("\n") if line.strip()]  # not splitlines(): U+2028 may stand in JSON
        if path.suffix == ".jsonl"
        else parse_json(text)
    )


def training_prompt(template: str, instruction: str, context: str = "") -> str:
    """Return everything before the answer in a training sequence.

    Args:
        template: "adapters" is LLM-Adapters' finetune.py, with its two blanks after "request." (one if there is an
            input) and its 16 blanks on empty lines; "alpaca" is QLoRA's qlora.py; "plain" is only the record's text.
        context: the record's "input".
    """
    if template == "adapters":
        head, parts = (f"{_TASK_WITH_INPUT} ", [context]) if context else (f"{_TASK}  ", [])
        sections = zip(("Instruction", "Input"), [instruction, *parts], strict=False)
        body = "".join(f"{_INDENT}### {title}:\n{_INDENT}{text}\n{_INDENT}\n" for title, text in sections)
        return f"{head}\n\n{body}{_INDENT}### Response:\n{_INDENT}"
    if template == "alpaca":
        head, middle = (_TASK_WITH_INPUT, f"### Input:\n{context}\n\n") if context else (_TASK, "")
        return f"{head}\n\n### Instruction:\n{instruction}\n\n{middle}### Response: "
    if template == "plain":
        return f"{instruction}\n{context}" if context else instruction
    raise SboraError(f"got template {template!r}, expected adapters, alpaca or plain")


def evaluation_prompt(instruction: str) -> str:
    """Return the prompt of LLM-Adapters' evaluate.py: one blank after "request.", an empty line before the response."""
    body = f"{_INDENT}### Instruction:\n{_INDENT}{instruction}\n\n{_INDENT}### Response:\n{_INDENT}"
    return f"{_TASK} \n\n{body}"


def tokenise(records: Sequence[Mapping[str, Any]], tokenizer: Any, config: LlmConfig) -> list[Example]:
    """Return token ids and labels of the records, except those of which cutoff leaves no token for the loss.

    Raises:
        SboraError: a record without the fields it needs, or no record that is left.
    """
    examples = [_tokenise(record, number, tokenizer, config) for number, record in enumerate(records)]
    kept = [example for example in examples if any(label != IGNORED for label in example["labels"][1:])]
    if not kept:
        raise SboraError(
            f"all {len(records)} sequences are longer than cutoff={config.data.cutoff}: no token of an answer is left",
            hint="Raise it with --set cutoff=1024.",
        )
    return kept


def check_lengths(examples: Sequence[Example], positions: int | None) -> None:
    """Raise SboraError if a sequence has more tokens than the model has positions, where that is known."""
    longest = max(len(example["input_ids"]) for example in examples)
    if positions and longest > positions:
        raise SboraError(
            f"a sequence has {longest} tokens, the base model {positions} positions",
            hint=f"Truncate them with --set cutoff={positions}.",
        )


def common_prefix(prompt: Sequence[int], whole: Sequence[int]) -> int:
    """Count the tokens that both begin with: the prompt's last blank may be part of the answer's first token."""
    differs = (number for number, (one, other) in enumerate(zip(prompt, whole, strict=False)) if one != other)
    return next(differs, min(len(prompt), len(whole)))


def _tokenise(record: Mapping[str, Any], number: int, tokenizer: Any, config: LlmConfig) -> Example:
    if config.data.template == "chat" or "messages" in record:
        return _chat(record, number, tokenizer, config)
    _check_record(record, number)
    prompt = training_prompt(config.data.template, record["instruction"], record.get("input") or "")
    if config.data.target_cutoff:
        return _tokenise_separately(prompt, record["output"], tokenizer, config)
    ids = tokenizer(prompt + record["output"])["input_ids"][: config.data.cutoff]
    if ids[-1:] != [tokenizer.eos_token_id] and len(ids) < config.data.cutoff:
        ids = [*ids, tokenizer.eos_token_id]
    masked = 0 if config.data.train_on_inputs else common_prefix(tokenizer(prompt)["input_ids"], ids)
    return _masked(ids, masked)


def _check_record(record: Mapping[str, object], number: int) -> None:
    """Raise SboraError unless "instruction" and "output" are texts, and "input" is a text or missing."""
    for key in ("instruction", "output"):
        if not isinstance(record.get(key), str):
            raise SboraError(
                f"record {number} has no text {key!r}, only {', '.join(record) or 'nothing'}",
                hint="Each record needs instruction and output (and may have input), or messages.",
            )
    if not isinstance(record.get("input") or "", str):
        raise SboraError(f"record {number} has an input that is not text")


def _tokenise_separately(prompt: str, answer: str, tokenizer: Any, config: LlmConfig) -> Example:
    """Tokenise and truncate prompt and answer separately, as QLoRA's qlora.py does."""
    begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    source = [*begin, *tokenizer(prompt, add_special_tokens=False)["input_ids"]][: config.data.cutoff]
    target = [*tokenizer(answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    return _masked(source + target[: config.data.target_cutoff], 0 if config.data.train_on_inputs else len(source))


def _chat(record: Mapping[str, Any], number: int, tokenizer: Any, config: LlmConfig) -> Example:
    """Apply the tokenizer's chat template; without `train_on_inputs` mask everything before the last answer."""
    messages = record.get("messages")
    if not isinstance(messages, list) or not messages:
        raise SboraError(f"record {number} has no messages", hint='Such as [{"role": "user", "content": "…"}, …].')
    if not all(map(_is_message, messages)):
        raise SboraError(f"record {number} has a message whose role or content is not text")
    if messages[-1]["role"] != "assistant":
        raise SboraError(f"record {number} ends with {messages[-1]['role']!r}, expected an assistant's message")
    if not tokenizer.chat_template:
        raise SboraError("the base model's tokenizer has no chat template", hint="Use instruction and output records.")
    try:
        ids = tokenizer.apply_chat_template(messages, return_dict=False)
        prompt = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=False)
    except (TemplateError, ValueError) as error:
        raise SboraError(f"record {number} does not fit the base model's chat template ({error})") from None
    return _masked(ids[: config.data.cutoff], 0 if config.data.train_on_inputs else common_prefix(prompt, ids))


def _is_message(message: Any) -> bool:
    return isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))


def _masked(ids: list[int], number: int) -> Example:
    return {"input_ids": ids, "labels": [IGNORED] * min(number, len(ids)) + ids[number:]}
