"""The prompts of published protocols, exact to the blank."""

from collections.abc import Mapping

from sbora_diffusion.utils.errors import SboraError

_INDENT = " " * 16
_TASK = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
_TASK_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request."
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


def check_record(record: Mapping[str, object], number: int) -> None:
    """Raise SboraError unless a record has texts "instruction" and "output", and "input" at most as a text."""
    for key in ("instruction", "output"):
        if not isinstance(record.get(key), str):
            raise SboraError(
                f"record {number} has no text {key!r}, only {', '.join(record) or 'nothing'}",
                hint="Each record needs instruction and output (and may have input), or messages.",
            )
    if not isinstance(record.get("input") or "", str):
        raise SboraError(f"record {number} has an input that is not text")
