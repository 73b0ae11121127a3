"""The loaded base model, the concepts that are currently written into it, and the one thread that uses it."""

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path
from queue import SimpleQueue
from typing import Any, TypeVar

import torch

from sbora_diffusion.adapters.file import Adapter
from sbora_diffusion.adapters.weight_patcher import needs_original
from sbora_diffusion.inference.generate import ConceptPatcher
from sbora_diffusion.library.library import Library
from sbora_diffusion.models.base import Base, load_base
from sbora_diffusion.utils.errors import SboraError

T = TypeVar("T")


class LiveModel:
    """Run one function after another on the model, while their callers wait.

    All work is done by one daemon thread: there is one model in one state, and GNU OpenMP keeps a team for every thread
    that ever computed. With more team members than cores, threads that wait for each other are put to sleep at once,
    which makes sampling slower.

    Args:
        library: where the concepts are.
        is_training: returns whether a training is using the cores, too.
    """

    def __init__(self, library: Library, is_training: Callable[[], bool]) -> None:
        self._library = library
        self._is_training = is_training
        self._num_threads = torch.get_num_threads()
        self._base: Base | None = None
        self._patcher: ConceptPatcher | None = None
        self._loaded: dict[str, tuple[int, Adapter]] = {}  # what is written: modification time in ns, contents
        self._waiting: SimpleQueue[tuple[Future[Any], Callable[[], Any]]] = SimpleQueue()
        threading.Thread(target=self._work, daemon=True, name="model").start()

    def run(self, name: str, strengths: Mapping[str, float], work: Callable[[Base], T]) -> T:
        """Return `work(base)`, called with exactly these concepts written into the base model.

        Args:
            strengths: by the names of the library.

        Raises:
            SboraError: a concept does not exist or cannot be written.
            Exception: whatever `work` raises.
        """
        future: Future[T] = Future()
        self._waiting.put((future, lambda: work(self._prepare(name, strengths))))
        return future.result()

    def _work(self) -> None:
        while True:
            future, work = self._waiting.get()
            try:
                future.set_result(work())
            except BaseException as error:  # raised again in the caller
                future.set_exception(error)
            del future, work  # they may keep a model in memory

    def _prepare(self, name: str, strengths: Mapping[str, float]) -> Base:
        base = self._load_base(name)
        if base.device.type == "cpu":  # threads that wait for each other are slow beside a training
            torch.set_num_threads(1 if self._is_training() else self._num_threads)
        self._switch(strengths)
        return base

    def _load_base(self, name: str) -> Base:
        if self._base is None or self._base.id != name:
            self._base = self._patcher = None  # free the memory first
            self._loaded = {}
            self._base = load_base(name, "")
            self._patcher = ConceptPatcher(self._base)
        return self._base

    def _switch(self, strengths: Mapping[str, float]) -> None:
        """Write the wanted concepts; only what differs is touched, unless a DoRA is added."""
        assert self._patcher is not None
        wanted = {name: self._read(name) for name in strengths}
        kept = {name for name, entry in self._loaded.items() if name in wanted and wanted[name][0] == entry[0]}
        if any(needs_original(wanted[name][1]) for name in wanted.keys() - kept):
            kept = set()  # the new concept reads the original weights
        gone = self._loaded.keys() - kept
        self._patcher.restore([self._loaded[name][1].spec.name for name in gone])
        self._loaded = {name: self._loaded[name] for name in kept}
        new = [name for name in wanted if name not in kept]
        self._patcher.write([wanted[name][1] for name in new], [strengths[name] for name in new])
        self._loaded |= {name: wanted[name] for name in new}
        for name, strength in strengths.items():
            own = wanted[name][1].spec.name
            if self._patcher.strengths[own] != strength:
                self._patcher.set_strength(own, strength)

    def _read(self, name: str) -> tuple[int, Adapter]:
        """Return a file's modification time and contents; what is already written is not read again."""
        path = known_path(self._library, name)
        try:
            time = path.stat().st_mtime_ns
        except OSError:
            raise _gone(name) from None
        loaded = self._loaded.get(name)
        return loaded if loaded and loaded[0] == time else (time, self._library.load(name))


def known_path(library: Library, name: str) -> Path:
    """Return the file of a concept; names from the page cannot escape the library."""
    if name not in library.names():
        raise _gone(name)
    return library.path(name)


def _gone(name: str) -> SboraError:
    return SboraError(f"the concept {name!r} no longer exists", "Reload the page.")
