"""The one loaded base model, with the concepts that are in it at the moment, and one thread for all work with it."""

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path
from queue import SimpleQueue
from typing import Any, TypeVar

import torch

from sbora_diffusion.adapters.delta import needs_original
from sbora_diffusion.adapters.file import Adapter
from sbora_diffusion.inference.generate import ConceptPatcher
from sbora_diffusion.library.library import Library
from sbora_diffusion.models.base import Base, load_base
from sbora_diffusion.utils.errors import SboraError

T = TypeVar("T")


class LiveModel:
    """Does one piece of work after the other, for callers that wait; nobody waits for it when the process ends.

    There is one model, in one state. And GNU OpenMP keeps a team for every thread that ever computed: with more members
    of teams than cores, those that wait for each other fall asleep at once, and drawing takes longer.

    Args:
        library: where the concepts are.
        is_training: whether a training has the cores, too.
    """

    def __init__(self, library: Library, is_training: Callable[[], bool]) -> None:
        self._library = library
        self._is_training = is_training
        self._num_threads = torch.get_num_threads()
        self._base: Base | None = None
        self._written: ConceptPatcher | None = None
        self._loaded: dict[str, tuple[int, Adapter]] = {}  # what is written: the file's time in ns, and what it held
        self._waiting: SimpleQueue[tuple[Future[Any], Callable[[], Any]]] = SimpleQueue()
        threading.Thread(target=self._work, daemon=True, name="model").start()

    def run(self, name: str, strengths: Mapping[str, float], work: Callable[[Base], T]) -> T:
        """What `work` makes of a base model with exactly these concepts in it, alone with it; its exceptions, too.

        Args:
            strengths: by the library's names.

        Raises:
            SboraError: no such concept, or one that cannot be written.
        """
        future: Future[T] = Future()
        self._waiting.put((future, lambda: work(self._prepared(name, strengths))))
        return future.result()

    def _work(self) -> None:
        while True:
            future, work = self._waiting.get()
            try:
                future.set_result(work())
            except BaseException as error:  # of whatever kind, it is the caller's
                future.set_exception(error)
            del future, work  # they may hold a model

    def _prepared(self, name: str, strengths: Mapping[str, float]) -> Base:
        base = self._load_base(name)
        if base.device.type == "cpu":  # threads that wait for each other lose against a training's
            torch.set_num_threads(1 if self._is_training() else self._num_threads)
        self._switch(strengths)
        return base

    def _load_base(self, name: str) -> Base:
        if self._base is None or self._base.id != name:
            self._base = self._written = None  # its memory first
            self._loaded = {}
            self._base = load_base(name, "")
            self._written = ConceptPatcher(self._base)
        return self._base

    def _switch(self, strengths: Mapping[str, float]) -> None:
        """Change what is written into what is wanted: only what differs is touched, but for a DoRA that comes."""
        assert self._written is not None
        wanted = {name: self._read(name) for name in strengths}
        kept = {name for name, entry in self._loaded.items() if name in wanted and wanted[name][0] == entry[0]}
        if any(needs_original(wanted[name][1]) for name in wanted.keys() - kept):
            kept = set()  # what is new reads the original weights
        gone = self._loaded.keys() - kept
        self._written.restore([self._loaded[name][1].spec.name for name in gone])
        self._loaded = {name: self._loaded[name] for name in kept}
        new = [name for name in wanted if name not in kept]
        self._written.write([wanted[name][1] for name in new], [strengths[name] for name in new])
        self._loaded |= {name: wanted[name] for name in new}
        for name, strength in strengths.items():
            own = wanted[name][1].spec.name
            if self._written.strengths[own] != strength:
                self._written.set_strength(own, strength)

    def _read(self, name: str) -> tuple[int, Adapter]:
        """The file's time and contents; what is written already is not read again."""
        path = known_path(self._library, name)
        try:
            time = path.stat().st_mtime_ns
        except OSError:
            raise _gone(name) from None
        loaded = self._loaded.get(name)
        return loaded if loaded and loaded[0] == time else (time, self._library.load(name))


def known_path(library: Library, name: str) -> Path:
    """A concept's file, which a name from the page cannot leave."""
    if name not in library.names():
        raise _gone(name)
    return library.path(name)


def _gone(name: str) -> SboraError:
    return SboraError(f"there is no concept {name!r} any more", "Reload the page.")
