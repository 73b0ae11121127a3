"""Fine-tune with transformers' Trainer, in one process or several; resumed bit for bit."""

import hashlib
import json
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from peft import prepare_model_for_kbit_training
from transformers import DataCollatorForSeq2Seq, PrinterCallback, TrainerCallback, TrainerState, TrainingArguments

from sbora_diffusion.adapters.basis import Interval, Side
from sbora_diffusion.adapters.inplace_training import inplace_training
from sbora_diffusion.library.ledger import Space
from sbora_diffusion.library.library import Library
from sbora_diffusion.llm.base import fingerprint, inject, load_base, target_widths
from sbora_diffusion.llm.config import LlmConfig, side_of
from sbora_diffusion.llm.data import Example, check_lengths, load_records, tokenise
from sbora_diffusion.llm.run_folder import (
    ADAPTER,
    LIBRARIES,
    LOSSES,
    Run,
    Trained,
    check_same,
    find_checkpoint,
    is_first_process,
    save_result,
)
from sbora_diffusion.llm.sampling import ResumableTrainer
from sbora_diffusion.utils.errors import SboraError
from sbora_diffusion.utils.files import claimed, full_disk_reported, versions, write_description, write_file

log = logging.getLogger(__name__)

OnStep = Callable[[int, int, float], None]  # step, steps, loss


def train(
    run: Run,
    config: LlmConfig,
    folder: Path,
    resume: bool = False,
    on_step: OnStep | None = None,
    library: Library | None = None,
) -> Trained | None:
    """Fine-tune; write a PEFT directory that plain PEFT loads and, for SBoRA, a concept file.

    Args:
        folder: for run.json, the checkpoints and, at the end, the result.
        on_step: called after each step, in the first process.
        library: reserves the columns or rows of an SBoRA adapter and stores its concept file under the folder's name;
            without one, the adapter has the interval of `run` or the first columns.

    Returns:
        What was written; None in all processes except the first.

    Raises:
        SboraError: the folder holds another training, or one and `resume` is false; the library has a concept of this
            name; a loss that is not finite; what `load_base`, `load_records`, `tokenise` and `reserve` raise.
    """
    side = side_of(run.method)
    if run.interval and not side:
        raise SboraError(f"got the interval {run.interval}, but {run.method} owns no columns")
    if library and side:
        _check_name(library, folder)
    records = load_records(run.data)
    if all("messages" in record for record in records):
        config = config.with_settings(template="chat")  # as they are tokenised, and as `chat` prompts later
    run = replace(run, data_sha256=hashlib.sha256(run.data.read_bytes()).hexdigest())
    with claimed(folder, is_first_process(), "wait for it to end, or choose another --out"):
        run, checkpoint = find_checkpoint(run, config, folder, resume)
        model, tokenizer = load_base(run.base, _weights_dtype(config), run.quantize)
        examples = tokenise(records, tokenizer, config)
        check_lengths(examples, getattr(model.config, "max_position_embeddings", None))
        log.info("%d of %d records have tokens that count in the loss", len(examples), len(records))
        run = replace(run, fingerprint=fingerprint(model))
        if checkpoint:
            check_same(run, config, folder)
        arguments = training_arguments(config, folder)
        with _reserved(model, side, run, config, folder, library) as interval:
            run = replace(run, interval=interval)
            adapted = inject(_prepared(model, run, config), run.method, config, interval)
            if is_first_process():
                write_description(folder, run.describe(config), versions(LIBRARIES))
            trainer = _trainer(adapted, tokenizer, examples, config, arguments, on_step)
            with _in_base_weights(adapted, run, config), full_disk_reported(folder):
                metrics = trainer.fit(checkpoint)
            if not trainer.is_world_process_zero():
                return None
            losses = [entry for entry in trainer.state.log_history if "loss" in entry or "eval_loss" in entry]
            write_file(folder / LOSSES, json.dumps(losses).encode(), overwrite=True)
            return save_result(adapted, run, config, folder, metrics, library)


def _check_name(library: Library, folder: Path) -> None:
    """Raise SboraError if the library has a concept of the folder's name that this folder did not write."""
    name = folder.resolve().name
    if library.path(name).exists() and not (folder / ADAPTER).is_dir():
        raise SboraError(f"{library.path(name)} exists", "choose another --out")


@contextmanager
def _reserved(
    model: Any, side: Side | None, run: Run, config: LlmConfig, folder: Path, library: Library | None
) -> Iterator[Interval | None]:
    """Reserve an SBoRA adapter's interval in the first process, and yield it in all of them."""
    if side is None:
        yield None
        return
    method = config.method
    widths = target_widths(model, method.targets, side)
    space = Space(base_id=run.base, base_fingerprint=run.fingerprint, side=side, seed=method.basis_seed, widths=widths)
    library, name = library if is_first_process() else None, folder.resolve().name
    interval = library.reserve(space, method.rank, name, run.interval) if library else run.interval
    try:
        yield broadcast_object_list([interval or Interval(0, method.rank)])[0]
    finally:
        if library:
            library.release(name)


