"""One-file checkpoints: the model of the folder that they were made from, or an error that says what is missing."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sbora_diffusion.inference.generate import generate
from sbora_diffusion.models.base import Base, load_base
from sbora_diffusion.models.loading import recipe_base
from sbora_diffusion.utils.errors import SboraError

from ..original_names import save_original


@pytest.fixture
def checkpoint(tiny_folder: Path, tmp_path: Path) -> Path:
    return save_original(tiny_folder, tmp_path / "dream.safetensors")


def test_a_checkpoint_with_settings_beside_it(base: Base, tiny_folder: Path, checkpoint: Path) -> None:
    shutil.copytree(tiny_folder, checkpoint.with_suffix(""), ignore=shutil.ignore_patterns("*.safetensors"))
    loaded = load_base(str(checkpoint))
    assert loaded.id == str(checkpoint)
    assert loaded.family.name == recipe_base(str(checkpoint)) == "sd"
    assert loaded.fingerprint == base.fingerprint
    assert not any(parameter.requires_grad for parameter in loaded.denoiser.parameters())
    ours, theirs = (generate(one, ["a dog"], seeds=[0], steps=2)[0] for one in (loaded, base))
    assert ours.tobytes() == theirs.tobytes()


def test_a_checkpoint_without_settings_says_what_it_needs(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sbora_diffusion.utils.hub.can_be_reached", lambda: False)
    with pytest.raises(SboraError, match=r"could not load base model '.*dream.safetensors'") as caught:
        load_base(str(checkpoint))
    assert f"into {checkpoint.with_suffix('')}/ beside it" in (caught.value.hint or "")
    assert "stable-diffusion-v1-5" in (caught.value.hint or "")


def test_a_file_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "model.ckpt").write_bytes(b"\x80\x02pickled")
    with pytest.raises(SboraError, match=r"model.ckpt cannot be read as safetensors") as caught:
        load_base(str(tmp_path / "model.ckpt"))
    assert "convert" in (caught.value.hint or "")


def test_a_checkpoint_of_another_model_than_its_settings(tiny_folder: Path, checkpoint: Path) -> None:
    shutil.copytree(tiny_folder, checkpoint.with_suffix(""), ignore=shutil.ignore_patterns("*.safetensors"))
    save_file({"something": torch.zeros(2)}, checkpoint)
    with pytest.raises(SboraError, match=r"does not hold what .* describes: Failed to load CLIPTextModel"):
        load_base(str(checkpoint))
