"""The queue of long jobs, one at a time: each is a process that continues when the page or the studio is closed."""

import json
import logging
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import psutil
from filelock import FileLock, Timeout

from sbora_diffusion.utils.errors import SboraError
from sbora_diffusion.utils.files import read_json, write_file
from sbora_diffusion.utils.processes import isolated

log = logging.getLogger(__name__)

State = Literal["waiting", "running", "done", "stopped", "failed"]
WORKER = isolated("-m", "sbora_diffusion.studio.worker")
MAX_WAITING = 20  # jobs
PERIOD = 0.3  # seconds between checks of the running job
STOPPED = (130, -signal.SIGINT)  # exit statuses of a command that Ctrl-C ended


@dataclass(frozen=True, kw_only=True)
class Job:
    """A command, its arguments and its state."""

    name: str  # unique in the queue
    arguments: tuple[str, ...]
    state: State = "waiting"
    pid: int | None = None
    started: float = 0.0  # start time of the process in seconds since the epoch: process ids are reused
    message: str = ""  # why it failed
    is_to_stop: bool = False  # stopping was requested

    @property
    def is_active(self) -> bool:
        """Whether it is running or waiting."""
        return self.state in ("waiting", "running")


class Jobs:
    """The queue, stored in `studio.json` of a folder, with the stderr of each job beside it.

    Args:
        worker: the command that runs a job's arguments.

    Raises:
        SboraError: another studio uses the folder.
    """

    def __init__(self, folder: Path, worker: Sequence[str] = WORKER) -> None:
        self._folder = folder
        self._worker = worker
        folder.mkdir(parents=True, exist_ok=True)
        self._folder_lock = FileLock(folder / ".studio.lock", timeout=0)
        try:
            self._folder_lock.acquire()
        except Timeout:
            raise SboraError(f"another studio is running in {folder.resolve().parent}", "Use that one.") from None
        self._lock = threading.RLock()
        self._process: subprocess.Popen[bytes] | None = None
        self._jobs = _read(folder / "studio.json")
        self._closed = threading.Event()
        threading.Thread(target=self._run, daemon=True).start()

    def close(self) -> None:
        """Start no further job; a running one continues."""
        self._closed.set()
        self._folder_lock.release()

    def all(self, command: str = "") -> list[Job]:
        """Return the jobs of a command ("": of all) in the order of the queue."""
        with self._lock:
            return [job for job in self._jobs if command in ("", job.arguments[0])]

    def find(self, name: str) -> Job | None:
        """Return the job of this name."""
        return next((job for job in self.all() if job.name == name), None)

    def is_running(self) -> bool:
        """Return whether a job is running."""
        return any(job.state == "running" for job in self.all())

    def add(self, name: str, arguments: Sequence[str]) -> None:
        """Append a job to the queue; a finished one of the same name is replaced."""
        with self._lock:
            before = self.find(name)
            if before and before.is_active:
                raise SboraError(f"{name} is already {before.state}", "Stop it first.")
            self.check_room()
            self._jobs = [job for job in self._jobs if job.name != name]
            self._jobs.append(Job(name=name, arguments=tuple(arguments)))
            self._write()

    def check_room(self) -> None:
        """SboraError if no further job may wait."""
        if sum(job.state == "waiting" for job in self.all()) >= MAX_WAITING:
            raise SboraError(f"{MAX_WAITING} jobs are waiting, the most allowed", "Stop one, or add this one later.")

    def stop(self, name: str) -> None:
        """Send a running job Ctrl-C, or remove a waiting one from the queue."""
        with self._lock:
            job = self.find(name)
            if job is None or not job.is_active:
                raise SboraError(f"{name} is not running")
            if job.pid is not None and _is_alive(job):
                self._change(job, replace(job, is_to_stop=True))
                with suppress(ProcessLookupError):  # it has ended meanwhile
                    os.kill(job.pid, signal.SIGINT)
            elif job.pid is None:
                self._change(job, replace(job, state="stopped"))

    def log_path(self, name: str) -> Path:
        """Return the file with a job's stderr."""
        return self._folder / f"{name}.stderr"

    def output(self, name: str) -> str:
        """Return a job's stderr so far, "" if the file is gone."""
        try:
            return self.log_path(name).read_text(encoding="utf-8", errors="replace")
        except OSError:
            return ""

    def _run(self) -> None:
        while not self._closed.wait(PERIOD):
            try:
                self._advance()
            except Exception:  # whatever it is, later jobs must still run
                log.exception("the queue could not be updated")

    def _advance(self) -> None:
        """Record how the running job ended, and start the next."""
        with self._lock:
            running = next((job for job in self._jobs if job.state == "running"), None)
            if running and not self._has_ended(running):
                return
            if running:
                self._change(running, _or_failed(self._finished, running))
            waiting = next((job for job in self._jobs if job.state == "waiting"), None)
            if waiting:
                self._change(waiting, _or_failed(self._started, waiting))

    def _started(self, job: Job) -> Job:
        with self.log_path(job.name).open("wb") as stderr:
            process = self._process = subprocess.Popen(
                [*self._worker, *job.arguments],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=stderr,
                start_new_session=True,
            )
        started = _start_time(process.pid)
        threading.Thread(target=process.wait, daemon=True).start()  # leaves no zombie
        return replace(job, state="running", pid=process.pid, started=started)

    def _has_ended(self, job: Job) -> bool:
        if self._process and self._process.pid == job.pid:
            return self._process.poll() is not None
        return not _is_alive(job)

    def _finished(self, job: Job) -> Job:
        """Return the job with its final state; for a process of an earlier studio only its stderr is known."""
        own = self._process if self._process and self._process.pid == job.pid else None
        status, output = own.returncode if own else None, self.output(job.name)
        is_complete = re.search(r"^next: ", output, re.MULTILINE)  # the last line of a training
        if status == 0 or (is_complete and (job.is_to_stop or status in (None, *STOPPED))):
            return replace(job, state="done")  # also if Ctrl-C came after the result was saved
        has_error = re.search(r"^error: ", output, re.MULTILINE)
        if job.is_to_stop or status in STOPPED or (status is None and not has_error):  # Ctrl-C can crash a library
            return replace(job, state="stopped")
        return replace(job, state="failed", message=_error_in(output) or f"exit status {status}")

    def _change(self, before: Job, after: Job) -> None:
        self._jobs = [after if job is before else job for job in self._jobs]
        self._write()

    def _write(self) -> None:
        content = json.dumps([asdict(job) for job in self._jobs], indent=1)
        write_file(self._folder / "studio.json", content.encode(), overwrite=True)


