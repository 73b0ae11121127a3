"""What all commands share around them: one-line errors, logs on stderr, a process that starts quickly."""

import atexit
import errno
import gc
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import NoReturn

import typer

from sbora_diffusion.utils.errors import SboraError

NOTICES = {  # logger -> a notice that does not concern the user: an optional package, a caption that we cut ourselves
    "bitsandbytes.backends.cpu.ops": "gemm_4bit_forward from kernels-community",
    "transformers.utils.import_utils": "requires torchvision (not installed)",
    "transformers.tokenization_utils_base": "will result in indexing errors",
}
SPIN_COUNT = "10000"  # benchmarks/bench_threads.py
GC_THRESHOLD = 10_000  # new objects between two collections; Python's default is 700
DISK_HINT = "Make room and run the command again; what was complete before is still there."
MEMORY_HINT = "Set batch_size=1 or precision=bf16 (--set), or close other programs."

imported_for_good = nullcontext  # the llm commands still use this name


def share_cores() -> None:
    """Make waiting threads yield their core early, unless the environment says otherwise; call before importing torch.

    OpenMP spins for milliseconds by default: beside another program, two threads then take 1.6 times the CPU for the
    same work (docs/benchmarks.md, i).
    """
    if not os.environ.keys() & {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"}:
        os.environ["GOMP_SPINCOUNT"] = SPIN_COUNT


def collect_garbage_less() -> None:
    """Run the garbage collector less often, and not at exit.

    Importing torch and diffusers creates more than a million objects that all stay. Scanning them again and again takes
    a quarter of the time of a short command (docs/benchmarks.md, f).
    """
    gc.set_threshold(GC_THRESHOLD)
    atexit.register(gc.freeze)


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn errors that the user can act on into one line on stderr and an exit status."""
    try:
        yield
    except SboraError as error:
        _fail(str(error), error.hint)
    except KeyboardInterrupt as stop:
        typer.echo(f"\n{str(stop) or 'stopped'}", err=True)
        raise typer.Exit(130) from None
    except OSError as error:
        if error.errno == errno.EPIPE:  # | head
            raise
        place = f": {error.filename}" if error.filename else ""
        _fail(f"{error.strerror or error}{place}", DISK_HINT if error.errno == errno.ENOSPC else None)
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "memory" not in str(error):
            raise
        _fail("out of memory", MEMORY_HINT)


def _fail(message: str, hint: str | None) -> NoReturn:
    typer.echo(f"error: {message}", err=True)
    if hint:
        typer.echo(f"hint: {hint}", err=True)
    raise typer.Exit(1)


class _EchoHandler(logging.Handler):
    """Write to the current stderr: a progress bar may have replaced it."""

    def emit(self, record: logging.LogRecord) -> None:
        level = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        typer.echo(level + self.format(record), err=True)


def set_up_logging() -> None:
    """Send logs to stderr, ours from INFO on; call before importing model libraries."""
    logging.basicConfig(handlers=[_EchoHandler()], level=logging.WARNING, format="%(message)s")
    logging.getLogger("sbora_diffusion").setLevel(logging.INFO)
    for name, unwanted in NOTICES.items():
        logging.getLogger(name).addFilter(lambda record, unwanted=unwanted: unwanted not in record.getMessage())


def hide_loading_bars() -> None:
    """Hide the progress bars that diffusers and transformers show while a model is loaded."""
    import diffusers.utils.logging

    diffusers.utils.logging.disable_progress_bar()
    hide_bars_of_transformers()


def hide_bars_of_transformers() -> None:
    """Hide those of transformers only, without importing diffusers."""
    import transformers.utils.logging

    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)  # triggered by PEFT


# names that the train and llm commands still import from here
from sbora_diffusion.cli.options import ADAPTERS, RUNS, convert, parse_settings  # noqa: E402, F401


def parse_numbers(text: str, number: int) -> list[float]:
    """ "1,0.8" is [1.0, 0.8]; "" is all ones."""
    from sbora_diffusion.cli.options import parse_floats

    return parse_floats(text) or [1.0] * number
