"""One thread for all work with a model, however many the server has."""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any, TypeVar

T = TypeVar("T")


class ModelThread:
    """Does one piece of work after the other, for callers that wait.

    There is one model, in one state. And GNU OpenMP keeps a team for every thread that ever computed: with more members
    of teams than cores, those that wait for each other fall asleep at once, and drawing takes twice as long.
    It dies with the process; nobody waits for its work then.
    """

    def __init__(self) -> None:
        self._waiting: SimpleQueue[tuple[Future[Any], Callable[[], Any]]] = SimpleQueue()
        threading.Thread(target=self._work, daemon=True, name="model").start()

    def do(self, work: Callable[[], T]) -> T:
        """The result of `work`, or its exception."""
        future: Future[T] = Future()
        self._waiting.put((future, work))
        return future.result()

    def _work(self) -> None:
        while True:
            future, work = self._waiting.get()
            try:
                future.set_result(work())
            except BaseException as error:  # the caller's, of whatever kind
                future.set_exception(error)
            del future, work  # they may hold a model
