"""Every way of giving a command nonsense ends in one clear line, and changes nothing."""

import errno
from pathlib import Path

import pytest
from filelock import FileLock

from sbora_diffusion.library.library import Library

from ..tiny_pipeline import save_tiny_pipeline
from .running import run, train


@pytest.mark.parametrize(
    "words",
    [
        ["train"],
        ["train", "--concept", "dog", "--nonsense"],
        ["train", "--concept", "dog", "--set", "steps"],
        ["train", "--concept", "dog", "--rank", "many"],
        ["generate", "a dog", "--count", "0"],
        ["ledger", "--interval", "0:8"],
        ["generate", "a dog", "--set", "nonsense=1"],
        ["generate", "a dog", "--set", "steps=many"],
        ["nonsense"],
    ],
)
def test_usage_errors(here: Path, words: list[str]) -> None:
    done = run(*words)
    assert (done.exit_code, done.stdout) == (2, "")
    assert "Error" in done.stderr
    assert not list(here.iterdir())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("train --concept nosuch", "nosuch"),
        ("train --concept empty", "no image in empty"),
        ("train --concept unreadable --base TINY", "unreadable/a.png"),
        ("train --concept horse --base nosuch", "could not load base model 'nosuch'"),
        ("train --concept horse --base TINY --rank 200", "got rank 200, expected at most 32"),
        ("merge dog", "got only dog, expected two"),
        ("remove nosuch", "no concept or reservation 'nosuch'"),
        ("train --concept dog --base TINY", "adapters/dog.safetensors exists"),
        ("train --concept horse --base TINY --interval 30:38", "30:38 does not fit"),
        ("train --concept horse --base TINY --interval 4:12", "4:12 is taken"),
        ("train --concept horse --base TINY --interval 16:20", "rank 8 needs 8"),
        ("train --concept horse --base TINY --interval nonsense", "got interval 'nonsense'"),
        ("train --concept horse --base TINY --rank 20", "no 20 consecutive positions"),
        ("train --concept horse --base TINY --rank 0", "rank=0"),
        ("train --concept horse --base TINY --method nonsense", "unknown method 'nonsense'"),
        ("train --concept horse --base TINY --set nonsense=1", "unknown setting 'nonsense'"),
        ("generate x --adapter nosuch", "no adapter 'nosuch'"),
        ("generate x --adapter posing.safetensors", "posing.safetensors: cannot be read as safetensors"),
        ("generate <dog> --adapter dog --base OTHER", "trained for"),
        ("generate <dog> --base TINY", "no loaded concept brings the token <dog>"),
        ("generate <dog> --adapter dog --adapter dog", "two adapters bring"),
        ("generate <dog> --adapter dog --strengths 1,1", "1 adapters and 2 strengths"),
        ("merge dog posing.safetensors", "posing.safetensors: cannot be read"),
        ("merge dog cat --how sum --weights 1", "2 adapters and the weights"),
        ("merge dog cat --how nonsense", "got --how nonsense"),
        ("merge dog cat --out adapters/dog.safetensors", "adapters/dog.safetensors exists"),
        ("bake dog nosuch", "no adapter 'nosuch'"),
        ("bake dog cat --strengths 1", "2 adapters and 1 strengths"),
        ("bake dog --base OTHER", "trained for"),
        ("bake dog --out empty", "empty exists, and is no pipeline"),
        ("inspect posing.safetensors", "posing.safetensors: cannot be read"),
        ("ledger --reserve My-Mug! --base TINY", "got 'My-Mug!', which is no concept's name"),
        ("ledger --reserve ../ --base TINY", "got '../', which is no concept's name"),
        ("ledger --reserve dog --base TINY", "dog has the interval 0:8 already (trained)"),
        ("ledger --reserve horse --base TINY --interval 0:4", "rank 8 needs 8"),
        ("ledger --reserve horse --base nosuch", "could not load base model 'nosuch'"),
        ("remove nosuch --yes", "no concept or reservation 'nosuch' in adapters (available: cat, dog)"),
    ],
)
def test_bad_input(adapters: Path, base: Path, tmp_path: Path, words: str, message: str) -> None:
    Path("empty").mkdir()
    Path("unreadable").mkdir()
    for name in ("posing.safetensors", "unreadable/a.png"):
        Path(name).write_text("two lines\nof text\n")
    other = save_tiny_pipeline(tmp_path / "other", seed=1) if "OTHER" in words else base
    places = {"TINY": str(base), "OTHER": str(other)}
    before = {path: path.read_bytes() for path in adapters.glob("*.safetensors")}
    done = run(*(places.get(word, word) for word in words.split()))
    assert (done.exit_code, done.stdout) == (1, ""), done.output
    lines = [line for line in done.stderr.splitlines() if line]
    assert message in lines[0]
    assert [line.split(":")[0] for line in lines] in (["error"], ["error", "hint"])
    assert before == {path: path.read_bytes() for path in adapters.glob("*.safetensors")}
    assert Library(adapters).owners("", "fa") == ()


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            OSError(errno.ENOSPC, "No space left on device", "f.png"),
            "error: No space left on device: f.png\nhint: Make",
        ),
        (PermissionError(errno.EACCES, "Permission denied", "f.png"), "error: Permission denied: f.png\n"),
        (MemoryError(), "error: out of memory\nhint: "),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "error: out of memory\nhint: "),
    ],
)
def test_os_errors_are_reported(monkeypatch: pytest.MonkeyPatch, error: Exception, message: str) -> None:
    def fail(_: Library) -> None:
        raise error

    monkeypatch.setattr(Library, "ledgers", fail)
    done = run("ledger")
    assert done.exit_code == 1
    assert done.stderr.startswith(message)


def test_our_own_defects_are_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: Library) -> None:
        raise RuntimeError("a defect")

    monkeypatch.setattr(Library, "ledgers", fail)
    assert isinstance(run("ledger").exception, RuntimeError)


def test_a_run_folder_in_use(here: Path, base: Path) -> None:
    checkpoint = here / "runs/dog/checkpoint.pt"
    checkpoint.parent.mkdir(parents=True)
    checkpoint.write_text("of the other training")
    for words in ((), ("--force",), ("--method", "lora", "--force")):
        with FileLock(here / "runs/dog/.lock"):
            done = train(base, "dog", *words)
        assert done.exit_code == 1
        assert "error: another training is running in runs/dog" in done.stderr
        assert checkpoint.exists()
    assert train(base, "dog", "--force").exit_code == 0
    assert not checkpoint.exists()
