"""Train several concepts at once: reserve an interval for each, then start a process for each."""

import logging
import shlex
import signal
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from sbora_diffusion.data.concept import default_roots, load_concept
from sbora_diffusion.library.library import Library
from sbora_diffusion.methods.registry import configure, find_method
from sbora_diffusion.models.base import load_unplaced
from sbora_diffusion.models.distributed import num_launched
from sbora_diffusion.models.loading import recipe_base
from sbora_diffusion.recipes.config import TrainConfig
from sbora_diffusion.training.checkpoint import CHECKPOINT
from sbora_diffusion.training.train import space_of
from sbora_diffusion.utils.errors import SboraError
from sbora_diffusion.utils.files import read_description
from sbora_diffusion.utils.processes import isolated

log = logging.getLogger(__name__)

COMMAND = isolated("-c", "from sbora_diffusion.cli.app import main; main()", "train")


def fan_out(
    concepts: Sequence[str],
    base_name: str,
    method: str,
    overrides: dict[str, str],
    *,
    library: Library,
    runs: Path,
    force: bool,
    jobs: int,
    cluster: int,
) -> list[Path]:
    """Train the concepts that have no file yet, `jobs` at a time or on a Ray cluster; return all concepts' files.

    All columns are reserved before the first training starts. After an interruption the same command continues:
    finished concepts stay as they are, interrupted ones are resumed, and all keep their columns.

    Raises:
        SboraError: two concepts of one name, a bad setting or folder (no training is started), failed trainings.
    """
    if num_launched() > 1:
        raise SboraError(
            "several processes were started for one training, but several concepts given", "give one --concept"
        )
    if jobs < 1:
        raise SboraError(f"got jobs={jobs}, expected at least 1")
    config = configure(recipe_base(base_name), method, overrides)
    names = [load_concept(concept, default_roots()).name for concept in concepts]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise SboraError(f"two concepts are called {repeated[0]}", "rename one in its concept.toml")
    missing = {n: concept for n, concept in zip(names, concepts, strict=True) if force or not library.path(n).exists()}
    _reserve(list(missing), base_name, config, library)
    options = ["--base", base_name, "--method", method]
    options += [word for key, value in overrides.items() for word in ("--set", f"{key}={value}")]
    tasks = {
        name: (
            [*COMMAND, "--concept", concept, *options, *_again(runs / name, config, force)],
            runs / name / "process.log",
        )
        for name, concept in missing.items()
    }
    failed = _on_cluster(tasks) if cluster else _locally(tasks, jobs)
    if failed:
        raise SboraError(
            f"{len(failed)} of {len(names)} trainings failed: {', '.join(failed)}",
            f"see {tasks[failed[0]][1]}; the same command trains what is missing",
        )
    return [library.path(name) for name in names]


def _reserve(names: Sequence[str], base_name: str, config: TrainConfig, library: Library) -> None:
    """Reserve an interval for each concept that has none, or for none of them, until the concept's file exists."""
    if not names or not find_method(config.method.name).owns_interval:
        return
    space = space_of(load_unplaced(base_name), config)
    owned = {owner.name for owner in library.owners(space.base_fingerprint, space.side)}
    reserved: list[str] = []
    try:
        for name in names:
            if name not in owned:
                log.info("%s: %s", name, library.reserve(space, config.method.rank, name, lasting=True))
                reserved.append(name)
    except SboraError:
        for name in reserved:
            library.cancel(name)
        raise


def _again(run: Path, config: TrainConfig, force: bool) -> list[str]:
    """Return the options that resume an interrupted training; with `force` one of other settings is overwritten."""
    forced = ["--force"] if force else []
    if not (run / CHECKPOINT).exists() or (force and _settings_in(run) != config.to_dict()):
        return forced
    return ["--resume", *forced]


def _settings_in(run: Path) -> object:
    try:
        return read_description(run).get("config")
    except SboraError:
        return None


def _locally(tasks: dict[str, tuple[list[str], Path]], jobs: int) -> list[str]:
    """Return the names of the trainings that failed."""
    with ThreadPoolExecutor(jobs) as pool:
        done = list(pool.map(lambda name: _logged(name, in_a_process(*tasks[name])), tasks))
    return [name for name, status in zip(tasks, done, strict=True) if status]


def _on_cluster(tasks: dict[str, tuple[list[str], Path]]) -> list[str]:
    """Train on the Ray cluster that RAY_ADDRESS names, or on this machine's; its nodes must share the folder."""
    try:
        import ray  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise SboraError("cluster=1 needs Ray", 'pip install "sbora-diffusion[cluster]"') from None
    ray.init(ignore_reinit_error=True, log_to_driver=False)
    gpus = 1 if ray.cluster_resources().get("GPU") else 0
    remote = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=2)(in_a_process)
    here = Path.cwd()
    waiting = {remote.remote(command, path, here): name for name, (command, path) in tasks.items()}
    try:
        return [name for task, name in waiting.items() if _logged(name, ray.get(task))]
    finally:
        ray.shutdown()


def _logged(name: str, status: int) -> int:
    log.info("%s: %s", name, f"failed with status {status}" if status else "done")
    return status


def in_a_process(command: Sequence[str], path: Path, folder: Path | None = None) -> int:
    """Run a command in a folder with its output in a file there, and return its exit status."""
    folder = folder or Path.cwd()
    (folder / path).parent.mkdir(parents=True, exist_ok=True)
    with (folder / path).open("ab") as output:
        output.write(f"$ {shlex.join(command[len(COMMAND) - 1 :])}\n".encode())
        output.flush()
        status = subprocess.run(command, cwd=folder, stdout=output, stderr=subprocess.STDOUT, check=False).returncode
    if status == -signal.SIGINT:
        raise KeyboardInterrupt
    return status
