"""The order of the examples depends only on seed and epoch, also after a resume, which never trains a step too many."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset, Sampler
from transformers import Trainer, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_pt_utils import get_length_grouped_indices


class LengthGrouped(Sampler[int]):
    """Group sequences of similar lengths as transformers does, shuffled by a generator of its own.

    transformers uses the global generator, which a resumed training does not have at the beginning of its epoch.
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


class ResumableTrainer(Trainer):
    """transformers' Trainer, resumed bit for bit."""

    def fit(self, checkpoint: Path | None) -> dict[str, float]:
        """Train, or resume from a checkpoint, and return the metrics.

        A training with `max_steps` that has made them all is only restored: `train` would make another step.
        """
        if checkpoint and self.args.max_steps > 0:
            state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
            if state.global_step >= self.args.max_steps:
                self.state = state
                self._load_from_checkpoint(str(checkpoint))
                return {}
        return self.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None).metrics

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler | None:
        examples: Any = train_dataset or self.train_dataset
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        lengths = [len(example["input_ids"]) for example in examples]
        size = self.args.train_batch_size * self.args.gradient_accumulation_steps
        return LengthGrouped(lengths, size, self.args.seed)
