"""The concept file: what is written comes back, nothing half-written is left, and no file whatsoever crashes load."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from sbora_diffusion.adapters.basis import Interval, Side
from sbora_diffusion.adapters.file import Adapter, Factor, check_fits, read_spec
from sbora_diffusion.utils.errors import SboraError

from .random_adapters import SHAPES, adapter, free_intervals, sides, spec

quick = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


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


@settings(quick, max_examples=30)  # every example waits for the disk
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


def written(tmp_path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None) -> Path:
    path = tmp_path / "bad.safetensors"
    save_file(tensors, path, metadata)
    return path


def sound() -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    tensors = {
        "unet.to_q.index": torch.tensor([3, 1, 2], dtype=torch.int32),
        "unet.to_q.weight": torch.ones(4, 3),
        "tokens.text_encoder.<dog>": torch.ones(1, 4),
    }
    return tensors, json.loads(spec().to_json())


def rename(tensors: dict[str, torch.Tensor], layer: str) -> None:
    for half in ("index", "weight"):
        tensors[f"{layer}.{half}"] = tensors.pop(f"unet.to_q.{half}")


DEFECTS: list[tuple[str, Callable[[dict[str, Any], dict[str, Any]], Any], str]] = [
    ("unknown key", lambda t, _: t.update({"unet.to_q.alpha": torch.ones(1)}), "unknown key 'unet.to_q.alpha'"),
    ("unknown component", lambda t, _: rename(t, "vae.to_q"), r"layer 'vae\.to_q' belongs to no known component"),
    ("no layer", lambda t, _: rename(t, "unet"), "layer 'unet' belongs to no known component"),
    ("no name", lambda t, _: rename(t, ""), "layer '' belongs to no known component"),
    ("no index", lambda t, _: t.pop("unet.to_q.index"), r"layer unet\.to_q lacks its index"),
    ("no weight", lambda t, _: t.pop("unet.to_q.weight"), r"layer unet\.to_q lacks its weight"),
    ("index dtype", lambda t, _: t.update({"unet.to_q.index": torch.tensor([3.0, 1, 2])}), "expected int32"),
    ("index shape", lambda t, _: t.update({"unet.to_q.index": torch.ones(3, 1, dtype=torch.int32)}), "do not match"),
    ("index scalar", lambda t, _: t.update({"unet.to_q.index": torch.tensor(1, dtype=torch.int32)}), "do not match"),
    ("negative", lambda t, _: t["unet.to_q.index"].__setitem__(0, -1), "negative or repeated"),
    ("repeated", lambda t, _: t["unet.to_q.index"].__setitem__(0, 1), "negative or repeated"),
    ("weight dtype", lambda t, _: t.update({"unet.to_q.weight": torch.ones(4, 3).half()}), "expected a float32 matrix"),
    ("weight shape", lambda t, _: t.update({"unet.to_q.weight": torch.ones(4, 2)}), "do not match rank 3"),
    ("empty", lambda t, _: t.update({"unet.to_q.weight": torch.ones(0, 3)}), "expected a float32 matrix"),
    ("not finite", lambda t, _: t["unet.to_q.weight"].__setitem__((0, 0), torch.inf), "not finite"),
    ("over rank", lambda _, m: m.update(rank=2), "do not match rank 2"),
    ("token unknown", lambda t, _: t.update({"tokens.text_encoder.<x>": torch.ones(1, 4)}), "no known component"),
    ("token without component", lambda t, _: t.update({"tokens.<dog>": torch.ones(1, 4)}), "no known component"),
    ("token shape", lambda t, _: t.update({"tokens.text_encoder.<dog>": torch.ones(4)}), "expected a float32 matrix"),
    ("newer", lambda _, m: m.update(format=3), "got format 3, this version reads 1 and 2"),
    ("side", lambda _, m: m.update(side="fc"), "got side 'fc'"),
    ("a path", lambda _, m: m.update(name="/tmp/x"), "without slashes"),
    ("a hidden file", lambda _, m: m.update(name=".x"), "without slashes"),
    ("rank", lambda _, m: m.update(rank=0), "got rank 0"),
    ("bool", lambda _, m: m.update(rank=True), "metadata rank is bool, expected int"),
    ("interval", lambda _, m: m.update(intervals=["8-16"]), "expected start:stop"),
    ("interval type", lambda _, m: m.update(intervals=[[8, 16]]), "intervals must consist of strings"),
    ("parents type", lambda _, m: m.update(parents=[1]), "parents must consist of strings"),
    ("noun type", lambda _, m: m.update(tokens={"<dog>": 1}), "tokens must consist of strings"),
    ("escape codes", lambda _, m: m.update(name="\x1b[2Jdog"), "expected printable characters"),
    ("surrogate", lambda _, m: m.update(base_id="\ud800"), "cannot be printed"),
    ("nameless", lambda _, m: m.update(name=""), "expected printable characters"),
    ("extra key", lambda _, m: m.update(colour="red"), "must have exactly the keys"),
    ("missing key", lambda _, m: m.pop("seed"), "must have exactly the keys"),
]


@pytest.mark.parametrize(("defect", "message"), [pytest.param(f, m, id=name) for name, f, m in DEFECTS])
def test_every_defect_is_reported(tmp_path: Path, defect: Callable[..., Any], message: str) -> None:
    tensors, metadata = sound()
    Adapter.load(written(tmp_path, tensors, {"sbora": json.dumps(metadata)}))
    defect(tensors, metadata)
    with pytest.raises(SboraError, match=message) as error:
        Adapter.load(written(tmp_path, tensors, {"sbora": json.dumps(metadata)}))
    assert str(tmp_path / "bad.safetensors") in str(error.value)


@pytest.mark.parametrize(
    "text", ["", "[]", "null", "1", "{", "[" * 100_000, '{"format": ' + "9" * 5000 + "}", '"\\ud800"', "{}"]
)
def test_hostile_metadata(tmp_path: Path, text: str) -> None:
    with pytest.raises(SboraError, match="sbora metadata"):
        Adapter.load(written(tmp_path, sound()[0], {"sbora": text}))


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_another_kind_of_safetensors_file(tmp_path: Path, metadata: dict[str, str] | None) -> None:
    with pytest.raises(SboraError, match="is not a concept file") as error:
        Adapter.load(written(tmp_path, sound()[0], metadata))
    assert error.value.hint == "Import other LoRA files."


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0" * 8,
        b"two\nlines\n",
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 2**64 - 1),
        struct.pack("<Q", 10**8) + b"{" * 100,
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 100_000) + b"[" * 100_000,
        struct.pack("<Q", 64) + b'{"a":{"dtype":"F99","shape":[1],"data_offsets":[0,4]}}'.ljust(64) + b"\0" * 4,
    ],
)
def test_other_file_formats_are_reported(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    for read in (Adapter.load, read_spec):
        with pytest.raises(SboraError, match=r"bad\.safetensors"):
            read(path)


def test_a_file_that_goes_away_between_two_looks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """safetensors opens it, and torch once more: another process may have removed it."""

    def gone(*_: object, **__: object) -> None:
        raise RuntimeError("unable to open file <x> in read-only mode: No such file or directory (2)")

    monkeypatch.setattr("sbora_diffusion.adapters.file.safe_open", gone)
    with pytest.raises(SboraError, match="unable to open file"):
        read_spec(tmp_path / "x.safetensors")


def test_missing_file_is_reported(tmp_path: Path) -> None:
    with pytest.raises(SboraError, match="no such file"):
        Adapter.load(tmp_path / "none.safetensors")
    with pytest.raises(SboraError, match="cannot be read"):
        Adapter.load(tmp_path)


@quick
@given(st.data())
def test_damaged_files_are_errors_or_sound(tmp_path: Path, data: st.DataObject) -> None:
    content = bytearray(adapter().to_bytes())
    header = 8 + struct.unpack("<Q", content[:8])[0]
    for _ in range(data.draw(st.integers(0, 4))):
        position = data.draw(st.integers(0, header - 1) | st.integers(0, len(content) - 1))
        content[position] = data.draw(st.integers(0, 255))
    del content[data.draw(st.just(len(content)) | st.integers(0, len(content))) :]
    load_never_crashes(tmp_path, bytes(content))


@quick
@given(st.binary(max_size=64))
@example(b"")
def test_garbage_is_an_error(tmp_path: Path, content: bytes) -> None:
    load_never_crashes(tmp_path, content)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@quick
@given(st.dictionaries(st.sampled_from(list(json.loads(spec().to_json()))), json_values, max_size=4))
def test_metadata_of_any_type_is_an_error_or_sound(tmp_path: Path, changes: dict[str, Any]) -> None:
    tensors, metadata = sound()
    load_never_crashes(tmp_path, written(tmp_path, tensors, {"sbora": json.dumps(metadata | changes)}).read_bytes())


def load_never_crashes(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    try:
        loaded = Adapter.load(path)
    except SboraError as error:
        message = str(error)
    else:
        loaded.describe().encode()
        message = str(path)
    assert str(path) in message


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