def _prepared(model: Any, run: Run, config: LlmConfig) -> Any:
    """Make a base model ready for training: PEFT's preparation of 4-bit weights, gradients of inputs, no cache."""
    if run.quantize != "none":
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)  # the Trainer enables it
    if config.model.gradient_checkpointing:
        model.enable_input_require_grads()
    model.config.use_cache = False
    return model


def _trainer(
    model: Any,
    tokenizer: Any,
    examples: Sequence[Example],
    config: LlmConfig,
    arguments: TrainingArguments,
    on_step: OnStep | None,
) -> ResumableTrainer:
    training, validation = _split(examples, config)
    trainer = ResumableTrainer(
        model=model,
        args=arguments,
        train_dataset=training,  # type: ignore[arg-type]  # a list is a map-style data set
        eval_dataset=validation or None,  # type: ignore[arg-type]
        data_collator=DataCollatorForSeq2Seq(tokenizer, pad_to_multiple_of=8, padding=True),
        callbacks=[_Steps(on_step)],
    )
    trainer.remove_callback(PrinterCallback)  # stdout is for data
    return trainer


def training_arguments(config: LlmConfig, folder: Path) -> TrainingArguments:
    """Translate the settings for transformers; a paged AdamW needs a GPU and becomes a plain one without."""
    gpu = torch.cuda.is_available()
    data, optim, dtype = config.data, config.optim, config.model.dtype
    paged = optim.optimizer.startswith("paged_adamw")
    return TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=optim.epochs or 1,
        max_steps=optim.steps or -1,
        per_device_train_batch_size=data.batch_size,
        per_device_eval_batch_size=data.batch_size,
        gradient_accumulation_steps=optim.accumulation,
        learning_rate=optim.learning_rate,
        lr_scheduler_type=optim.scheduler,
        warmup_steps=optim.warmup_steps,
        weight_decay=optim.weight_decay,
        max_grad_norm=optim.max_grad_norm,
        optim="adamw_torch" if paged and not gpu else optim.optimizer,
        train_sampling_strategy=data.sampling,
        eval_strategy="steps" if config.output.eval_every and data.validation else "no",
        eval_steps=config.output.eval_every or None,
        save_steps=config.output.save_every,
        save_total_limit=2,
        logging_steps=1,
        logging_nan_inf_filter=False,
        fp16=dtype == "float16" and gpu,
        bf16=dtype == "bfloat16",
        activation_checkpointing=config.model.gradient_checkpointing,
        activation_checkpointing_kwargs={"use_reentrant": False},
        ddp_find_unused_parameters=False,
        remove_unused_columns=False,
        use_cpu=not gpu,
        dataloader_pin_memory=gpu,
        disable_tqdm=True,
        report_to="none",
        seed=config.seed,
    )


class _Steps(TrainerCallback):
    """Set each epoch's order of examples, report each step's loss, and stop a training that has diverged."""

    def __init__(self, on_step: OnStep | None) -> None:
        self._on_step = on_step

    def on_epoch_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Set the epoch where the Trainer does not: in one of several processes that resume within an epoch."""
        kwargs["train_dataloader"].set_epoch(int(state.epoch or 0))

    def on_log(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        loss = kwargs["logs"].get("loss")
        if loss is None:
            return
        if not math.isfinite(loss):
            raise SboraError(
                f"the loss is {loss} at step {state.global_step}", "lower the learning rate: --set learning_rate=1e-4"
            )
        if self._on_step and state.is_world_process_zero:
            self._on_step(state.global_step, state.max_steps, loss)


def _in_base_weights(model: Any, run: Run, config: LlmConfig) -> AbstractContextManager[Any]:
    """Train SBoRA without dropout inside the base weights if these are as precise as the adapter."""
    precise = run.quantize == "none" and config.model.dtype == "float32"
    is_inplace = run.interval and precise and not config.method.dropout
    return inplace_training(model, "default") if is_inplace else nullcontext()


def _weights_dtype(config: LlmConfig) -> torch.dtype:
    """Return the type of the frozen weights: that of the arithmetic, but float32 instead of float16 on a CPU."""
    if config.model.dtype == "float16" and not torch.cuda.is_available():
        log.warning("float16 needs a GPU: computing in float32")
        return torch.float32
    return getattr(torch, config.model.dtype)


def _split(examples: Sequence[Example], config: LlmConfig) -> tuple[list[Example], list[Example]]:
    """Return training and validation examples; none of the latter if they would be half of all."""
    number = config.data.validation
    if number * 2 >= len(examples):
        return list(examples), []
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(config.seed)).tolist()
    shuffled = [examples[position] for position in order]
    return shuffled[number:], shuffled[:number]
