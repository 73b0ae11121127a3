"""Many cells from one plan: what is there is not made again, columns are disjoint."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from sbora_diffusion.adapters.basis import Interval
from sbora_diffusion.data.concept import default_roots, load_concept
from sbora_diffusion.methods.registry import configure
from sbora_diffusion.models.base import Base, load_base

from ..helpers import train
from ..tiny_pipeline import save_tiny_pipeline

EVAL = Path(__file__).parents[2] / "eval"
RANK = 4
QUICK = {"steps": "1", "crops": "1", "sampling_steps": "1", "preview_every": "0", "rank": str(RANK)}
QUICK |= {"prior_prompts": "a cat", "preview_prompts": "a {token}"}


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(str(EVAL))
    yield
    for name in ("pooled_cells", "chosen_columns"):
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return load_base(str(save_tiny_pipeline(tmp_path_factory.mktemp("tiny"))))


def test_what_a_plan_says_is_made_once(base: Base, tmp_path: Path) -> None:
    from pooled_cells import run_all, write_tables

    one = {"variants": ["lora"], "concepts": ["dog"], "seeds": [0], "sizes": [], "settings": QUICK, "base": base.id}
    plan: dict[str, Any] = {"one": one}
    run_all(plan, tmp_path, 1, float("inf"))
    path = tmp_path / "one" / "trained" / "lora" / "0" / "dog.json"
    told, made = json.loads(path.read_bytes()), path.stat().st_mtime_ns
    assert told["parameters"] > 0 < told["peak_bytes"]
    run_all(plan, tmp_path, 1, float("inf"))
    assert path.stat().st_mtime_ns == made

    score = tmp_path / "one" / "scores" / "lora" / "0" / "dog.json"
    score.parent.mkdir(parents=True)
    score.write_text(json.dumps({"dog": {"text_mos": [1.0], "image": [0.25], "success": [1.0]}}))
    write_tables({"one": plan["one"] | {"sizes": [1]}}, tmp_path)
    assert "0.250" in (tmp_path / "one" / "table.md").read_text()


def test_variant_by_variant(tmp_path: Path) -> None:
    """A deadline leaves whole rows: a merge comes before the next variant's trainings."""
    from pooled_cells import comparison_tasks

    variants = ["lora", "sbora-fa:merge=fuse", "sbora-fa"]
    plan = {"variants": variants, "concepts": ["dog", "cat"], "seeds": [0, 1], "sizes": [1, 2]}
    keys = [task.key.split("/")[1:3] for task in comparison_tasks("one", plan, tmp_path)]
    assert [kind for kind, variant in keys if variant == "lora"] == ["trained"] * 4 + ["scores"] * 6
    assert [variant for _, variant in keys[:10]] == ["lora"] * 10
    assert [kind for kind, _ in keys[10:]] == ["trained"] * 4 + ["scores"] * 12


@pytest.mark.parametrize("kind", ["energy", "gradient", "contrast", "width"])
def test_columns_are_chosen_disjoint_and_are_what_a_training_writes(base: Base, kind: str, tmp_path: Path) -> None:
    from chosen_columns import choose, chosen_columns

    config, path = configure("emoji64", "sbora-fa", QUICK), tmp_path / "columns.pt"
    choose(kind, ["dog", "cat"], base, config, path)
    chosen = torch.load(path, weights_only=True)
    for key, (_, width) in base.layer_shapes.items():
        dog, cat = (chosen[name][key.partition(".")[2]] for name in ("dog", "cat"))
        expected = width // min(shape[1] for shape in base.layer_shapes.values()) * RANK if kind == "width" else RANK
        assert len(torch.cat([dog, cat]).unique()) == len(dog) + len(cat) == 2 * expected
    with chosen_columns(path, "cat"):
        concept = load_concept("cat", default_roots())
        last = train(concept, base, Interval(0, RANK), config, tmp_path / "run")
    for key, factor in last.adapter.factors.items():
        assert torch.equal(factor.index.sort().values, chosen["cat"][key.partition(".")[2]].sort().values)


def test_no_process_outlives_a_kill() -> None:
    script = """
import os, time
from pooled_cells import new_pool
if __name__ == "__main__":
    pool = new_pool(1)
    print(pool.submit(os.getpid).result(), flush=True)
    pool.submit(time.sleep, 300).result()
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(EVAL), *sys.path])}
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, env=environment) as parent:
        assert parent.stdout is not None
        worker = int(parent.stdout.readline())
        parent.kill()
    ends = time.monotonic() + 60
    with suppress(psutil.NoSuchProcess):
        while psutil.Process(worker).status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() < ends, "the worker goes on"
            time.sleep(0.1)
