"""The queue of long jobs: real processes, one at a time, stored on disk."""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

import psutil
import pytest

from sbora_diffusion.studio.jobs import Job, Jobs
from sbora_diffusion.studio.worker import NICENESS
from sbora_diffusion.utils.errors import SboraError

WORKER = """
import sys, time
print(*sys.argv[1:], sep="\\n", file=sys.stderr, flush=True)
if sys.argv[1] == "long":
    time.sleep(600)
sys.exit(any(line.startswith("error: ") for line in sys.argv))
"""
FAKE = (sys.executable, "-S", "-c", WORKER)  # starts at once; its arguments are its stderr


@pytest.fixture
def jobs(tmp_path: Path) -> Iterator[Jobs]:
    queue = Jobs(tmp_path / "runs", FAKE)
    yield queue
    close(queue)


@pytest.fixture
def real_jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Jobs]:
    """A queue that runs the command line."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    queue = Jobs(tmp_path / "runs")
    yield queue
    close(queue)


def close(jobs: Jobs) -> None:
    """Close a queue and kill what runs, whatever happened in the test."""
    jobs.close()
    for job in jobs.all():
        if job.pid and job.state == "running":
            with contextlib.suppress(ProcessLookupError):
                os.kill(job.pid, signal.SIGKILL)


def wait(jobs: Jobs, name: str, until: Callable[[Job], bool], seconds: float = 100) -> Job:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        job = jobs.find(name)
        if job and until(job):
            return job
        time.sleep(0.05)
    raise AssertionError(f"{name} is {jobs.find(name)}")


def has_ended(job: Job) -> bool:
    return job.state not in ("waiting", "running")


def is_running(job: Job) -> bool:
    return job.state == "running"


def test_outcomes(jobs: Jobs) -> None:
    outcomes = {
        "good": ("--version",),
        "error": ("error: no such file", "hint: Look again"),
        "crash": ("", "error: x"),
    }
    for name, lines in outcomes.items():
        jobs.add(name, lines)
    assert wait(jobs, "good", has_ended).state == "done"
    assert wait(jobs, "error", has_ended).message == "no such file. Look again"
    assert wait(jobs, "crash", has_ended).state == "failed"


def test_a_job_that_cannot_be_started_does_not_block_the_queue(jobs: Jobs) -> None:
    name = "long" * 100  # its log's name is longer than a file system allows
    jobs.add(name, ["quick"])
    jobs.add("next", ["quick"])
    assert wait(jobs, name, has_ended).message == "it cannot be run: File name too long"
    assert wait(jobs, name, has_ended).state == "failed"
    jobs.add("nul", ["a\0b"])
    jobs.add("surrogate", ["a\udcffb"])
    jobs.add("last", ["quick"])
    assert wait(jobs, "nul", has_ended).message == "it cannot be run: embedded null byte"
    assert wait(jobs, "surrogate", has_ended).state == "done"
    assert wait(jobs, "next", has_ended).state == wait(jobs, "last", has_ended).state == "done"


def test_a_process_that_ends_before_its_start_time_is_read(jobs: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_process(pid: int) -> NoReturn:
        raise psutil.NoSuchProcess(pid)

    monkeypatch.setattr(psutil, "Process", no_process)
    jobs.add("first", ["quick"])
    jobs.add("next", ["error: x"])
    assert wait(jobs, "first", has_ended).state == "done"
    assert wait(jobs, "next", has_ended).message == "x"


@pytest.mark.parametrize("method", ["_started", "_finished", "_has_ended", "_write"])
def test_no_exception_stops_the_queue(jobs: Jobs, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    original, has_failed = getattr(jobs, method), threading.Event()

    def fail_once(*arguments: object) -> object:
        if threading.current_thread() is threading.main_thread() or has_failed.is_set():
            return original(*arguments)
        has_failed.set()
        raise ZeroDivisionError("no reason")

    monkeypatch.setattr(jobs, method, fail_once)
    jobs.add("first", ["quick"])
    jobs.add("next", ["quick"])
    wait(jobs, "first", has_ended)
    assert wait(jobs, "next", has_ended).state == "done"
    assert has_failed.is_set()


def test_the_queue_is_bounded(jobs: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sbora_diffusion.studio.jobs.MAX_WAITING", 2)
    jobs.add("running", ["long"])
    wait(jobs, "running", is_running)
    jobs.add("one", ["quick"])
    jobs.add("two", ["quick"])
    with pytest.raises(SboraError, match="2 jobs are waiting, the most allowed"):
        jobs.add("three", ["quick"])
    jobs.stop("one")
    jobs.add("three", ["quick"])
    assert [job.state for job in jobs.all()] == ["running", "stopped", "waiting", "waiting"]


def test_a_missing_log_does_not_block_the_queue(jobs: Jobs) -> None:
    jobs.add("first", ["long"])
    jobs.add("next", ["quick"])
    wait(jobs, "first", lambda _: "long" in jobs.output("first"))
    jobs.log_path("first").unlink()
    jobs.stop("first")
    assert wait(jobs, "first", has_ended).state == "stopped"
    assert wait(jobs, "next", has_ended).state == "done"


def test_jobs_run_one_at_a_time_and_can_be_stopped(jobs: Jobs) -> None:
    jobs.add("first", ["long"])
    jobs.add("second", ["quick"])
    wait(jobs, "first", lambda _: "long" in jobs.output("first"))
    time.sleep(0.5)  # longer than the queue needs to start a job
    assert [job.state for job in jobs.all()] == ["running", "waiting"]
    with pytest.raises(SboraError, match="first is already running"):
        jobs.add("first", ["long"])
    jobs.stop("second")
    assert wait(jobs, "second", has_ended).state == "stopped"
    jobs.stop("first")
    assert wait(jobs, "first", has_ended).state == "stopped"
    with pytest.raises(SboraError, match="first is not running"):
        jobs.stop("first")


@pytest.mark.parametrize(("line", "state"), [("next: use it", "done"), ("step 3", "stopped"), ("error: x", "failed")])
def test_the_outcome_for_a_later_studio(jobs: Jobs, tmp_path: Path, line: str, state: str) -> None:
    """The exit status is unknown there: the stderr decides."""
    jobs.add("job", ["long", line])
    job = wait(jobs, "job", lambda _: line in jobs.output("job"))
    jobs.close()
    later = Jobs(tmp_path / "runs", FAKE)
    try:
        os.kill(job.pid or 0, signal.SIGKILL)
        assert wait(later, "job", has_ended).state == state
    finally:
        close(later)


def test_a_damaged_file_starts_an_empty_queue(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "studio.json").write_text("[{]")
    jobs = Jobs(tmp_path)
    jobs.close()
    assert jobs.all() == []
    assert "is damaged" in caplog.text


def test_commands_report_their_errors(real_jobs: Jobs) -> None:
    real_jobs.add("good", ["--version"])
    real_jobs.add("bad", ["inspect", "nothing"])
    assert wait(real_jobs, "good", has_ended).state == "done"
    bad = wait(real_jobs, "bad", has_ended)
    assert bad.state == "failed"
    assert bad.message.startswith("no adapter 'nothing', neither a file nor in adapters")


def test_a_training_outlives_its_studio(real_jobs: Jobs, tmp_path: Path, tiny_folder: Path) -> None:
    """It is stopped while it starts, started again, yields to the page, and is stopped by a later studio."""
    long = ["train", "--concept", "dog", "--base", str(tiny_folder), "--set", "steps=20000"]
    real_jobs.add("long", long)
    wait(real_jobs, "long", is_running)
    real_jobs.stop("long")
    assert wait(real_jobs, "long", has_ended).state == "stopped"
    real_jobs.add("long", long)
    real_jobs.add("next", ["--version"])
    running = wait(real_jobs, "long", is_running)
    with pytest.raises(SboraError, match="another studio is running"):
        Jobs(tmp_path / "runs")
    real_jobs.close()
    later = Jobs(tmp_path / "runs")
    try:
        assert later.find("long") == running
        wait(later, "long", lambda _: "concept <dog>" in later.output("long"))  # it is working
        autogroup = Path(f"/proc/{running.pid}/autogroup")
        if autogroup.exists():  # Linux schedules by session
            assert autogroup.read_text().split()[-1] == str(NICENESS)
        later.stop("long")
        long_job = wait(later, "long", has_ended)
        assert long_job.state == "stopped", long_job.message
        assert wait(later, "next", has_ended).state == "done"
    finally:
        close(later)