def _read(path: Path) -> list[Job]:
    try:
        return [Job(**{**entry, "arguments": tuple(entry["arguments"])}) for entry in read_json(path)]
    except FileNotFoundError:
        return []
    except (SboraError, TypeError, KeyError) as error:
        log.warning("%s is damaged (%s): the queue starts empty", path, error)
        return []


def _or_failed(advance: Callable[[Job], Job], job: Job) -> Job:
    """Return the job's next state, or as failed if that cannot be determined: those behind it must not be blocked."""
    try:
        return advance(job)
    except Exception as error:
        log.warning("%s cannot be run: %s", job.name, error)
        return replace(job, state="failed", message=f"it cannot be run: {getattr(error, 'strerror', None) or error}")


def _start_time(pid: int | None) -> float:
    """Return when a process was started, now if it has ended already."""
    try:
        return psutil.Process(pid).create_time()
    except psutil.Error:
        return time.time()


def _is_alive(job: Job) -> bool:
    try:
        process = psutil.Process(job.pid)
        return process.status() != psutil.STATUS_ZOMBIE and abs(process.create_time() - job.started) < 5
    except psutil.Error:
        return False


def _error_in(output: str) -> str:
    """Return the error and its hint, else the last line."""
    lines = [line for line in output.splitlines() if line.strip()]
    marked = [line.split(": ", 1)[1] for line in lines if line.startswith(("error: ", "hint: "))]
    return ". ".join(marked or lines[-1:])
