"""Defective concept files: no file whatsoever crashes load, each defect is one error that names the file."""

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

from sbora_diffusion.adapters.file import Adapter, read_spec
from sbora_diffusion.utils.errors import SboraError

from .random_adapters import adapter, spec

quick = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


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

    (tmp_path / "x.safetensors").touch()
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
