"""Fine-tuning with transformers' Trainer: one process or several, resumed bit for bit."""

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from peft import prepare_model_for_kbit_training
from transformers import (
    DataCollatorForSeq2Seq,
    PrinterCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from sbora_diffusion.adapters.basis import Interval
from sbora_diffusion.adapters.inplace_training import inplace_training
from sbora_diffusion.library.ledger import Space
from sbora_diffusion.llm.base import check_method, fingerprint, inject, load_base, target_widths
from sbora_diffusion.llm.config import LlmConfig
from sbora_diffusion.llm.data import Example, check_lengths, load_records, tokenise
from sbora_diffusion.llm.run_folder import (
    LOSSES,
    Run,
    Trained,
    check,
    check_same,
    claimed,
    finish,
    full_disk_told,
    is_first_process,
    start,
)
from sbora_diffusion.llm.sampling import EpochTeller, OrderedTrainer
from sbora_diffusion.methods.registry import find_method, method_side
from sbora_diffusion.utils.errors import SboraError
from sbora_diffusion.utils.files import write_atomically

log = logging.getLogger(__name__)

MULTIPLE = 8  # sequences are padded to a multiple of so many tokens

Watch = Callable[[int, int, float], None]  # step, steps, loss
Reserve = Callable[[Space, Interval | None], Interval]  # what the ledger has, the interval that is wanted -> granted


def train(
    run: Run,
    config: LlmConfig,
    folder: Path,
    resume: bool = False,
    watch: Watch | None = None,
    reserve: Reserve | None = None,
) -> Trained | None:
    """Fine-tune, and write a PEFT directory that plain PEFT loads and, of SBoRA, a concept file.

    Args:
        folder: holds run.json, the checkpoints and, at the end, what was learned.
        watch: is told each step's loss.
        reserve: hands out the columns or rows of an SBoRA adapter; the first ones, or what `run` wants, by default.

    Returns:
        What was written; None in all processes but the first.

    Raises:
        SboraError: the folder holds another training, or one and `resume` is false; a loss that is not finite; what
            `load_base`, `load_records`, `tokenise` and `reserve` raise.
    """
    check_method(run.method)
    if run.interval and not find_method(run.method).owns_interval:
        raise SboraError(f"got the interval {run.interval}, but {run.method} owns no columns")
    records = load_records(run.data)
    if all("messages" in record for record in records):
        config = replace(config, template="chat")  # as they are tokenised, and later asked
    run = replace(run, data_sha256=hashlib.sha256(run.data.read_bytes()).hexdigest())
    with claimed(folder):
        run, checkpoint = check(run, config, folder, resume)
        return _train(run, config, folder, records, checkpoint, watch, reserve)


def _train(
    run: Run,
    config: LlmConfig,
    folder: Path,
    records: Sequence[Mapping[str, Any]],
    checkpoint: str | None,
    watch: Watch | None,
    reserve: Reserve | None,
) -> Trained | None:
    model, tokenizer = load_base(run.base, _weights_dtype(config), run.quantize)
    examples = tokenise(records, tokenizer, config)
    check_lengths(examples, getattr(model.config, "max_position_embeddings", None))
    log.info("%d of %d records have something to learn", len(examples), len(records))
    run = replace(run, fingerprint=fingerprint(model))
    if checkpoint:
        check_same(run, config, folder)
    if run.quantize != "none":
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)  # the Trainer turns it on
    if config.gradient_checkpointing:
        model.enable_input_require_grads()
    model.config.use_cache = False
    arguments = training_arguments(config, folder)
    if find_method(run.method).owns_interval:
        run = replace(run, interval=_placed(model, run, config, reserve))
    adapted = inject(model, run.method, config, run.interval)
    if is_first_process():
        start(run, config, folder)
    training, validation = _split(examples, config)
    trainer = OrderedTrainer(
        model=adapted,
        args=arguments,
        train_dataset=training,  # type: ignore[arg-type]  # a list has all that a map-style data set needs
        eval_dataset=validation or None,  # type: ignore[arg-type]
        data_collator=DataCollatorForSeq2Seq(tokenizer, pad_to_multiple_of=MULTIPLE, padding=True),
        callbacks=[EpochTeller(), _Watcher(watch)],
    )
    trainer.remove_callback(PrinterCallback)  # stdout is for data
    with _in_the_weights(adapted, run, config), full_disk_told(folder):
        result = trainer.train(resume_from_checkpoint=checkpoint)
    if trainer.is_world_process_zero():
        losses = [entry for entry in trainer.state.log_history if "loss" in entry or "eval_loss" in entry]
        write_atomically(folder / LOSSES, json.dumps(losses).encode())
        return finish(adapted, run, config, folder, result.metrics)
    return None


def _placed(model: Any, run: Run, config: LlmConfig, reserve: Reserve | None) -> Interval:
    """Where the adapter goes, in all processes the same: the first one asks."""
    side = method_side(run.method)
    widths = target_widths(model, config.targets, side)
    space = Space(base_id=run.base, base_fingerprint=run.fingerprint, side=side, seed=config.basis_seed, widths=widths)
    granted: list[Any] = [None]
    if is_first_process():
        granted = [reserve(space, run.interval) if reserve else run.interval or Interval(0, config.rank)]
    return broadcast_object_list(granted)[0]


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
        activation_checkpointing=config.gradient_checkpointing,
        activation_checkpointing_kwargs={"use_reentrant": False},
        ddp_find_unused_parameters=False,
        remove_unused_columns=False,
        use_cpu=not gpu,
        dataloader_pin_memory=gpu,
        disable_tqdm=True,
        report_to="none",
        seed=config.seed,
    )


class _Watcher(TrainerCallback):
    """Tells each step's loss, and ends a training that has diverged."""

    def __init__(self, watch: Watch | None) -> None:
        self._watch = watch

    def on_log(
        self,
        args: TrainingArguments,  # noqa: ARG002
        state: TrainerState,
        control: TrainerControl,  # noqa: ARG002
        logs: dict[str, float] | None = None,
        **kwargs: Any,  # noqa: ARG002
    ) -> None:
        loss = (logs or {}).get("loss")
        if loss is None:
            return
        if not abs(loss) < float("inf"):
            raise SboraError(
                f"the loss is {loss} at step {state.global_step}", "lower the rate: --set learning_rate=1e-4"
            )
        if self._watch and state.is_world_process_zero:
            self._watch(state.global_step, state.max_steps, loss)


@contextmanager
def _in_the_weights(model: Any, run: Run, config: LlmConfig) -> Iterator[None]:
    """SBoRA without dropout trains inside the base weights, where these are as precise as the adapter."""
    if run.interval and run.quantize == "none" and config.dtype == "float32" and not config.dropout:
        with inplace_training(model, "default"):
            yield
    else:
        yield


def _weights_dtype(config: LlmConfig) -> torch.dtype:
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
