"""Weights in pickle files are not read, unless the user allows it."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sbora_diffusion.models.base import load_base
from sbora_diffusion.models.loading import load_pipeline
from sbora_diffusion.utils.errors import SboraError
from sbora_diffusion.utils.hub import ALLOW_PICKLES, check_no_pickles, pickle_hint


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_folder, tmp_path / "base"))


def pickled(part: Path) -> Path:
    """Replace the weights of a component by a pickle file."""
    (weights,) = part.glob("*.safetensors")
    name = "pytorch_model.bin" if weights.name == "model.safetensors" else f"{weights.stem}.bin"
    torch.save(load_file(weights), part / name)
    weights.unlink()
    return part / name


@pytest.mark.parametrize("component", ["unet", "vae", "text_encoder"])
def test_a_component_in_a_pickle_file_is_refused(folder: Path, component: str) -> None:
    path = pickled(folder / component)
    with pytest.raises(SboraError, match=f"{path} is a pickle file") as caught:
        load_base(str(folder))
    assert f"set {ALLOW_PICKLES}=1" in str(caught.value.hint)


def test_pickle_files_are_read_if_allowed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = load_base(str(folder)).fingerprint
    for component in ("unet", "text_encoder"):
        pickled(folder / component)
    monkeypatch.setenv(ALLOW_PICKLES, "1")
    assert load_base(str(folder)).fingerprint == expected
    for value in ("0", "", "no"):
        monkeypatch.setenv(ALLOW_PICKLES, value)
        with pytest.raises(SboraError, match="is a pickle file"):
            check_no_pickles(folder / "unet")


def test_unread_pickle_files_do_not_matter(folder: Path) -> None:
    """Beside safetensors, of the safety checker, or of no component."""
    (folder / "unet/diffusion_pytorch_model.bin").write_bytes(b"not even a pickle")
    for other in ("safety_checker", "original"):
        (folder / other).mkdir(exist_ok=True)
        (folder / other / "pytorch_model.bin").write_bytes(b"not even a pickle")
    load_pipeline(str(folder))


@pytest.mark.parametrize("name", ["model.bin", "model.ckpt", "model.pt", "model.pth", "model.pkl"])
def test_every_kind_of_pickle_file(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    with pytest.raises(SboraError, match=name):
        check_no_pickles(tmp_path)
    (tmp_path / "model.safetensors").touch()
    check_no_pickles(tmp_path, tmp_path / "missing")


def test_hub_models_without_safetensors_name_the_setting() -> None:
    error = OSError("Could not find the necessary `safetensors` weights in {'unet/x.bin'} (variant=None)")
    assert ALLOW_PICKLES in str(pickle_hint(error))
    assert pickle_hint(OSError("no such file")) is None
