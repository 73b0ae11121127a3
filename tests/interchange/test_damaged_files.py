"""Hostile and damaged files of other programs: each defect is one error that names the file."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sbora_diffusion.adapters.file import Adapter
from sbora_diffusion.interchange.exporting import FORMATS
from sbora_diffusion.utils.errors import SboraError

from .samples import assert_same, random_adapter
from .written import read, rewrite, write

ONE = torch.ones(1)


def edit_config(**fields: object) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "unet/adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_bytes()) | fields))

    return edit


def edit_file(pattern: str, change: Callable[[dict[str, Tensor]], Any], **metadata: str) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        rewrite(next(folder.glob(pattern)), change, **metadata)

    return edit


def renamed(old: str, new: str) -> Callable[[dict[str, Tensor]], Any]:
    return lambda tensors: {key.replace(old, new): tensor for key, tensor in tensors.items()}


def mapped(end: str, change: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], Any]:
    return lambda tensors: {key: change(t) if key.endswith(end) else t for key, t in tensors.items()}


@pytest.mark.parametrize(
    ("to", "damage", "message"),
    [
        ("peft", edit_config(peft_type="LOHA"), "of type 'LOHA', expected a LoRA"),
        ("peft", edit_config(use_dora=True), "made with use_dora"),
        ("peft", edit_config(bias="all"), "made with bias 'all'"),
        ("peft", edit_config(lora_alpha="x"), "alpha of layer .* is 'x'"),
        ("peft", edit_config(lora_alpha=float("inf")), "is inf, expected a number"),
        ("peft", edit_config(alpha_pattern={"(a+)+$": 1}), "the regular expression"),
        ("peft", edit_config(alpha_pattern=[1]), "alpha_pattern is list"),
        ("peft", lambda f: (f / "unet/adapter_config.json").write_text("{"), "cannot be read as JSON"),
        ("peft", lambda f: (f / "unet/adapter_config.json").write_text("[" * 10**5), "cannot be read as JSON"),
        ("peft", lambda f: (f / "unet/adapter_model.safetensors").unlink(), "no such file"),
        ("peft", lambda f: (f / "unet").rename(f / "text_encoder_2"), "which the base model does not have"),
        ("kohya", edit_file("*.saf*", renamed("lora_down.weight", "dora_scale")), "belongs to no plain LoRA"),
        ("kohya", edit_file("*.saf*", renamed("lora_unet", "lora_\x1b[31m")), r"'lora_\\x1b\[31m.*no plain LoRA"),
        ("kohya", edit_file("*.saf*", renamed("attn2_to_k", "ff_net_2")), "which the base model does not have"),
        ("kohya", edit_file("*.saf*", lambda t: {k: v for k, v in t.items() if "up" not in k}), "lacks its up factor"),
        ("kohya", edit_file("*.saf*", lambda t: {"a.alpha": torch.ones(())} | t), "layer a lacks its down and up"),
        ("kohya", edit_file("*.saf*", lambda _: dict.fromkeys(("a.lora_A.weight", "a.lora.down.weight"), ONE)),
         "layer a has two down factors"),
        ("kohya", edit_file("*.saf*", lambda _: {"bundle_emb.x.clip_x": ONE}), "no LoRA layer|the embedding"),
        ("kohya", edit_file("*.saf*", lambda t: t | {"bundle_emb.x.clip_x": ONE}), "has the embedding"),
        ("kohya", edit_file("*.saf*", mapped("alpha", lambda _: torch.ones(2))), "alpha of layer .* has 2 values"),
        ("kohya", edit_file("*.saf*", mapped("alpha", lambda _: torch.tensor(torch.nan))), "has the scale nan"),
        ("kohya", edit_file("*.saf*", mapped("up.weight", lambda t: t * torch.inf)), "not finite"),
        ("kohya", edit_file("*.saf*", mapped("up.weight", lambda t: t[:, :2])), "the ranks 3"),
        ("kohya", edit_file("*.saf*", mapped("up.weight", lambda t: t[1:])), "of 11×8, the base model has 12×8"),
        ("kohya", edit_file("*.saf*", mapped("down.weight", lambda t: t[:, :, None, None])), "linear layers only"),
        ("kohya", edit_file("*.saf*", mapped("down.weight", lambda t: t.to(torch.complex64))), "dtype torch.complex64"),
        ("kohya", edit_file("*.saf*", mapped("down.weight", torch.randn_like)), "is a dense LoRA"),
        ("kohya", edit_file("*.saf*", lambda _: {"a": ONE}), "'a', which belongs to no plain LoRA"),
        ("kohya", edit_file("*.saf*", lambda _: None, **{"sbora.spec": "{}"}), "metadata must have exactly the keys"),
        ("kohya", lambda f: next(f.glob("*.saf*")).write_bytes(b"\x80\x02pickle"), "cannot be read as safetensors"),
        ("kohya", lambda f: (f / "second.safetensors").touch(), "has 2 safetensors files, expected one"),
        ("kohya", edit_file("emb*/*", mapped("emb_params", lambda t: t[:, :5])), "has vectors of width 5"),
        ("kohya", edit_file("emb*/*", mapped("emb_params", lambda t: t * torch.nan)), "'<dog>': some values are not"),
        ("kohya", edit_file("emb*/*", mapped("emb_params", lambda t: t.int())), "'<dog>': got torch.int32"),
        ("kohya", edit_file("emb*/*", renamed("emb_params", "clip_g")), "it has none"),
        ("kohya", edit_file("emb*/*", lambda t: t | {"clip_l": torch.ones(1, 8)}), "two embeddings for one text"),
        ("kohya", edit_file("emb*/*", lambda _: {"a": ONE, "b": ONE}), "has 2 keys, expected one"),
        ("kohya", lambda f: (f / "embeddings/dog.safetensors").write_bytes(b""), "cannot be read as safetensors"),
        ("diffusers", edit_file("*.saf*", lambda _: None, lora_adapter_metadata="{"), "is not JSON"),
        ("diffusers", edit_file("*.saf*", lambda _: None, lora_adapter_metadata="[]"), "is list, expected an object"),
        ("diffusers", edit_file("*.saf*", lambda _: None, lora_adapter_metadata='{"unet.use_dora": 1}'), "use_dora"),
    ],
)  # fmt: skip
def test_hostile_files(tmp_path: Path, to: str, damage: Callable[[Path], Any], message: str) -> None:
    write(random_adapter(), tmp_path, to)
    damage(tmp_path)
    with pytest.raises(SboraError, match=message) as caught:
        read(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(SboraError, match="no such file"):
        read(tmp_path / "nothing.safetensors")
    with pytest.raises(SboraError, match="has 0 safetensors files"):
        read(tmp_path)


@pytest.mark.parametrize("seed", range(60))
def test_random_damage_is_reported_or_harmless(tmp_path: Path, seed: int) -> None:
    """Any byte anywhere may be another one, and any tail may be missing."""
    chance = random.Random(seed)
    write(random_adapter(), tmp_path, FORMATS[seed % 3])
    path = chance.choice(sorted(path for path in tmp_path.rglob("*") if path.is_file()))
    content = bytearray(path.read_bytes())
    for _ in range(chance.randint(1, 3)):
        content[chance.randrange(min(len(content), 400))] = chance.randrange(256)
    path.write_bytes(content[: chance.choice([len(content), chance.randrange(len(content))])])
    try:
        adapter = read(tmp_path)
        adapter.save(tmp_path / "saved.safetensors")
    except SboraError:
        return
    assert_same(Adapter.load(tmp_path / "saved.safetensors"), adapter)
