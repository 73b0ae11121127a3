"""A folder of images belongs to one evaluation, and has no incomplete image whatever happens."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock
from PIL import Image

from sbora_diffusion.evaluation.images import claimed, read_image, write_image
from sbora_diffusion.utils.errors import SboraError

IDENTITY = {"suite": "emoji64 f00d", "adapter dog": "abc"}
RED = Image.new("RGB", (5, 7), (200, 10, 20))


def leave_images(folder: Path, identity: dict[str, str] = IDENTITY) -> Path:
    with claimed(folder, identity) as images:
        write_image(RED, images / "single/dog/000-0.png")
    return images / "single/dog/000-0.png"


def test_images_stay(tmp_path: Path) -> None:
    path = leave_images(tmp_path / "out")
    with claimed(tmp_path / "out", dict(reversed(IDENTITY.items()))) as images:
        assert read_image(images / "single/dog/000-0.png").tobytes() == RED.tobytes()
    assert [entry.name for entry in path.parent.iterdir()] == ["000-0.png"]


@pytest.mark.parametrize(
    ("identity", "message"),
    [
        (IDENTITY | {"suite": "objects"}, r"suite \(\"emoji64 f00d\" there, \"objects\" here\)"),
        (IDENTITY | {"adapter cat": "1"}, r"adapter cat \(null there, \"1\" here\)"),
        ({"suite": "emoji64 f00d"}, r"adapter dog \(\"abc\" there, null here\)"),
    ],
)
def test_another_evaluation(tmp_path: Path, identity: dict[str, str], message: str) -> None:
    path = leave_images(tmp_path)
    with pytest.raises(SboraError, match=f"holds another evaluation: it differs in {message}"):
        leave_images(tmp_path, identity)
    assert path.exists()
    with claimed(tmp_path, identity, force=True):
        assert not path.exists()
    assert json.loads((tmp_path / "evaluation.json").read_text()) == identity


@pytest.mark.parametrize(
    ("content", "message"), [(None, "says which evaluation they belong to"), ("[1]", "damaged"), ("{", "damaged")]
)
def test_nobody_knows_whose(tmp_path: Path, content: str | None, message: str) -> None:
    leave_images(tmp_path)
    (tmp_path / "evaluation.json").unlink()
    if content:
        (tmp_path / "evaluation.json").write_text(content)
    with pytest.raises(SboraError, match=message):
        leave_images(tmp_path)


def test_one_at_a_time(tmp_path: Path) -> None:
    with FileLock(tmp_path / ".lock"), pytest.raises(SboraError, match="another evaluation is running"):
        leave_images(tmp_path)
    leave_images(tmp_path)


@pytest.mark.parametrize("content", [b"", b"no image", "half", "jpeg"])
def test_damaged_images(tmp_path: Path, content: bytes | str) -> None:
    path = tmp_path / "000-0.png"
    Image.effect_noise((64, 64), 50).save(path, format="jpeg" if content == "jpeg" else "png")
    if content == "half":
        content = path.read_bytes()[:900]
    if isinstance(content, bytes):
        path.write_bytes(content)
    with pytest.raises(SboraError, match=r"cannot read .*000-0.png") as caught:
        read_image(path)
    assert caught.value.hint == "delete it and run the evaluation again"
    with pytest.raises(SboraError, match=r"cannot read .*nosuch.png"):
        read_image(tmp_path / "nosuch.png")


@pytest.mark.parametrize("moment", ["os.fsync", "pathlib.Path.replace"])
def test_killed_while_writing(tmp_path: Path, moment: str) -> None:
    """Just before the file's content is safe, and just before it gets its name."""
    module, _, function = moment.rpartition(".")
    script = f"""
import os, pathlib, signal
from PIL import Image
from sbora_diffusion.evaluation.images import write_image
{module}.{function} = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
write_image(Image.new("RGB", (5, 7)), pathlib.Path({str(tmp_path / "000-0.png")!r}))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == -9, done.stderr
    assert not (tmp_path / "000-0.png").exists()
    with claimed(tmp_path, IDENTITY):
        write_image(RED, tmp_path / "000-0.png")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "000-0.png", "evaluation.json"]
