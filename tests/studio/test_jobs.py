"""The queue of long jobs: real processes, one at a time, kept on disk."""

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sbora_diffusion.studio.jobs import Job, Jobs
from sbora_diffusion.studio.worker import NICENESS
from sbora_diffusion.utils.errors import SboraError

LONG = ["train", "--concept", "dog", "--set", "steps=20000"]


@pytest.fixture
def jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Jobs]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    queue = Jobs(tmp_path / "runs")
    yield queue
    queue.close()
    for job in queue.all():  # whatever the test came to
        if job.pid and job.state == "running":
            with contextlib.suppress(ProcessLookupError):
                os.kill(job.pid, signal.SIGKILL)


def wait(jobs: Jobs, name: str, until: Callable[[Job], bool], seconds: float = 300) -> Job:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        job = jobs.find(name)
        if job and until(job):
            return job
        time.sleep(0.1)
    raise AssertionError(f"{name} is {jobs.find(name)}")


def ended(job: Job) -> bool:
    return job.state not in ("waiting", "running")


def test_done_and_failed(jobs: Jobs) -> None:
    jobs.add("good", ["--version"])
    jobs.add("bad", ["inspect", "nothing"])
    assert wait(jobs, "good", ended).state == "done"
    bad = wait(jobs, "bad", ended)
    assert bad.state == "failed"
    assert bad.message.startswith("no adapter 'nothing', neither a file nor in adapters")


def test_what_cannot_be_started_holds_nothing_up(jobs: Jobs) -> None:
    name = "long" * 100  # of its log, longer than a file's may be
    jobs.add(name, ["--version"])
    jobs.add("next", ["--version"])
    assert wait(jobs, name, ended).message == "it cannot be started: File name too long"
    assert jobs.find(name).state == "failed"  # pyright: ignore[reportOptionalMemberAccess]
    assert wait(jobs, "next", ended).state == "done"


def test_a_log_that_is_gone_holds_nothing_up(jobs: Jobs) -> None:
    jobs.add("first", LONG)
    jobs.add("next", ["--version"])
    wait(jobs, "first", lambda job: job.state == "running")
    jobs.log_of("first").unlink()
    jobs.stop("first")
    assert wait(jobs, "first", ended).state == "stopped"
    assert wait(jobs, "next", ended).state == "done"


def test_one_at_a_time_stop_and_take_out(jobs: Jobs) -> None:
    jobs.add("first", LONG)
    jobs.add("second", ["--version"])
    wait(jobs, "first", lambda job: job.state == "running")
    time.sleep(1)
    assert [job.state for job in jobs.all()] == ["running", "waiting"]
    with pytest.raises(SboraError, match="first is running already"):
        jobs.add("first", LONG)
    jobs.stop("second")
    assert wait(jobs, "second", ended).state == "stopped"
    jobs.stop("first")
    assert wait(jobs, "first", ended).state == "stopped"
    with pytest.raises(SboraError, match="first is not running"):
        jobs.stop("first")


def test_a_job_outlives_its_studio(jobs: Jobs, tmp_path: Path) -> None:
    jobs.add("long", LONG)
    jobs.add("next", ["--version"])
    running = wait(jobs, "long", lambda job: job.state == "running")
    with pytest.raises(SboraError, match="another studio is running"):
        Jobs(tmp_path / "runs")
    jobs.close()
    time.sleep(1)
    later = Jobs(tmp_path / "runs")
    try:
        assert later.find("long") == running
        wait(later, "long", lambda _: "concept <dog>" in later.log_of("long").read_text())  # it is at work
        later.stop("long")
        long = wait(later, "long", ended)
        assert long.state == "stopped", long.message
        assert wait(later, "next", ended).state == "done"
    finally:
        later.close()


def test_a_damaged_file_starts_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "studio.json").write_text("[{]")
    jobs = Jobs(tmp_path)
    jobs.close()
    assert jobs.all() == []
    assert "is damaged" in caplog.text


@pytest.mark.skipif(not Path("/proc/self/autogroup").exists(), reason="only Linux weighs whole sessions")
def test_a_training_yields_to_the_page(jobs: Jobs) -> None:
    jobs.add("long", LONG)
    running = wait(jobs, "long", lambda job: job.state == "running")
    wait(jobs, "long", lambda _: Path(f"/proc/{running.pid}/autogroup").read_text().split()[-1] == str(NICENESS))
    jobs.stop("long")
    assert wait(jobs, "long", ended).state == "stopped"
