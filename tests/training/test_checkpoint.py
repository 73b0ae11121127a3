"""Checkpoints: changed ones are refused, not resumed with other numbers."""

import io
import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sbora_diffusion.training.checkpoint import CHECKPOINT, RunFolder
from sbora_diffusion.utils.errors import SboraError

DESCRIPTION = {"concept": {"name": "rex"}, "interval": "0:4", "config": {"rank": 4, "learning_rate": 1e-3}}


def state() -> dict[str, Any]:
    parameter = torch.nn.Parameter(torch.arange(6.0).reshape(2, 3))
    optimizer = torch.optim.AdamW([parameter])
    parameter.sum().backward()
    optimizer.step()
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    return {
        "step": 2,
        "mean_loss": 0.25,
        "parameters": [parameter.detach()],
        "optimizer": optimizer.state_dict(),
        "schedule": schedule.state_dict(),
        "averages": None,
        "best": {"step": 1, "values": [torch.ones(2).bfloat16()]},
    }


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    folder = RunFolder(tmp_path)
    folder.save(DESCRIPTION, state())
    return folder


def change(folder: RunFolder, how: Callable[[dict[str, Any]], object]) -> None:
    content = torch.load(folder.path / CHECKPOINT, weights_only=True)
    how(content)
    torch.save(content, folder.path / CHECKPOINT)


def as_bytes(value: Any) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def test_a_sound_one_is_what_was_saved(folder: RunFolder) -> None:
    found = folder.start(DESCRIPTION, resume=True)
    assert found is not None
    assert as_bytes(found) == as_bytes(state())


@pytest.mark.parametrize(
    "how",
    [
        lambda s: s.update(step=3),
        lambda s: s.update(mean_loss=0.5),
        lambda s: s.update(averages=[]),
        lambda s: s.pop("best"),
        lambda s: s["parameters"][0].__setitem__((0, 0), 9),
        lambda s: s["optimizer"]["state"][0]["exp_avg"].mul_(2),
        lambda s: s["optimizer"]["param_groups"][0].update(lr=1.0),
        lambda s: s["schedule"].update(last_epoch=7),
        lambda s: s.update(parameters=[s["parameters"][0].double()]),
        lambda s: s.update(run=json.dumps(json.loads(s["run"]) | {"sha256": "0" * 64})),
        lambda s: s.update(run=json.dumps(json.loads(s["run"]) | {"sha256": 7})),
    ],
)
def test_changed_state_is_refused(folder: RunFolder, how: Callable[[dict[str, Any]], object]) -> None:
    change(folder, how)
    with pytest.raises(SboraError, match=r"checkpoint\.pt is damaged: its content does not fit") as caught:
        folder.start(DESCRIPTION, resume=True)
    assert caught.value.hint == "restore a copy of it, or start over with --force"


def test_a_digest_under_another_name_is_not_overlooked(folder: RunFolder) -> None:
    change(folder, lambda s: s.update(run=s["run"].replace("sha256", "sha257")))
    with pytest.raises(SboraError, match="differs in sha257"):
        folder.start(DESCRIPTION, resume=True)


def test_one_of_an_earlier_version_is_resumed(folder: RunFolder) -> None:
    change(folder, lambda s: s.update(run=json.dumps(DESCRIPTION)))
    assert folder.start(DESCRIPTION, resume=True)


@pytest.mark.parametrize(
    "content", [b"", b"two\nlines", b"PK\x03\x04", as_bytes([1]), as_bytes({"run": "[" * 100_000})]
)
def test_garbage_is_one_line_without_torchs_advice(folder: RunFolder, content: bytes) -> None:
    (folder.path / CHECKPOINT).write_bytes(content)
    with pytest.raises(SboraError, match=r"checkpoint\.pt is damaged, or no checkpoint$") as caught:
        folder.start(DESCRIPTION, resume=True)
    assert caught.value.hint == "start over with --force"


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / CHECKPOINT)
    with pytest.raises(SboraError, match="is damaged, or no checkpoint"):
        RunFolder(tmp_path).start(DESCRIPTION, resume=True)


def test_flipped_bytes_never_change_the_numbers(folder: RunFolder) -> None:
    content, original, luck = (folder.path / CHECKPOINT).read_bytes(), as_bytes(state()), random.Random(0)
    for _ in range(150):
        position = luck.randrange(len(content))
        flipped = content[:position] + bytes([content[position] ^ (1 << luck.randrange(8))]) + content[position + 1 :]
        (folder.path / CHECKPOINT).write_bytes(flipped)
        try:
            found = folder.start(DESCRIPTION, resume=True)
        except SboraError:
            continue
        assert as_bytes(found) == original
