"""The order in which a training meets its examples: seed and epoch decide it, also where it goes on with --resume."""

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import Dataset, Sampler
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_pt_utils import get_length_grouped_indices


class LengthGrouped(Sampler[int]):
    """Sequences of like lengths side by side, as transformers groups them, shuffled by a generator of its own.

    transformers draws from the global generator, which a resumed training has not at the beginning of its epoch.
    """

    def __init__(self, lengths: list[int], batch_size: int, seed: int) -> None:
        self._lengths, self._batch_size, self._seed = lengths, batch_size, seed
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self._lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self._seed + self._epoch)
        return iter(get_length_grouped_indices(self._lengths, self._batch_size, generator=generator))


class OrderedTrainer(Trainer):
    """transformers' Trainer, with the sampler above for train_sampling_strategy="group_by_length"."""

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler | None:
        examples: Any = train_dataset or self.train_dataset
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        lengths = [len(example["input_ids"]) for example in examples]
        size = self.args.train_batch_size * self.args.gradient_accumulation_steps
        return LengthGrouped(lengths, size, self.args.seed)


class EpochTeller(TrainerCallback):
    """Tells the sampler its epoch: where a resumed epoch's first batches are skipped in one process of several, the
    Trainer's word does not reach it."""

    def on_epoch_begin(
        self,
        args: TrainingArguments,  # noqa: ARG002
        state: TrainerState,
        control: TrainerControl,  # noqa: ARG002
        train_dataloader: Any = None,
        **kwargs: Any,  # noqa: ARG002
    ) -> None:
        train_dataloader.set_epoch(int(state.epoch or 0))
