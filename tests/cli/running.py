"""Commands as tests call them, on a tiny base model."""

import sys
from pathlib import Path

from PIL import Image
from typer.testing import CliRunner, Result

from sbora_diffusion.cli.app import app

SETTINGS = ("steps=6", "save_every=2", "sampling_steps=2", "crops=1", "preview_every=3")
QUICK = [word for setting in SETTINGS for word in ("--set", setting)]
CLI = [sys.executable, "-c", "from sbora_diffusion.cli.app import main; main()"]


def run(*words: str | Path) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


def pixels(path: Path) -> bytes:
    with Image.open(path) as file:
        return file.tobytes()


def train(base: Path, concept: str | Path, *words: str | Path) -> Result:
    return run("train", "--concept", concept, "--base", base, *QUICK, *words)
