"""The command line as a process of its own for the studio's long jobs: it yields to the page, and hears Ctrl-C."""

import os
import signal
from contextlib import suppress
from pathlib import Path

from sbora_diffusion.cli.app import main

NICENESS = 5


def work() -> None:
    """Run the command in `sys.argv`."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a server in the background has it ignored
    os.nice(NICENESS)
    with suppress(OSError):  # where Linux weighs whole sessions, niceness counts inside of this one only
        Path("/proc/self/autogroup").write_text(str(NICENESS), encoding="ascii")
    main()


if __name__ == "__main__":
    work()
