"""Measure accuracy with lm-evaluation-harness: the published tasks in tasks/, and the harness's own by name."""

import logging
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, Self

from sbora_diffusion.recipes.schema import POSITIVE, Config, parse_overrides, setting
from sbora_diffusion.utils.errors import SboraError
from sbora_diffusion.utils.hub import why

TASKS = Path(str(files("sbora_diffusion.llm") / "tasks"))
_METRICS = ("acc", "exact_match", "em", "f1")  # a task's score is the first that it has
_PREFIXES = ("adapters_", "qlora_")  # of our tasks
_NOISY = ("lm_eval", "datasets", "evaluate")


@dataclass(frozen=True, kw_only=True)
class TaskScores:
    """A model's scores on one task."""

    metric: str
    correct: list[float]  # per question; the task's score is their mean
    failed: list[float]  # 1 if no answer was found; empty if the task does not report it

    @property
    def score(self) -> float:
        return sum(self.correct) / len(self.correct)

    @property
    def failure_rate(self) -> float | None:
        return sum(self.failed) / len(self.failed) if self.failed else None


@dataclass(frozen=True, kw_only=True)
class EvalConfig(Config):
    """Settings of an evaluation."""

    batch_size: int = setting("questions per batch", POSITIVE)
    dtype: Literal["float32", "bfloat16", "float16"] = setting("of the weights and the arithmetic")

    @classmethod
    def from_settings(cls, overrides: Mapping[str, str]) -> Self:
        """Apply the overrides of `--set` to batch_size=8 and dtype=float32."""
        return cls.from_dict({"batch_size": 8, "dtype": "float32"} | parse_overrides(cls, overrides))


class Harness:
    """Tasks that are loaded once and run on any number of models.

    Args:
        tasks: names of tasks or groups; our groups are expanded, one of the harness's becomes one column.
        data: a folder in LLM-Adapters' layout, `data/TASK/test.json`.

    Raises:
        SboraError: no lm-evaluation-harness, an unknown task.
    """

    def __init__(self, tasks: Sequence[str], data: Path | None) -> None:
        try:
            from lm_eval.tasks import TaskManager
        except ImportError:
            raise SboraError("llm eval needs lm-evaluation-harness", 'pip install "sbora-diffusion[llm]"') from None
        if not tasks:
            raise SboraError("got no task", "such as --tasks adapters_commonsense")
        ours = {path.stem for path in TASKS.glob("*.yaml")}
        foreign = [task for task in tasks if task not in ours]
        _check_known(foreign, [task for task in foreign if not task.startswith(_PREFIXES)], ours)
        self._manager = TaskManager(  # takes half a minute with the harness's own tasks
            include_path=str(TASKS),
            include_defaults=bool(foreign),
            metadata={"data_dir": str(data or "")},  # type: ignore[arg-type]  # passed to each task
        )
        _check_known(foreign, self._manager.all_tasks, ours)
        self.tasks = list(
            dict.fromkeys(leaf for task in tasks for leaf in (_members(task) if task in ours else [task]))
        )

    def run(self, model: Any, tokenizer: Any, batch_size: int, limit: int | None) -> dict[str, TaskScores]:
        """Return the scores of a causal model, with or without adapters, by task.

        Args:
            limit: number of questions of each task; None for all.

        Raises:
            SboraError: data that cannot be loaded.
        """
        import lm_eval

        from sbora_diffusion.llm.beams import FullBeamsModel

        simple_evaluate: Any = lm_eval.simple_evaluate  # its decorators hide its signature
        try:
            with _quiet_harness():
                wrapped = FullBeamsModel(model, tokenizer=tokenizer, batch_size=batch_size, device=str(model.device))
                found = simple_evaluate(
                    wrapped, tasks=self.tasks, task_manager=self._manager, limit=limit, bootstrap_iters=0
                )
        except OSError as error:  # no network, no such data set
            raise SboraError(f"cannot load the tasks' data: {why(error)}") from None
        return {task: _scores(found, task) for task in self.tasks}


def _check_known(tasks: Iterable[str], known: Iterable[str], ours: Iterable[str]) -> None:
    unknown = sorted({*tasks} - {*known})
    if unknown:
        raise SboraError(
            f"unknown tasks {', '.join(unknown)}", f"ours: {', '.join(sorted(ours))}; or the harness's own"
        )


def _members(task: str) -> list[str]:
    """Return the tasks of one of our groups, or the task itself, without loading data."""
    text = (TASKS / f"{task}.yaml").read_text()
    return re.findall(r"^  - (\w+)$", text, re.MULTILINE) if text.find("group: ") >= 0 else [task]


def _scores(found: Any, task: str) -> TaskScores:
    """Return the scores of a task or of a group of the harness; of several filters the first."""
    leaves = dict.fromkeys(_leaves(found.get("group_subtasks", {}), task))
    samples = [sample for leaf in leaves for sample in _first_filter(found["samples"].get(leaf, []))]
    metric = next((name for name in _METRICS if samples and name in samples[0]), None)
    if metric is None:
        raise SboraError(f"the task {task} has none of the metrics {', '.join(_METRICS)}")
    return TaskScores(
        metric=metric,
        correct=[weight * float(sample[metric]) for weight, sample in zip(_weights(samples), samples, strict=True)],
        failed=[float(sample["failed"]) for sample in samples if "failed" in sample],
    )


def _weights(samples: Sequence[Mapping[str, Any]]) -> list[float]:
    """Return weights with which a mean over questions is a macro mean over their "macro_over"; 1 for those without."""
    groups = [sample.get("doc", {}).get("macro_over") for sample in samples]
    sizes = Counter(groups)
    return [len(groups) / (len(sizes) * sizes[group]) for group in groups]


def _leaves(members: Mapping[str, Sequence[str]], task: str) -> list[str]:
    """Return the tasks of a group of groups, such as mmlu, or the task itself."""
    return [leaf for member in members.get(task) or () for leaf in _leaves(members, member)] or [task]


def _first_filter(samples: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return [sample for sample in samples if sample.get("filter") == samples[0].get("filter")]


@contextmanager
def _quiet_harness() -> Iterator[None]:
    """Suppress the harness's warnings about intended settings and its call of git, which warns outside a repository."""
    from lm_eval import evaluator

    get_commit = evaluator.get_git_commit_hash
    loggers = [logging.getLogger(name) for name in _NOISY]
    levels = [logger.level for logger in loggers]
    try:
        evaluator.get_git_commit_hash = lambda: None
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        yield
    finally:
        evaluator.get_git_commit_hash = get_commit
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
