"""What commands share: options, settings, progress, one-line errors, logs on stderr, a process that starts quickly."""

import atexit
import errno
import gc
import logging
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, Self

import typer

from sbora_diffusion.utils.errors import SboraError
from sbora_diffusion.utils.text import command_line

if TYPE_CHECKING:
    from sbora_diffusion.training.checkpoint import StepLog

log = logging.getLogger(__name__)

NOTICES = {  # logger -> a notice that does not concern the user: an optional package, a caption that we cut ourselves
    "bitsandbytes.backends.cpu.ops": "gemm_4bit_forward from kernels-community",
    "transformers.utils.import_utils": "requires torchvision (not installed)",
    "transformers.tokenization_utils_base": "will result in indexing errors",
}
SPIN_COUNT = "10000"  # benchmarks/bench_threads.py
GC_THRESHOLD = 10_000  # new objects between two collections; Python's default is 700
DISK_HINT = "Make room and run the command again; what was complete before is still there."
MEMORY_HINT = "Set batch_size=1 or precision=bf16 (--set), or close other programs."

ADAPTERS, RUNS = Path("adapters"), Path("runs")
EVALUATIONS, EXPORTS, PIPELINES = Path("evaluations"), Path("exports"), Path("pipelines")

Force = Annotated[bool, typer.Option("--force", help="Overwrite what exists.")]
Base = Annotated[
    str,
    typer.Option(metavar="ID", help="emoji64, sd15, sd21, sdxl, sd3, flux, a folder, a checkpoint file or a hub id."),
]
AdapterBase = Annotated[str, typer.Option(metavar="ID", help="Default: the base model of the first adapter.")]
Settings = Annotated[list[str], typer.Option("--set", metavar="KEY=VALUE", help="Any other setting; repeatable.")]
Floats = Annotated[str, typer.Option(metavar="W,W,…", help="One factor per adapter; default: 1, or the method's own.")]


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


def suggest(*words: object) -> None:
    """Log the command that a user is likely to run next, in a form that can be pasted into a shell."""
    log.info("next: %s", command_line(*words))


def prompt_of(tokens: Iterable[str]) -> str:
    """Return a prompt that names the first two of these tokens, "a <cat> and a <dog>", or "…" without any."""
    return " and ".join(f"a {token}" for token in [*tokens][:2]) or "…"


def hide_loading_bars(*, diffusers: bool = True) -> None:
    """Hide the progress bars that transformers and diffusers show while a model is loaded."""
    if diffusers:
        from diffusers.utils import logging as diffusers_logging

        diffusers_logging.disable_progress_bar()
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)  # triggered by PEFT


def parse_settings(settings: Sequence[str]) -> dict[str, str]:
    """["steps=20"] is {"steps": "20"}."""
    parsed = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not key or not equals:
            raise typer.BadParameter(f"got {setting!r}, expected KEY=VALUE such as steps=100", param_hint="--set")
        parsed[key.strip()] = value.strip()
    return parsed


def convert(settings: Mapping[str, str], kinds: Mapping[str, Callable[[str], Any]]) -> dict[str, Any]:
    """Convert each setting to its type; other settings than these are usage errors."""
    converted = {}
    for key, value in settings.items():
        if key not in kinds:
            raise typer.BadParameter(f"got {key!r}, expected one of {', '.join(kinds)}", param_hint="--set")
        try:
            converted[key] = kinds[key](value)
        except ValueError:
            expected = "true or false" if kinds[key] is boolean else "a number"
            raise typer.BadParameter(f"got {key}={value}, expected {expected}", param_hint="--set") from None
    return converted


def boolean(text: str) -> bool:
    """Read "true", "1", "false" or "0"."""
    known = {"true": True, "1": True, "yes": True, "on": True, "false": False, "0": False, "no": False, "off": False}
    if text.lower() not in known:
        raise ValueError(text)
    return known[text.lower()]


def parse_floats(text: str) -> list[float] | None:
    """ "1,0.8" is [1.0, 0.8]; "" is None."""
    try:
        return [float(part) for part in text.split(",")] if text else None
    except ValueError:
        raise typer.BadParameter(f"got {text!r}, expected numbers such as 1,0.8") from None


class ProgressBar:
    """A progress bar on stderr if that is a terminal; elsewhere, a log line at every tenth.

    Args:
        description: shown before the first update; "" shows the bar with the first update only.
    """

    def __init__(self, description: str = "") -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        self._is_terminal = Console(stderr=True).is_terminal
        is_main_process = os.environ.get("RANK", "0") == "0"
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            TextColumn("{task.completed}/{task.total}"),
            TimeRemainingColumn(compact=True),
            console=Console(stderr=True, quiet=not (self._is_terminal and is_main_process)),
            expand=True,
        )
        self._description, self._logged_tenths = description, -1
        self._task = self._progress.add_task(description, total=None, start=False)

    def __enter__(self) -> Self:
        if self._description:
            self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def update(self, done: int, total: int, description: str, line: str = "") -> None:
        """Show how much is done; `line` is what is logged where there is no terminal."""
        self._progress.start()
        if not self._progress.tasks[0].started:
            self._progress.reset(self._task, total=total, completed=done)  # a resumed training starts in the middle
        self._progress.update(self._task, completed=done, description=description)
        if line and not self._is_terminal and done * 10 // total > self._logged_tenths:
            self._logged_tenths = done * 10 // total
            log.info(line)

    def show_step(self, step: "StepLog") -> None:
        """Show a step of a training, its scores and its preview."""
        state = f"loss {step.loss:.3f}  {step.samples_per_second:.1f} images/s  {step.memory_bytes / 1e9:.1f} GB"
        position = f"step {step.step}/{step.steps}"
        self.update(step.step, step.steps, state, f"{position}  {state}")
        if step.scores:
            log.info("%s  %s", position, "  ".join(f"{name} {value:.3f}" for name, value in step.scores.items()))
        if step.preview:
            log.info("preview: %s", step.preview)

    def show_images(self, done: int, total: int) -> None:
        """Show the number of images of an evaluation."""
        self.update(done, total, "scoring" if done == total else "generating images", f"{done} of {total} images")
