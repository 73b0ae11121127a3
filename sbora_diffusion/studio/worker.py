"""Run the command line as a low-priority process for the studio's long jobs."""

import os
import signal
import sys
from contextlib import suppress
from pathlib import Path

from sbora_diffusion.utils.processes import isolated

NICENESS = 5


def work() -> None:
    """Replace this process by `sbora-diffusion` with the arguments in `sys.argv`, at a lower priority."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a server in the background ignores it, and children inherit that
    os.nice(NICENESS)
    with suppress(OSError):  # where Linux schedules by session, niceness only counts inside a session
        Path("/proc/self/autogroup").write_text(str(NICENESS), encoding="ascii")
    command = isolated("-m", "sbora_diffusion", *sys.argv[1:])
    os.execv(command[0], command)


if __name__ == "__main__":
    work()
