"""Accuracy by lm-evaluation-harness: the published tasks in tasks/, and its own by name."""

import logging
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from sbora_diffusion.utils.errors import SboraError
from sbora_diffusion.utils.hub import why

TASKS = Path(str(files("sbora_diffusion.llm") / "tasks"))
_METRICS = ("acc", "exact_match", "em", "f1")  # the first that a task has is its score
_PREFIXES = ("adapters_", "qlora_")  # of tasks of ours
_NOISY = ("lm_eval", "datasets", "evaluate")


@dataclass(frozen=True, kw_only=True)
class TaskScores:
    """What a model scored on one task."""

    metric: str
    correct: list[float]  # a number a question; the task's score is their mean
    failed: list[float]  # 1 where no answer was found; empty where the task does not say

    @property
    def score(self) -> float:
        return sum(self.correct) / len(self.correct)

    @property
    def failure_rate(self) -> float | None:
        return sum(self.failed) / len(self.failed) if self.failed else None


class Harness:
    """The tasks that were asked for, loaded once, for any number of models.

    Args:
        tasks: names of tasks or groups; a group of ours is expanded, a foreign one becomes one column.
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
            raise SboraError("no task was named", "such as --tasks adapters_commonsense")
        own = {path.stem for path in TASKS.glob("*.yaml")}
        foreign = [task for task in tasks if task not in own]
        _check_known(foreign, [task for task in foreign if not task.startswith(_PREFIXES)], own)
        self._manager = TaskManager(  # with all of the harness's own tasks it takes half a minute
            include_path=str(TASKS),
            include_defaults=bool(foreign),
            metadata={"data_dir": str(data or "")},  # type: ignore[arg-type]  # handed to each task
        )
        _check_known(foreign, self._manager.all_tasks, own)
        self.tasks = list(dict.fromkeys(leaf for task in tasks for leaf in (_members(task) if task in own else [task])))

    def run(self, model: Any, tokenizer: Any, batch_size: int, limit: int | None) -> dict[str, TaskScores]:
        """Scores by task.

        Args:
            model: causal, with or without PEFT around it.
            limit: only so many questions of each task.

        Raises:
            SboraError: data that cannot be loaded.
        """
        import lm_eval

        from sbora_diffusion.llm.beams import WholeBeams

        simple_evaluate: Any = lm_eval.simple_evaluate  # its decorators hide the signature from type checkers
        try:
            with _quietly():
                wrapped = WholeBeams(model, tokenizer=tokenizer, batch_size=batch_size, device=str(model.device))
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
    """The tasks of a group of ours, or the task itself; no dataset is needed to know it."""
    text = (TASKS / f"{task}.yaml").read_text()
    return re.findall(r"^  - (\w+)$", text, re.MULTILINE) if text.find("group: ") >= 0 else [task]


def _scores(found: Any, task: str) -> TaskScores:
    """A task's or a foreign group's numbers, question by question; of several filters the first."""
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
    """1, or what makes a mean over the questions that were asked a macro mean, where these say over what."""
    groups = [sample.get("doc", {}).get("macro_over") for sample in samples]
    sizes = Counter(groups)
    return [len(groups) / (len(sizes) * sizes[group]) for group in groups]


def _leaves(members: Mapping[str, Sequence[str]], task: str) -> list[str]:
    """The tasks of a group of groups, such as mmlu, or the task itself."""
    return [leaf for member in members.get(task) or () for leaf in _leaves(members, member)] or [task]


def _first_filter(samples: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return [sample for sample in samples if sample.get("filter") == samples[0].get("filter")]


@contextmanager
def _quietly() -> Iterator[None]:
    """The harness warns of much that is meant so, and asks git for a commit, which complains where there is none."""
    from lm_eval import evaluator

    asks_git = evaluator.get_git_commit_hash
    loggers = [logging.getLogger(name) for name in _NOISY]
    levels = [logger.level for logger in loggers]
    try:
        evaluator.get_git_commit_hash = lambda: None
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        yield
    finally:
        evaluator.get_git_commit_hash = asks_git
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
