"""Long jobs, one at a time: each a process of the command line, which neither a closed page nor server takes along."""

import json
import logging
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import psutil
from filelock import FileLock, Timeout

from sbora_diffusion.utils.errors import SboraError

log = logging.getLogger(__name__)

State = Literal["waiting", "running", "done", "stopped", "failed"]
PERIOD = 0.3  # seconds between looks at what runs
STOPPED = (130, -signal.SIGINT)  # exit statuses of a command that Ctrl-C ended


@dataclass(frozen=True, kw_only=True)
class Job:
    """A command with its arguments, and what became of it."""

    name: str  # of the concept: one job each
    arguments: tuple[str, ...]
    state: State = "waiting"
    pid: int | None = None
    started: float = 0.0  # when the process did, in seconds since the epoch: its number may be given out again
    message: str = ""  # why it failed
    is_to_stop: bool = False  # it was asked to

    @property
    def is_active(self) -> bool:
        """Whether it is at work, or will be."""
        return self.state in ("waiting", "running")


class Jobs:
    """The queue, kept in `studio.json` of a folder, with the jobs' stderr beside it.

    Raises:
        SboraError: another studio is at work in the folder.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._claim = FileLock(folder / ".studio.lock", timeout=0)
        try:
            self._claim.acquire()
        except Timeout:
            raise SboraError(f"another studio is running in {folder.resolve().parent}", "Use that one.") from None
        self._lock = threading.RLock()
        self._process: subprocess.Popen[bytes] | None = None
        self._jobs = _read(folder / "studio.json")
        self._closed = threading.Event()
        threading.Thread(target=self._run, daemon=True).start()

    def close(self) -> None:
        """Start nothing more; what runs goes on."""
        self._closed.set()
        self._claim.release()

    def all(self) -> list[Job]:
        """In the order they were asked for."""
        with self._lock:
            return list(self._jobs)

    def find(self, name: str) -> Job | None:
        """The job of this name."""
        return next((job for job in self.all() if job.name == name), None)

    def is_running(self) -> bool:
        """Whether a job is at work."""
        return any(job.state == "running" for job in self.all())

    def add(self, name: str, arguments: Sequence[str]) -> None:
        """Put a job at the end of the queue, in place of a finished one of its name."""
        with self._lock:
            before = self.find(name)
            if before and before.is_active:
                raise SboraError(f"{name} is {before.state} already", "Stop it first.")
            self._jobs = [job for job in self._jobs if job.name != name]
            self._jobs.append(Job(name=name, arguments=tuple(arguments)))
            self._write()

    def stop(self, name: str) -> None:
        """End a running job as Ctrl-C does, or take a waiting one out of the queue."""
        with self._lock:
            job = self.find(name)
            if job is None or not job.is_active:
                raise SboraError(f"{name} is not running")
            if job.pid is not None and _is_alive(job):
                self._change(job, replace(job, is_to_stop=True))
                os.kill(job.pid, signal.SIGINT)
            elif job.pid is None:
                self._change(job, replace(job, state="stopped"))

    def log_of(self, name: str) -> Path:
        """Where a job's stderr goes."""
        return self._folder / f"{name}.stderr"

    def said(self, name: str) -> str:
        """What a job has written to its stderr so far; nothing where that is gone."""
        try:
            return self.log_of(name).read_text(encoding="utf-8", errors="replace")
        except OSError:
            return ""

    def _run(self) -> None:
        while not self._closed.wait(PERIOD):
            try:
                self._look()
            except OSError:
                log.exception("the queue cannot go on")

    def _look(self) -> None:
        """Note the end of what ran, and start the next."""
        with self._lock:
            running = next((job for job in self._jobs if job.state == "running"), None)
            if running and not self._has_ended(running):
                return
            if running:
                self._change(running, self._end_of(running))
            waiting = next((job for job in self._jobs if job.state == "waiting"), None)
            if waiting:
                self._change(waiting, self._started(waiting))

    def _started(self, job: Job) -> Job:
        """Running, or failed where it cannot even begin: those behind it must not wait for it."""
        try:
            return self._start(job)
        except OSError as error:
            log.warning("%s cannot be started: %s", job.name, error)
            return replace(job, state="failed", message=f"it cannot be started: {error.strerror or error}")

    def _start(self, job: Job) -> Job:
        command = [sys.executable, "-m", "sbora_diffusion.studio.worker", *job.arguments]
        with self.log_of(job.name).open("wb") as stderr:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=stderr, start_new_session=True
            )
        threading.Thread(target=self._process.wait, daemon=True).start()  # whoever is waited for leaves no zombie
        pid = self._process.pid
        return replace(job, state="running", pid=pid, started=psutil.Process(pid).create_time())

    def _has_ended(self, job: Job) -> bool:
        if self._process and self._process.pid == job.pid:
            return self._process.poll() is not None
        return not _is_alive(job)

    def _end_of(self, job: Job) -> Job:
        """How it ended; of a process that a former server started only its own words tell."""
        known = self._process is not None and self._process.pid == job.pid
        status = self._process.returncode if known and self._process else None
        said = self.said(job.name)
        told_error = re.search(r"^error: ", said, re.MULTILINE)
        if status == 0 or (
            (job.is_to_stop or status in (None, *STOPPED)) and re.search(r"^next: ", said, re.MULTILINE)
        ):
            return replace(job, state="done")  # also when Ctrl-C came after the last word
        if job.is_to_stop or status in STOPPED or (status is None and not told_error):  # libraries may die of Ctrl-C
            return replace(job, state="stopped")
        return replace(job, state="failed", message=_last_words(said) or f"It ended with status {status}.")

    def _change(self, before: Job, after: Job) -> None:
        self._jobs = [after if job is before else job for job in self._jobs]
        self._write()

    def _write(self) -> None:
        partial = self._folder / ".studio.json.partial"
        partial.write_text(json.dumps([asdict(job) for job in self._jobs], indent=1), encoding="utf-8")
        partial.replace(self._folder / "studio.json")


def _read(path: Path) -> list[Job]:
    try:
        return [Job(**{**entry, "arguments": tuple(entry["arguments"])}) for entry in json.loads(path.read_bytes())]
    except FileNotFoundError:
        return []
    except (ValueError, TypeError, KeyError) as error:
        log.warning("%s is damaged (%s) and starts anew", path, error)
        return []


def _is_alive(job: Job) -> bool:
    try:
        process = psutil.Process(job.pid)
        return process.status() != psutil.STATUS_ZOMBIE and abs(process.create_time() - job.started) < 5
    except psutil.NoSuchProcess:
        return False


def _last_words(said: str) -> str:
    """The error and its hint, or the last line."""
    told = [line.split(": ", 1)[1] for line in said.splitlines() if line.startswith(("error: ", "hint: "))]
    if told:
        return ". ".join(told)
    lines = [line for line in said.splitlines() if line.strip()]
    return lines[-1] if lines else ""
