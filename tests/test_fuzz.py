"""Mutated files of every kind that is read: one-line errors, and never other weights than those that were written.

FUZZ=10000 runs that many cases; FUZZ_SEED chooses others.
"""

import json
import os
import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from sbora_diffusion.adapters.file import Adapter, read_spec
from sbora_diffusion.data.concept import load_concept
from sbora_diffusion.inference.image_file import Settings, read_settings, save_numbered
from sbora_diffusion.interchange.exporting import export
from sbora_diffusion.interchange.importing import read_foreign, to_adapter
from sbora_diffusion.library.ledger import State
from sbora_diffusion.training.checkpoint import CHECKPOINT, LOG, RunFolder, append_log, read_log
from sbora_diffusion.utils.errors import SboraError
from sbora_diffusion.utils.files import RUN, read_description

from .adapters.random_adapters import SHAPES, adapter

CASES, SEED = int(os.environ.get("FUZZ", "400")), os.environ.get("FUZZ_SEED", "0")
DESCRIPTION = {"interval": "0:4", "config": {"rank": 4}}
HOSTILE = (
    b"[" * 100_000,
    b'{"a":' * 50_000,
    b"a = " + b"[" * 50_000,
    b"",
    b"\0",
    b"\xff\xfe",
    b"1e999",
    b"nan",
    b"null",
)
WORDS = (
    b"-1",
    b"1e20",
    b"9" * 400,
    b"null",
    b"[]",
    b"{}",
    b'"\\u001b[2J"',
    b"\xed\xa0\x80",
    b"true",
    b'""',
    b"\x1b[2J",
)


def mutated(content: bytes, luck: random.Random) -> bytes:
    """Flip, insert, delete, repeat, cut or replace, a few times."""
    changed = bytearray(content)
    for _ in range(luck.choice((1, 1, 1, 2, 5))):
        at, length = luck.randrange(len(changed) + 1), luck.choice((1, 2, 8, 64))
        kind = luck.randrange(8)
        if kind == 0:
            return luck.choice(HOSTILE)
        if kind == 1:
            del changed[at:]
        elif kind == 2:
            del changed[at : at + length]
        elif kind == 3:
            changed[at:at] = changed[at : at + length]
        elif kind == 4:
            changed[at : at + luck.choice((0, 1, 4))] = luck.choice(WORDS)
        elif at < len(changed):
            changed[at] ^= 1 << luck.randrange(8)
    return bytes(changed)


def weights(loaded: Adapter) -> list[bytes]:
    content = [loaded.factors[key] for key in sorted(loaded.factors)]
    tensors = [tensor for factor in content for tensor in (factor.index, factor.weight)]
    return [*sorted(loaded.factors), *(tensor.numpy().tobytes() for tensor in tensors)]  # type: ignore[list-item]


def concept_file(folder: Path) -> tuple[list[Path], Callable[[], Any], Any]:
    path = folder / "dog.safetensors"
    adapter().save(path)

    def read() -> Any:
        read_spec(path)
        loaded = Adapter.load(path)
        return weights(loaded), loaded.spec.intervals, loaded.spec.seed, loaded.describe()

    return [path], read, read()


def checkpoint(folder: Path) -> tuple[list[Path], Callable[[], Any], Any]:
    run = RunFolder(folder)
    run.save(DESCRIPTION, {"step": 1, "parameters": [torch.arange(64.0)]})

    def read() -> Any:
        state = run.start(DESCRIPTION, resume=True)
        assert state is not None
        return state["step"], state["parameters"][0].tolist()

    return [folder / CHECKPOINT], read, read()


def ledger(folder: Path) -> tuple[list[Path], Callable[[], Any], Any]:
    content = {"reservations": [], "widths": {"f00d/fa": {"unet.mid.to_q": 12}}}
    (folder / ".ledger.json").write_text(json.dumps(content))
    return [folder / ".ledger.json"], lambda: State.read(folder / ".ledger.json"), None


def run_folder(folder: Path) -> tuple[list[Path], Callable[[], Any], Any]:
    (folder / RUN).write_text(json.dumps(DESCRIPTION))
    append_log(folder, {"step": 1, "loss": 0.5})
    return [folder / RUN, folder / LOG], lambda: [read_description(folder), read_log(folder)], None


def concept_folder(folder: Path) -> tuple[list[Path], Callable[[], Any], Any]:
    for name in ("a.png", "b.png", "c.png"):
        Image.new("RGB", (8, 8)).save(folder / name)
    (folder / "concept.toml").write_text('token = "<mug>"\nclass_noun = "mug"\n[captions]\n"a.png" = "a <mug> here"\n')
    (folder / "b.txt").write_text("a <mug> there")
    (folder / "metadata.jsonl").write_text('{"file_name": "c.png", "text": "a <mug> again"}\n')
    files = [folder / "concept.toml", folder / "b.txt", folder / "metadata.jsonl"]
    return files, lambda: load_concept(str(folder), []), None


def foreign(to: str) -> Callable[[Path], tuple[list[Path], Callable[[], Any], Any]]:
    def write(folder: Path) -> tuple[list[Path], Callable[[], Any], Any]:
        files = export(adapter(), SHAPES, to, folder / "x", resolution=64, date="2026-01-01")
        files += list((folder / "x").rglob("adapter_config.json"))
        return (
            files,
            lambda: to_adapter(read_foreign(folder / "x"), SHAPES, ("tiny", "f00d"), "x").describe(),
            None,
        )

    return write


def image(folder: Path) -> tuple[list[Path], Callable[[], Any], Any]:
    settings = Settings(base="x", prompt="a <mug>", steps=4, guidance=2.0, concepts={"mug": 1.0})
    path = save_numbered(Image.new("RGB", (8, 8)), folder, settings)
    return [path], lambda: read_settings(path), None


KINDS: dict[str, Callable[[Path], tuple[list[Path], Callable[[], Any], Any]]] = {
    "concept": concept_file,
    "checkpoint": checkpoint,
    "ledger": ledger,
    "run": run_folder,
    "captions": concept_folder,
    "diffusers": foreign("diffusers"),
    "kohya": foreign("kohya"),
    "peft": foreign("peft"),
    "image": image,
}


@pytest.mark.parametrize("kind", KINDS)
def test_mutated_files_are_refused_or_unchanged(kind: str, tmp_path: Path) -> None:
    luck = random.Random(f"{SEED} {kind}")
    files, read, sound = KINDS[kind](tmp_path)
    messages: list[str] = []
    for number in range(max(1, CASES // len(KINDS))):
        path = luck.choice(files)
        content = path.read_bytes()
        path.write_bytes(mutated(content, luck))
        try:
            with warnings.catch_warnings(action="ignore"):
                assert read() == sound or sound is None, (number, path)
        except SboraError as error:
            messages.append(str(error))
        finally:
            path.write_bytes(content)
    assert messages
    assert not {"\x1b", "\0"} & set("".join(messages))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "ledger"])
def test_pipes_are_not_waited_for(kind: str, tmp_path: Path) -> None:
    files, read, _ = KINDS[kind](tmp_path)
    for path in files:
        content = path.read_bytes()
        path.unlink()
        os.mkfifo(path)
        with pytest.raises(SboraError) if path.name != "metadata.jsonl" else warnings.catch_warnings():
            read()
        path.unlink()
        path.write_bytes(content)
