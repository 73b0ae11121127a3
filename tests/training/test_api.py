"""`sbora.train`: what the train command does, from Python."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from sbora_diffusion.adapters.basis import Interval
from sbora_diffusion.adapters.file import Adapter
from sbora_diffusion.data.concept import Concept, default_roots
from sbora_diffusion.library.library import Library
from sbora_diffusion.models.base import Base
from sbora_diffusion.training.checkpoint import CHECKPOINT, StepLog
from sbora_diffusion.training.train import TrainingInterrupted, train
from sbora_diffusion.utils.errors import SboraError

QUICK: dict[str, Any] = {"steps": 4, "save_every": 2, "rank": 4, "crops": 1, "prior_batch": 0}
QUICK |= {"sampling_steps": 1, "preview_every": 0}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(default_roots()[1] / "dog", tmp_path / "concepts" / "dog")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_folder_becomes_an_adapter_in_the_library(here: Path, tiny_folder: Path) -> None:
    logs: list[StepLog] = []
    adapter = train("concepts/dog", base=str(tiny_folder), on_step=logs.append, **QUICK)
    assert [entry.step for entry in logs] == [1, 2, 3, 4]
    assert (adapter.spec.rank, adapter.spec.recipe["crops"]) == (4, 1)
    saved = Adapter.load(here / "adapters/dog.safetensors")
    assert all(torch.equal(saved.factors[key].weight, factor.weight) for key, factor in adapter.factors.items())
    (ledger,) = Library("adapters").ledgers()
    assert [(owner.name, owner.state) for owner in ledger.owners] == [("dog", "trained")]
    with pytest.raises(SboraError, match="exists"):
        train("dog", base=str(tiny_folder), **QUICK)
    assert train("dog", base=str(tiny_folder), overwrite=True, **QUICK).spec.intervals == adapter.spec.intervals


def test_loaded_objects_are_accepted(base: Base, concept: Concept, tmp_path: Path) -> None:
    folders: dict[str, Any] = {"library": Library(tmp_path / "library"), "runs": tmp_path / "runs"}
    prompts = ["a {token}", "a {token} at night"]
    adapter = train(concept, base, interval=Interval(8, 4), preview_prompts=prompts, settings=QUICK, **folders)
    assert adapter.spec.intervals == (Interval(8, 4),)
    assert adapter.spec.recipe["preview_prompts"] == prompts
    assert (tmp_path / "library" / "rex.safetensors").exists()
    with pytest.raises(SboraError, match="got precision=bf16, but the base model was loaded in fp32"):
        train(concept, base, precision="bf16", overwrite=True, settings=QUICK, **folders)


@pytest.mark.usefixtures("here")
def test_unknown_settings_are_errors(tiny_folder: Path) -> None:
    with pytest.raises(SboraError, match="got unknown setting 'step'") as caught:
        train("dog", base=str(tiny_folder), step=3)
    assert "did you mean steps" in (caught.value.hint or "")
    assert "output_penalty" in (caught.value.hint or "")
    with pytest.raises(SboraError, match="expected true or false"):
        train("dog", base=str(tiny_folder), buckets="perhaps")


def test_an_interrupted_training_releases_its_columns_and_resumes(here: Path, tiny_folder: Path) -> None:
    def stop(entry: StepLog) -> None:
        if entry.step == 3:
            raise KeyboardInterrupt

    with pytest.raises(TrainingInterrupted, match="the last checkpoint is kept in runs/dog") as caught:
        train("dog", base=str(tiny_folder), interval="8:12", on_step=stop, **QUICK)
    assert caught.value.has_checkpoint
    assert Library("adapters").ledgers() == []
    logs: list[StepLog] = []
    adapter = train("dog", base=str(tiny_folder), resume=True, on_step=logs.append, **QUICK)
    assert [entry.step for entry in logs] == [3, 4]
    assert adapter.spec.intervals == (Interval(8, 4),)
    assert not (here / "runs/dog" / CHECKPOINT).exists()
