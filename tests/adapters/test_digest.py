"""The digest of a concept file: changed content is refused, also content that would be valid in itself."""

import json
import struct
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from sbora_diffusion.adapters.digest import digest_of
from sbora_diffusion.adapters.file import DIGEST, METADATA, Adapter, Dense, has_digest, read_spec
from sbora_diffusion.adapters.merge import merge
from sbora_diffusion.utils.errors import SboraError

from .random_adapters import adapter


def rewritten(path: Path, spec: dict[str, object] | None = None, **tensors: torch.Tensor | None) -> Path:
    """Replace or remove (None) tensors by their key's last parts, and fields of the specification."""
    with safe_open(path, "pt") as file:
        metadata = dict(file.metadata())
        content = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    metadata[METADATA] = json.dumps(json.loads(metadata[METADATA]) | (spec or {}), sort_keys=True)
    for end, tensor in tensors.items():
        key = next(key for key in content if key.endswith(f".{end}"))
        content = {
            k: v for k, v in content.items() if k.rpartition(".")[0] != key.rpartition(".")[0] or tensor is not None
        }
        if tensor is not None:
            content[key] = tensor
    save_file(content, path, metadata)
    return path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    adapter().save(tmp_path / "dog.safetensors")
    return tmp_path / "dog.safetensors"


def test_flipped_bits_are_refused(path: Path) -> None:
    content = path.read_bytes()
    start = 8 + struct.unpack("<Q", content[:8])[0]
    for position in range(start, len(content), 7):
        path.write_bytes(content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :])
        with pytest.raises(SboraError, match=r"dog\.safetensors: is damaged: .* SHA-256"):
            Adapter.load(path)


@pytest.mark.parametrize("index", [[0, 1, 2], [2, 1, 0], [5, 6, 7]])
def test_other_indices_are_refused(path: Path, index: list[int]) -> None:
    with pytest.raises(SboraError, match="is damaged"):
        Adapter.load(rewritten(path, index=torch.tensor(index, dtype=torch.int32)))


def test_a_missing_layer_is_refused(path: Path) -> None:
    with pytest.raises(SboraError, match="is damaged"):
        Adapter.load(rewritten(path, index=None))


@pytest.mark.parametrize(
    "change", [{"intervals": ["64:67"]}, {"seed": 1}, {"tokens": {"<cat>": "cat"}}, {"side": "fb"}, {"parents": ["x"]}]
)
def test_another_specification_is_refused_from_the_header_alone(path: Path, change: dict[str, object]) -> None:
    rewritten(path, change)
    for read in (Adapter.load, read_spec):
        with pytest.raises(SboraError, match="is damaged"):
            read(path)


def test_a_digest_under_another_name_is_not_overlooked(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(DIGEST.encode(), DIGEST.replace("256", "257").encode()))
    for read in (Adapter.load, read_spec):
        with pytest.raises(SboraError, match=r"unknown metadata 'sbora\.sha257'"):
            read(path)


def test_files_of_earlier_versions_are_unchecked(path: Path) -> None:
    original = Adapter.load(path)
    assert has_digest(path)
    path.write_bytes(original.to_bytes(with_digest=False))
    assert not has_digest(path)
    assert Adapter.load(path).to_bytes() == original.to_bytes()
    assert read_spec(path) == original.spec


def test_merged_renamed_and_dense_adapters_have_their_own_digest(path: Path) -> None:
    original = Adapter.load(path)
    renamed = replace(original, spec=replace(original.spec, name="cat"))
    dense = replace(
        original,
        spec=replace(original.spec, format=2, method="lora", intervals=()),
        factors={},
        dense={"unet.to_q": Dense(torch.ones(3, 1), torch.ones(1, 4))},
    )
    for one in (renamed, dense, merge([original], [2.0], "sum")):
        one.save(path, force=True)
        assert has_digest(path)
        assert Adapter.load(path).to_bytes() == one.to_bytes()


def test_digests_differ_in_value_type_shape_and_place() -> None:
    zeros = torch.zeros(2, 3)
    values = [
        zeros, zeros.reshape(3, 2), zeros.double(), zeros.int(), -zeros, [zeros], {"a": zeros}, {"b": zeros},
        torch.tensor(0), torch.zeros(0), [], {}, None, 0, 0.0, False, "", "0", [0, 0], [[0], 0], [0, [0]],
    ]  # fmt: skip
    assert len({digest_of(value) for value in values}) == len(values)
    assert digest_of({"a": 1, "b": (zeros.t(),)}) == digest_of({"b": [zeros.t().clone()], "a": 1})
