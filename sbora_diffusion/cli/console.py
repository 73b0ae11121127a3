"""What every command does alike: errors told in a line, logs on stderr, settings read from KEY=VALUE."""

import atexit
import errno
import gc
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import typer

from sbora_diffusion.utils.errors import SboraError

ADAPTERS, RUNS = Path("adapters"), Path("runs")  # the library, and a folder for each training

IMPORT_NOTICES = {  # logger -> what it says at import about optional packages that we advise against
    "bitsandbytes.backends.cpu.ops": "gemm_4bit_forward from kernels-community",
    "transformers.utils.import_utils": "requires torchvision (not installed)",
}
SPIN_COUNT = "10000"  # benchmarks/bench_threads.py


def share_cores() -> None:
    """Let threads that wait give their core away soon; must be called before torch is imported.

    OpenMP's own default spins for milliseconds: beside another program two threads then take 1.6 times the CPU for the
    same work (docs/benchmarks.md). Whoever has set something about it keeps it.
    """
    if not os.environ.keys() & {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"}:
        os.environ["GOMP_SPINCOUNT"] = SPIN_COUNT


@contextmanager
def imported_for_good() -> Iterator[None]:
    """Meanwhile torch and what stands on it may be imported without the garbage collector looking at it, now or later.

    That is more than a million objects, all of which stay: going through them again and again, and once more at the end
    of the process, takes a quarter of the time of importing them (docs/benchmarks.md, f). A process that has torch
    already is left as it is.
    """
    if "torch" in sys.modules or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
    atexit.register(gc.freeze)  # nothing is worth collecting from a process that ends


@contextmanager
def told_in_a_line() -> Iterator[None]:
    """Turns what a user can do something about into a line on stderr and an exit status."""
    try:
        yield
    except SboraError as defect:
        _fail(str(defect), defect.hint)
    except KeyboardInterrupt as stop:
        typer.echo(f"\n{str(stop) or 'stopped'}", err=True)
        raise typer.Exit(130) from None
    except OSError as error:
        if error.errno == errno.EPIPE:  # | head
            raise
        place = f": {error.filename}" if error.filename else ""
        _fail(f"{error.strerror or error}{place}", _DISK_HINT if error.errno == errno.ENOSPC else None)
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "memory" not in str(error):
            raise
        _fail("out of memory", "Set batch_size=1 or precision=bf16 (--set), or close other programs.")


_DISK_HINT = "Make room and run the command again; what was complete before is still there."


def _fail(message: str, hint: str | None) -> NoReturn:
    typer.echo(f"error: {message}", err=True)
    if hint:
        typer.echo(f"hint: {hint}", err=True)
    raise typer.Exit(1)


class _EchoHandler(logging.Handler):
    """Writes to whatever stderr is at the moment: a progress bar may have taken it over."""

    def emit(self, record: logging.LogRecord) -> None:
        level = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        typer.echo(level + self.format(record), err=True)


def set_up_logging() -> None:
    """Logs to stderr, ours from INFO on; to be called before anything heavy is imported."""
    logging.basicConfig(handlers=[_EchoHandler()], level=logging.WARNING, format="%(message)s")
    logging.getLogger("sbora_diffusion").setLevel(logging.INFO)
    for name, unwanted in IMPORT_NOTICES.items():
        logging.getLogger(name).addFilter(lambda record, unwanted=unwanted: unwanted not in record.getMessage())


def hide_loading_bars() -> None:
    """Of other libraries: a model takes seconds to load, and each draws several."""
    import diffusers.utils.logging

    diffusers.utils.logging.disable_progress_bar()
    hide_bars_of_transformers()


def hide_bars_of_transformers() -> None:
    """The same where diffusers, which takes seconds to import, is not needed."""
    import transformers.utils.logging

    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)  # PEFT asks for it


def parse_settings(settings: Sequence[str]) -> dict[str, str]:
    """["steps=20"] is {"steps": "20"}."""
    parsed = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not key or not equals:
            raise typer.BadParameter(f"got {setting!r}, expected KEY=VALUE such as steps=100", param_hint="--set")
        parsed[key.strip()] = value.strip()
    return parsed


def convert(settings: dict[str, str], kinds: dict[str, Callable[[str], Any]]) -> dict[str, Any]:
    """Every setting's text as its kind; others than these are refused."""
    converted = {}
    for key, value in settings.items():
        if key not in kinds:
            raise typer.BadParameter(f"got {key!r}, expected one of {', '.join(kinds)}", param_hint="--set")
        try:
            converted[key] = kinds[key](value)
        except ValueError:
            raise typer.BadParameter(f"got {key}={value}, expected a number", param_hint="--set") from None
    return converted


def flag(text: str) -> bool:
    """ "0" is off, "1" on."""
    return bool(int(text))


def parse_numbers(text: str, number: int) -> list[float]:
    """ "1,0.8" is [1.0, 0.8]; nothing is all ones. How many there must be is the merger's concern."""
    try:
        return [float(part) for part in text.split(",")] if text else [1.0] * number
    except ValueError:
        raise typer.BadParameter(f"got {text!r}, expected numbers such as 1,0.8") from None
