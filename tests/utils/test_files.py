"""Atomic writes: readers see the old file or the complete new one, and nothing temporary is left behind."""

import errno
import os
import resource
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import torch
from PIL import Image

from sbora_diffusion.utils.errors import SboraError
from sbora_diffusion.utils.files import check_writable, whole_folder, write_file

STATE = {"a": torch.arange(5)}
CONTENTS: dict[str, bytes | Callable[[BinaryIO], object]] = {
    "bytes": b"content",
    "torch.save": partial(torch.save, STATE),
    "image.save": partial(Image.new("RGB", (8, 8)).save, format="png"),
}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def fail(error: BaseException) -> Callable[..., Any]:
    def raise_it(*_: object, **__: object) -> Any:
        raise error

    return raise_it


FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.fixture
def small_disk() -> Iterator[None]:
    """Files end at 20 kB, by the operating system's limit: writing more fails as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("overwrite", [True, False])
@pytest.mark.parametrize("kind", CONTENTS)
def test_new_file_in_new_folder(tmp_path: Path, kind: str, overwrite: bool) -> None:
    path = tmp_path / "a" / "b" / "file"
    write_file(path, CONTENTS[kind], overwrite=overwrite)
    assert names(path.parent) == ["file"]
    if kind == "bytes":
        assert path.read_bytes() == b"content"
    elif kind == "torch.save":
        assert torch.equal(torch.load(path)["a"], STATE["a"])
    else:
        with Image.open(path) as image:
            assert image.size == (8, 8)


def test_existing_file_is_overwritten_only_on_request(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(FileExistsError, match="file"):
        write_file(path, b"new")
    assert path.read_bytes() == b"old"
    write_file(path, b"new", overwrite=True)
    assert path.read_bytes() == b"new"
    assert names(tmp_path) == ["file"]


@pytest.mark.parametrize("kind", ["bytes", "torch.save"])
@pytest.mark.parametrize("overwrite", [True, False])
@pytest.mark.usefixtures("small_disk")
def test_full_disk(tmp_path: Path, kind: str, overwrite: bool) -> None:
    contents = {"bytes": bytes(10**6), "torch.save": partial(torch.save, {"a": torch.zeros(10**5)})}
    path = tmp_path / "file"
    path.write_bytes(b"old")
    target = path if overwrite else tmp_path / "other"
    with pytest.raises(SboraError, match=r"cannot write .* \(File too large\)") as caught:
        write_file(target, contents[kind], overwrite=overwrite, hint="Free some disk space.")
    assert caught.value.hint == "Free some disk space."
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["file"]


@pytest.mark.parametrize("error", [FULL, KeyboardInterrupt(), ValueError("a defect"), RuntimeError("another")])
@pytest.mark.parametrize("step", ["content", "os.fsync", "pathlib.Path.replace", "os.link", "pathlib.Path.mkdir"])
def test_errors_leave_everything_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, error: BaseException
) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    target, content = path if step != "os.link" else tmp_path / "other", fail(error) if step == "content" else b"new"
    with monkeypatch.context() as patch:
        if step != "content":
            patch.setattr(step, fail(error))
        with pytest.raises(SboraError if error is FULL else type(error)) as caught:
            write_file(target, content, overwrite=step != "os.link")
    assert error is not FULL or str(caught.value) == f"cannot write {target} (No space left on device)"
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["file"]


def test_disk_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.link", fail(PermissionError(errno.EPERM, "no hard links here")))
    path = tmp_path / "file"
    write_file(path, CONTENTS["torch.save"])
    assert torch.equal(torch.load(path)["a"], STATE["a"])
    with pytest.raises(FileExistsError):
        write_file(path, b"new")
    assert names(tmp_path) == ["file"]


@pytest.mark.parametrize("error", [FULL, KeyboardInterrupt()])
def test_disk_without_hard_links_that_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    synced: list[int] = []

    def second_fails(descriptor: int) -> None:
        synced.append(descriptor)
        if len(synced) == 2:
            raise error

    monkeypatch.setattr("os.link", fail(PermissionError(errno.EPERM, "no hard links here")))
    monkeypatch.setattr("os.fsync", second_fails)
    with pytest.raises(SboraError if error is FULL else KeyboardInterrupt):
        write_file(tmp_path / "file", b"new")
    assert names(tmp_path) == []


def test_race_for_a_name_has_one_winner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    link, path = os.link, tmp_path / "file"

    def taken_first(source: Path, target: Path) -> None:
        target.write_bytes(b"theirs")
        link(source, target)

    monkeypatch.setattr("os.link", taken_first)
    with pytest.raises(FileExistsError):
        write_file(path, b"ours")
    assert path.read_bytes() == b"theirs"
    assert names(tmp_path) == ["file"]


def test_permissions_follow_the_umask(tmp_path: Path) -> None:
    (tmp_path / "plain").write_bytes(b"")
    write_file(tmp_path / "file", b"content")
    assert (tmp_path / "file").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_parent_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"old")
    with pytest.raises(SboraError, match="cannot write"):
        write_file(tmp_path / "file" / "inner", b"new")
    with pytest.raises(SboraError, match="cannot write"):
        check_writable(tmp_path / "file" / "inner")
    with pytest.raises(SboraError, match="it is a folder"):
        check_writable(tmp_path)
    check_writable(tmp_path / "new" / "file")
    assert names(tmp_path) == ["file", "new"]


def test_folder_is_replaced_as_a_whole(tmp_path: Path) -> None:
    for number in range(2):
        with whole_folder(tmp_path / "folder") as temporary:
            temporary.mkdir()
            (temporary / f"file-{number}").write_bytes(b"")
    assert names(tmp_path) == ["folder"]
    assert names(tmp_path / "folder") == ["file-1"]


@pytest.mark.parametrize("error", [FULL, KeyboardInterrupt()])
@pytest.mark.parametrize("rename", [0, 1, 2])
def test_failed_folder_keeps_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, rename: int
) -> None:
    """While the content is written (0), while the old folder moves away, and while the new one takes its place."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "old").write_bytes(b"")
    renames, replace = [], Path.replace

    def failing(path: Path, target: Path) -> Path:
        renames.append(path)
        if len(renames) == rename:
            raise error
        return replace(path, target)

    monkeypatch.setattr("pathlib.Path.replace", failing)

    def write() -> None:
        with whole_folder(tmp_path / "folder") as new:
            new.mkdir()
            if rename == 0:
                raise error

    with pytest.raises(SboraError if error is FULL else KeyboardInterrupt):
        write()
    assert names(tmp_path) == ["folder"]
    assert names(tmp_path / "folder") == ["old"]
