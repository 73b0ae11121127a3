"""Fine-tuning with transformers' Trainer: one process or several, resumed bit for bit."""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import prepare_model_for_kbit_training
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from sbora_diffusion.errors import SboraError
from sbora_diffusion.llm.base import fingerprint, inject, load_base
from sbora_diffusion.llm.config import LlmConfig
from sbora_diffusion.llm.data import Example, load_records, tokenise

log = logging.getLogger(__name__)

RUN = "run.json"  # in a run folder: everything that decided the training
MULTIPLE = 8  # sequences are padded to a multiple of so many tokens


@dataclass(frozen=True, kw_only=True)
class Run:
    """What is trained on what: with `LlmConfig` everything that decides the result."""

    base: str
    data: Path
    method: str
    quantize: str


def train(run: Run, config: LlmConfig, folder: Path, resume: bool = False) -> Path:
    """Fine-tune, and write a PEFT directory that plain PEFT loads too.

    Args:
        folder: holds run.json, the checkpoints and, at the end, the adapter.

    Returns:
        The adapter's folder.

    Raises:
        SboraError: the folder holds another training, or one and `resume` is false; what `load_base`, `load_records`
            and `tokenise` raise.
    """
    checkpoint = _claim(run, config, folder, resume)
    records = load_records(run.data)
    model, tokenizer = load_base(run.base, _weights_dtype(run, config), run.quantize)
    examples = tokenise(records, tokenizer, config)
    log.info("%d of %d records have something to learn", len(examples), len(records))
    identity = fingerprint(model)
    if run.quantize != "none":
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=config.gradient_checkpointing)
    elif config.gradient_checkpointing:
        model.enable_input_require_grads()
    model.config.use_cache = False
    adapted = inject(model, run.method, config)
    training, validation = _split(examples, config)
    trainer = Trainer(
        model=adapted,
        args=training_arguments(config, folder),
        train_dataset=training,  # type: ignore[arg-type]  # a list has all that a map-style data set needs
        eval_dataset=validation or None,  # type: ignore[arg-type]
        data_collator=DataCollatorForSeq2Seq(tokenizer, pad_to_multiple_of=MULTIPLE, padding=True),
    )
    result = trainer.train(resume_from_checkpoint=checkpoint)
    return _finish(trainer, run, config, folder, identity, result.metrics)


def training_arguments(config: LlmConfig, folder: Path) -> TrainingArguments:
    """The settings in transformers' words. A paged optimiser needs a GPU: without one it is its plain twin."""
    gpu = torch.cuda.is_available()
    return TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=config.epochs or 1,
        max_steps=config.steps or -1,
        per_device_train_batch_size=config.batch_size,
        per_device_eval_batch_size=config.batch_size,
        gradient_accumulation_steps=config.accumulation,
        learning_rate=config.learning_rate,
        lr_scheduler_type=config.scheduler,
        warmup_steps=config.warmup_steps,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        optim=config.optimizer if gpu or not config.optimizer.startswith("paged_adamw") else "adamw_torch",
        train_sampling_strategy=config.sampling,
        eval_strategy="steps" if config.eval_every and config.validation else "no",
        eval_steps=config.eval_every or None,
        save_steps=config.save_every,
        save_total_limit=2,
        logging_steps=1,
        logging_nan_inf_filter=False,
        fp16=config.dtype == "float16" and gpu,
        bf16=config.dtype == "bfloat16",
        gradient_checkpointing=config.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        ddp_find_unused_parameters=False,
        remove_unused_columns=False,
        use_cpu=not gpu,
        dataloader_pin_memory=gpu,
        disable_tqdm=True,
        report_to="none",
        seed=config.seed,
    )


def _weights_dtype(run: Run, config: LlmConfig) -> torch.dtype:
    """The frozen weights are kept in the arithmetic's type where it is not fp16 on a CPU, which computes in fp32."""
    if config.dtype == "float16" and not torch.cuda.is_available():
        log.warning("float16 needs a GPU: computing in float32")
        return torch.float32
    return getattr(torch, config.dtype)


def _split(examples: Sequence[Example], config: LlmConfig) -> tuple[list[Example], list[Example]]:
    """Training and validation examples; none of the latter where they would be half of all."""
    if config.validation * 2 >= len(examples):
        return list(examples), []
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(config.seed)).tolist()
    shuffled = [examples[position] for position in order]
    return shuffled[config.validation :], shuffled[: config.validation]


def _claim(run: Run, config: LlmConfig, folder: Path, resume: bool) -> str | None:
    """The checkpoint to go on from, or None; writes or compares the description of the training."""
    described = {"base": run.base, "data": str(run.data), "method": run.method, "quantize": run.quantize}
    described |= {"config": config.to_dict()}
    last = get_last_checkpoint(str(folder)) if folder.is_dir() else None
    if (folder / RUN).exists():
        before = json.loads((folder / RUN).read_text())
        changed = [key for key in described if before.get(key) != described[key]]
        if last and not resume:
            raise SboraError(f"a training lies in {folder}", "add --resume to go on with it, or choose another --out")
        if resume and changed:
            raise SboraError(f"the training in {folder} differs in {', '.join(changed)}", "repeat its settings")
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f".{RUN}.partial-{torch.randint(2**31, ()).item()}"
    partial.write_text(json.dumps(described, indent=2))
    partial.replace(folder / RUN)
    return last if resume else None


def _finish(
    trainer: Trainer, run: Run, config: LlmConfig, folder: Path, identity: str, metrics: dict[str, float]
) -> Path:
    out = folder / "adapter"
    trainer.save_model(str(out))
    if trainer.is_world_process_zero():
        model: Any = trainer.model
        trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        told = {"base": run.base, "fingerprint": identity, "method": run.method, "quantize": run.quantize}
        told |= {"parameters": trained, "metrics": metrics, "config": config.to_dict()}
        (out / "sbora.json").write_text(json.dumps(told, indent=2))
        losses = [entry for entry in trainer.state.log_history if "loss" in entry]
        (folder / "losses.json").write_text(json.dumps(losses))
    return out
