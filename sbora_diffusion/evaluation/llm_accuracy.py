"""Measure language-model adapters one after another, and write the results so far after each."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from sbora_diffusion import __version__
from sbora_diffusion.evaluation.reports.llm_table import Measured, to_json
from sbora_diffusion.llm.adapters import find_folder, load_adapter, read_about
from sbora_diffusion.llm.base import load_base
from sbora_diffusion.llm.evaluate import EvalConfig, Harness
from sbora_diffusion.utils.errors import SboraError
from sbora_diffusion.utils.files import check_writable, write_file


def measure(
    base: str, adapters: Sequence[str], harness: Harness, config: EvalConfig, quantize: str, limit: int | None
) -> Iterator[Measured]:
    """Yield the scores of each adapter, or of the base model if there are none.

    Raises:
        SboraError: what `load_base`, `load_adapter` and `Harness.run` raise, one adapter twice.
    """
    _check_different(adapters)
    abouts = {source: read_about(source) for source in adapters}  # errors before minutes of work
    model, tokenizer = load_base(base, getattr(torch, config.dtype), quantize)
    for source in adapters or [""]:
        adapted = load_adapter(model, source, "default").eval() if source else model
        scores = harness.run(adapted, tokenizer, config.batch_size, limit)
        yield Measured(source=source, about=abouts.get(source, {}), scores=scores)
        model = adapted.unload() if source else model


def check_new(path: Path, force: bool) -> None:
    """Raise SboraError if a results file exists and `force` is false, or cannot be written."""
    if path.exists() and not force:
        raise SboraError(f"{path} exists", "choose another --out, or overwrite it with --force")
    check_writable(path)


def write_results(path: Path, about: Mapping[str, Any], config: EvalConfig, measured: Sequence[Measured]) -> None:
    """Write all scores, how they were made, and the versions."""
    versions = {"sbora-diffusion": __version__, "torch": torch.__version__}
    results = {**about, "versions": versions, "dtype": f"torch.{config.dtype}", "models": [*map(to_json, measured)]}
    write_file(path, json.dumps(results, indent=1).encode(), overwrite=True)


def _check_different(adapters: Sequence[str]) -> None:
    """Raise SboraError if one adapter is given twice: it would count as two seeds."""
    named: dict[Path, str] = {}
    for source in adapters:
        place = (find_folder(source) or Path(source)).resolve()
        if place in named:
            raise SboraError(f"{named[place]} and {source} are one adapter", "name each --adapter once")
        named[place] = source
