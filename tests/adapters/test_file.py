"""The concept file: what is written comes back, and nothing half-written is left."""

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sbora_diffusion.adapters.basis import Interval, Side
from sbora_diffusion.adapters.file import Adapter, Factor, check_fits, read_spec
from sbora_diffusion.utils.errors import SboraError

from .random_adapters import SHAPES, adapter, free_intervals, sides, spec


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def assert_same(a: Adapter, b: Adapter) -> None:
    assert a.spec == b.spec
    assert a.factors.keys() == b.factors.keys()
    assert a.tokens.keys() == b.tokens.keys()
    for key, factor in a.factors.items():
        assert torch.equal(factor.index, b.factors[key].index)
        assert torch.equal(factor.weight, b.factors[key].weight)
        assert b.factors[key].index.dtype == torch.int64
    assert all(torch.equal(embedding, b.tokens[key]) for key, embedding in a.tokens.items())


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    sides,
    free_intervals,
    st.text(st.characters(categories=["L", "N", "P", "S"]), min_size=1, max_size=8),
    st.dictionaries(st.text(max_size=4), st.none() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)),
)
def test_save_load_roundtrip(tmp_path: Path, side: Side, interval: Interval, text: str, recipe: dict) -> None:
    name = text.translate({ord(letter): "_" for letter in "./\\"})
    original = adapter(interval, side, name=name, tokens={text: "dog"}, recipe=recipe, parents=(text,))
    path = tmp_path / "dog.safetensors"
    original.save(path, force=True)
    assert_same(Adapter.load(path), original)
    assert read_spec(path) == original.spec
    assert path.read_bytes() == original.to_bytes() == Adapter.load(path).to_bytes()
    assert names(tmp_path) == ["dog.safetensors"]


def test_format_1_stays_readable(tmp_path: Path) -> None:
    """The bytes of format 1, by hand: they must be readable for ever."""
    metadata = {
        "format": 1,
        "name": "dog",
        "side": "fb",
        "rank": 2,
        "intervals": ["8:10"],
        "seed": 7,
        "base_id": "emoji64",
        "base_fingerprint": "f00d",
        "tokens": {"<dog>": "dog"},
        "parents": [],
        "recipe": {"steps": 300},
        "versions": {"torch": "2.13.0"},
        "metrics": {"image": 0.75},
    }
    header = {
        "__metadata__": {"sbora": json.dumps(metadata)},
        "tokens.text_encoder.<dog>": {"dtype": "F32", "shape": [1, 2], "data_offsets": [0, 8]},
        "unet.mid.to_q.index": {"dtype": "I32", "shape": [2], "data_offsets": [8, 16]},
        "unet.mid.to_q.weight": {"dtype": "F32", "shape": [2, 3], "data_offsets": [16, 40]},
    }
    text = json.dumps(header).encode()
    path = tmp_path / "dog.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + struct.pack("<2f2i6f", 1, 2, 5, 0, *range(6)))
    expected = Adapter(
        spec(
            side="fb",
            rank=2,
            intervals=(Interval(8, 2),),
            seed=7,
            base_id="emoji64",
            recipe={"steps": 300},
            versions={"torch": "2.13.0"},
            metrics={"image": 0.75},
        ),
        {"unet.mid.to_q": Factor(torch.tensor([5, 0]), torch.arange(6.0).view(2, 3))},
        {"text_encoder.<dog>": torch.tensor([[1.0, 2.0]])},
    )
    assert_same(Adapter.load(path), expected)


def test_file_is_half_the_size_of_a_lora(tmp_path: Path) -> None:
    big = adapter(Interval(0, 16), shapes={"unet.layer": (640, 640)})
    big.save(tmp_path / "dog")
    assert (tmp_path / "dog").stat().st_size < 640 * 16 * 4 + 2000


def test_folders_are_made_and_nothing_is_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "adapters" / "dog.safetensors"
    adapter().save(path)
    before = path.read_bytes()
    with pytest.raises(SboraError, match="exists"):
        adapter(seed=1).save(path)
    assert path.read_bytes() == before
    adapter(seed=1).save(path, force=True)
    assert path.read_bytes() != before


@pytest.mark.parametrize("step", ["os.fsync", "pathlib.Path.replace", "pathlib.Path.mkdir"])
def test_a_full_disk_leaves_everything_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    path = tmp_path / "dog.safetensors"
    adapter().save(path)
    before = path.read_bytes()

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(step, fail)
    with pytest.raises(SboraError, match=r"cannot write .* \(No space left on device\)"):
        adapter(seed=1).save(path, force=True)
    assert path.read_bytes() == before
    assert names(tmp_path) == ["dog.safetensors"]


def test_an_interrupted_save_leaves_everything_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        adapter().save(tmp_path / "dog.safetensors")
    assert names(tmp_path) == []


def test_an_unwritable_path_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SboraError, match="cannot write"):
        adapter().save(tmp_path / "file" / "dog.safetensors")


def test_invalid_adapters_are_not_saved(tmp_path: Path) -> None:
    diverged = adapter()
    diverged.factors["unet.mid.to_q"].weight[0, 0] = torch.nan
    for defective, message in [
        (diverged, "some values are not finite"),
        (adapter(metrics={"loss": float("nan")}), "cannot be written as JSON"),
        (adapter(recipe={"path": Path("x")}), "cannot be written as JSON"),
        (Adapter(spec(), {}, {"unet.<cat>": torch.ones(1, 2)}), "no known component and token"),
        (
            Adapter(spec(), {"vae.layer": Factor(torch.tensor([0]), torch.ones(2, 1))}, {}),
            "layer 'vae.layer' belongs to no known component",
        ),
    ]:
        with pytest.raises(SboraError, match=message):
            defective.save(tmp_path / "dog.safetensors")
    assert names(tmp_path) == []


@pytest.mark.parametrize("side", ["fa", "fb"])
def test_check_fits(side: Side) -> None:
    stored = adapter(side=side)
    check_fits(stored, SHAPES)
    with pytest.raises(SboraError, match=r"has the layer text_encoder\.layers\.0\.fc1, which the model does not have"):
        check_fits(stored, {key: shape for key, shape in SHAPES.items() if key.startswith("unet")})
    for shape in ((3, 12), (10, 3)):
        with pytest.raises(SboraError, match=r"factor of layer unet\.mid\.to_q does not fit its weight of shape"):
            check_fits(stored, SHAPES | {"unet.mid.to_q": shape})


def test_a_description_is_safe_to_print() -> None:
    text = adapter(metrics={"\x1b[2J": "\ud800"}).describe()
    assert all(line.isprintable() for line in text.splitlines())


def test_components_and_description() -> None:
    stored = adapter(parents=("a", "b"), metrics={"image": 0.7})
    assert stored.component("unet").keys() == {"mid.to_q", "mid.to_k"}
    assert stored.component("text_encoder").keys() == {"layers.0.fc1"}
    assert stored.component("transformer") == {}
    text = stored.describe()
    for part in ("dog: SBoRA-FA of rank 3, 102 parameters", "<dog> (dog)", "0:3 (seed 0)", "unet: 2 layers", "a, b"):
        assert part in text
