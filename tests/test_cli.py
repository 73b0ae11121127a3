"""Every command end to end on a tiny base model, every way of giving it nonsense, and every way of stopping it."""

import errno
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from filelock import FileLock
from PIL import Image
from typer.testing import CliRunner, Result

from sbora_diffusion import __version__
from sbora_diffusion.adapter.file import Adapter
from sbora_diffusion.cli import app
from sbora_diffusion.diffusion.picture_file import read_settings
from sbora_diffusion.library import Library

from .tiny_pipeline import save_tiny_pipeline

SETTINGS = ("steps=6", "save_every=2", "sampling_steps=2", "crops=1", "preview_every=3")
QUICK = [word for setting in SETTINGS for word in ("--set", setting)]
CLI = [sys.executable, "-c", "from sbora_diffusion.cli import main; main()"]
KILLED_AT = """
import os, signal, sys
from pathlib import Path
from sbora_diffusion.cli import main

replace, (when, name), sys.argv = Path.replace, sys.argv[1:3], sys.argv[:1] + sys.argv[3:]

def replace_or_die(self, target):
    if Path(target).name == name and Path(target).exists() == (when == "again"):
        os.kill(os.getpid(), signal.SIGKILL)
    return replace(self, target)

Path.replace = replace_or_die
main()
"""


def run(*words: str | Path) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


def pixels(path: Path) -> bytes:
    with Image.open(path) as file:
        return file.tobytes()


def train(base: Path, concept: str | Path, *words: str | Path) -> Result:
    return run("train", "--concept", concept, "--base", base, *QUICK, *words)


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_pipeline(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture(scope="session")
def trained(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Result]]:
    """A folder in which dog and cat were trained, and what the two commands answered."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        return folder, [train(base, "dog"), train(base, "cat")]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return Path()


@pytest.fixture
def adapters(here: Path, trained: tuple[Path, list[Result]]) -> Path:
    """The same with the concepts dog and cat in it."""
    return Path(shutil.copytree(trained[0] / "adapters", here / "adapters"))


def test_train(trained: tuple[Path, list[Result]]) -> None:
    folder, (dog, cat) = trained
    assert dog.exit_code == 0, dog.output
    assert dog.stdout.splitlines() == ["adapters/dog.safetensors", "runs/dog/before-after.png"]
    with Image.open(folder / "runs/dog/before-after.png") as sheet:
        assert sheet.width > 100
    assert (folder / "runs/dog/preview-000003.png").exists()
    assert cat.exit_code == 0, cat.output
    intervals = [
        str(Adapter.load(folder / f"adapters/{name}.safetensors").spec.intervals[0]) for name in ("dog", "cat")
    ]
    assert intervals == ["0:8", "8:16"]


def test_train_says_what_is_next(here: Path, base: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert train(base, "dog", "--rank", "4", "--interval", "12:16", "--method", "sbora-fb").exit_code == 0
    assert caplog.messages[-1] == 'next: sbora-diffusion generate "a <dog> on the beach" --adapter dog'
    spec = Adapter.load(here / "adapters/dog.safetensors").spec
    assert (spec.side, spec.rank, str(spec.intervals[0])) == ("fb", 4, "12:16")


def test_fuse(adapters: Path) -> None:
    fused = run("merge", "dog", "cat", "--how", "fuse")
    assert fused.stdout.splitlines() == ["adapters/cat+dog.safetensors"], fused.output
    recipe = Adapter.load(adapters / "cat+dog.safetensors").spec.recipe
    assert (recipe["how"], recipe["prior_weight"]) == ("fuse", 0.3)
    assert run("merge", "dog", "cat", "--how", "fuse").exit_code == 1
    without = run("merge", "dog", "cat", "--how", "fuse", "--prior-weight", "0", "--force")
    assert without.exit_code == 0, without.output
    wrong = run("merge", "dog", "cat", "--how", "fuse", "--prior-weight", "-1", "--force")
    assert "got --prior-weight -1.0" in wrong.stderr


def test_generate(adapters: Path) -> None:
    command = ("generate", "a <dog> & a <cat>!", "--adapter", "dog", "--adapter", adapters / "cat.safetensors")
    first = run(*command, "--count", "2", "--set", "steps=2")
    assert first.stdout.splitlines() == ["outputs/0001-a-dog-a-cat.png", "outputs/0002-a-dog-a-cat.png"], first.output
    again = run(*command, "--seed", "1", "--set", "steps=2", "--strengths", "1,1")
    assert again.stdout.splitlines() == ["outputs/0003-a-dog-a-cat.png"]
    files = [Path(f"outputs/000{number}-a-dog-a-cat.png") for number in (1, 2, 3)]
    assert pixels(files[1]) == pixels(files[2]) != pixels(files[0])
    made = read_settings(files[1])
    assert (made.prompt, made.seed, made.steps, made.concepts) == (command[1], 1, 2, {"dog": 1.0, "cat": 1.0})
    assert read_settings(files[2]) == made


def test_generate_with_regions(adapters: Path, base: Path) -> None:
    both = ("--adapter", "dog", "--adapter", adapters / "cat.safetensors", "--set", "steps=2")
    regions = ("--region", "0,0,.5,1: a <dog>", "--region", ".5,0,1,1: a <cat>")
    commands = {
        "regions": ("generate", "a room", *both, *regions),
        "own words": ("generate", "a room", *both, *regions, "--set", "whole_scene=0"),
        "one": ("generate", "a room", *both, *regions[:2]),
        "gated": ("generate", "a room", *both, "--set", "gated=1"),
        "base": ("generate", "a room", "--base", base, "--set", "steps=2"),
        "written": ("generate", "a room", *both),
    }
    found = {}
    for name, command in commands.items():
        result = run(*command)
        assert result.exit_code == 0, result.output
        found[name] = Path(result.stdout.strip())
    made = {name: read_settings(path) for name, path in found.items()}
    assert made["regions"].regions == regions[1::2]
    assert [made[name].whole_scene for name in ("regions", "own words")] == [True, False]
    assert [made[name].gated for name in ("gated", "written")] == [True, False]
    found = {name: pixels(path) for name, path in found.items()}
    assert found["gated"] == found["base"] != found["written"]
    assert len({found[name] for name in ("regions", "own words", "one", "gated", "written")}) == 5
    wrong = run("generate", "a room", *both, "--region", "left: a <dog>")
    assert wrong.exit_code == 1
    assert "error: got the region 'left: a <dog>', expected left,top,right,bottom: prompt" in wrong.stderr


def test_merge_and_remove(adapters: Path) -> None:
    merged = run("merge", "dog", adapters / "cat.safetensors", "--weights", "1,0.5")
    assert merged.stdout.splitlines() == ["adapters/cat+dog.safetensors"], merged.output
    assert run("generate", "a <dog>", "--adapter", "cat+dog", "--set", "steps=2").exit_code == 0
    assert run("merge", "dog", "cat", "--out", "both.safetensors").exit_code == 0
    assert run("remove", "cat+dog", "--yes").exit_code == 0
    assert Library(adapters).names() == ["cat", "dog"]
    asked = CliRunner().invoke(app, ["remove", "dog"], input="n\n")
    assert (asked.exit_code, Library(adapters).names()) == (1, ["cat", "dog"])


def test_bake(adapters: Path, base: Path, caplog: pytest.LogCaptureFixture) -> None:
    baked = run("bake", "dog", adapters / "cat.safetensors", "--strengths", "1,0.5")
    assert baked.stdout.splitlines() == ["pipelines/dog+cat"], baked.output
    assert caplog.messages[-2] == 'next: sbora-diffusion generate "a <dog> and a <cat>" --base pipelines/dog+cat'
    assert run("generate", "a <dog> and a <cat>", "--base", "pipelines/dog+cat", "--set", "steps=2").exit_code == 0
    files = ("--adapter", "dog", "--adapter", "cat", "--strengths", "1,0.5", "--base", base)
    assert run("generate", "a <dog> and a <cat>", *files, "--set", "steps=2").exit_code == 0
    one, other = sorted(Path("outputs").iterdir())
    assert pixels(one) == pixels(other)
    assert run("bake", "dog", "cat").exit_code == 1
    assert run("bake", "dog", "cat", "--force").exit_code == 0


def test_columns_and_rows_can_only_be_baked(adapters: Path, base: Path) -> None:
    assert train(base, "horse", "--method", "sbora-fb").exit_code == 0
    merged = run("merge", "dog", "horse")
    assert (merged.exit_code, merged.stdout) == (1, "")
    assert "hint: FA writes columns and FB rows" in merged.stderr
    assert "sbora-diffusion bake" in merged.stderr
    assert run("bake", "dog", "horse", "--out", "both").stdout == "both\n"
    assert not (adapters / "dog+horse.safetensors").exists()


def test_merge_renames_a_token_that_two_have(adapters: Path, caplog: pytest.LogCaptureFixture) -> None:
    shutil.copy(adapters / "dog.safetensors", adapters / "hound.safetensors")
    assert run("merge", "dog", "hound", "--out", "both.safetensors").exit_code == 0
    assert "<dog-2> in the merge" in caplog.text
    assert "not disjoint" in caplog.text
    assert run("merge", "dog", "cat", "--out", "both.safetensors").exit_code == 1
    assert run("merge", "dog", "cat", "--out", "both.safetensors", "--force").exit_code == 0


@pytest.mark.usefixtures("adapters")
def test_inspect() -> None:
    one = run("inspect", "dog").stdout
    for part in ("<dog> (dog)", "0:8", "SBoRA-FA of rank 8", "save_every", "class_drift"):
        assert part in " ".join(one.split())
    several = run("inspect", "dog", "cat").stdout
    assert "8:16" in several
    assert "disjoint: no column" in several
    assert re.search(r"^unet\.mid_block\.attn1 +4 +0 +16  dog=[\d.e-]+  cat=[\d.e-]+ *$", several, re.MULTILINE)
    assert max(map(len, several.splitlines())) <= 80


def test_inspect_what_cannot_be_merged(adapters: Path, caplog: pytest.LogCaptureFixture) -> None:
    dog = Adapter.load(adapters / "dog.safetensors")
    replace(dog, spec=replace(dog.spec, base_fingerprint="beef")).save(adapters / "other.safetensors")
    assert run("inspect", "dog", "other").exit_code == 0
    assert "cannot be merged: the adapters differ in base fingerprint" in caplog.messages[-1]
    assert caplog.messages[-1].endswith("Train them for the same one.")


def test_ledger(adapters: Path) -> None:
    drawn = run("ledger", "--rank", "4").stdout
    assert "columns (fa)" in " ".join(drawn.split())  # a long path breaks the line
    assert "16 of 32 owned, 16 free: room for 4 more of rank 4, of 8" in drawn
    assert "8:16" in drawn
    assert abs(drawn.count("█") - drawn.count("▓")) <= 1
    assert "×" not in drawn
    (adapters / ".ledger.json").unlink()
    assert "known after the next training" in run("ledger").stdout


def test_ledger_shows_what_several_own(adapters: Path) -> None:
    shutil.copy(adapters / "dog.safetensors", adapters / "hound.safetensors")
    drawn = run("ledger").stdout
    assert drawn.count("×") == 19 + 1  # a quarter of 78 characters, and the legend
    assert "several owners" in drawn


def test_ledger_of_concepts_without_an_interval(adapters: Path) -> None:
    dog = Adapter.load(adapters / "dog.safetensors")
    for name in ("dog", "cat"):
        (adapters / f"{name}.safetensors").unlink()
    (adapters / ".ledger.json").unlink()
    replace(dog, spec=replace(dog.spec, intervals=())).save(adapters / "foreign.safetensors")
    assert "foreign: has no interval" in run("ledger").stdout


def test_reserve(here: Path, base: Path, caplog: pytest.LogCaptureFixture) -> None:
    words = ("ledger", "--base", base, "--rank", "4", "--reserve")
    assert run(*words, "dog").stdout == "0:4\n"
    assert run(*words, "cat", "--interval", "8:12").stdout == "8:12\n"
    assert "--concept cat" in caplog.messages[-1]
    assert "elsewhere with --interval 8:12" in caplog.messages[-1]
    assert run(*words, "fox").stdout == "4:8\n"
    taken = run(*words, "owl", "--interval", "10:14")
    assert (taken.exit_code, taken.stdout) == (1, "")
    assert "the interval 10:14 is taken (8:12 by cat)" in taken.stderr
    assert "cat (reserved)" in run("ledger").stdout
    assert train(base, "cat", "--rank", "4").exit_code == 0
    assert str(Adapter.load(here / "adapters/cat.safetensors").spec.intervals[0]) == "8:12"
    assert "cat (reserved)" not in run("ledger").stdout
    assert run("remove", "dog", "--yes").exit_code == 0
    assert run(*words, "owl").stdout == "0:4\n"


@pytest.mark.usefixtures("here")
def test_ledger_of_nothing(caplog: pytest.LogCaptureFixture) -> None:
    nothing = run("ledger")
    assert (nothing.exit_code, nothing.stdout) == (0, "")
    assert "train --concept dog" in caplog.text
    assert not Path("adapters").exists()


@pytest.mark.parametrize("words", [["--help"], ["train", "--help"], ["generate", "--help"], ["--version"]])
def test_help_is_quick(words: list[str]) -> None:
    code = "import sys; sys.argv[0] = 'x'\ntry: main()\nfinally: print({'torch', 'numpy', 'rich'} & {*sys.modules})"
    command = [sys.executable, "-c", f"from sbora_diffusion.cli import main\n{code}", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.endswith("set()\n")
    assert __version__ in done.stdout or "Usage:" in done.stdout


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
        ("train --concept empty", "no picture in empty"),
        ("train --concept unreadable --base TINY", "unreadable/a.png"),
        ("train --concept horse --base nosuch", "could not load base model 'nosuch'"),
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
        ("merge dog cat --weights 1", "2 adapters and the weights"),
        ("merge dog cat --how nonsense", "got --how nonsense"),
        ("merge dog cat --out adapters/dog.safetensors", "adapters/dog.safetensors exists"),
        ("bake dog nosuch", "no adapter 'nosuch'"),
        ("bake dog cat --strengths 1", "2 adapters and 1 strengths"),
        ("bake dog --base OTHER", "trained for"),
        ("bake dog --out empty", "empty exists, and is no pipeline"),
        ("inspect posing.safetensors", "posing.safetensors: cannot be read"),
        ("ledger --reserve a/b --base TINY", "without slashes"),
        ("ledger --reserve dog --base TINY", "dog has the interval 0:8 already (trained)"),
        ("ledger --reserve horse --base TINY --interval 0:4", "rank 8 needs 8"),
        ("ledger --reserve horse --base nosuch", "could not load base model 'nosuch'"),
        ("remove nosuch --yes", "nothing of the name 'nosuch' in adapters (there: cat, dog)"),
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
def test_the_machine_says_no(monkeypatch: pytest.MonkeyPatch, error: Exception, message: str) -> None:
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
    (here / "runs/dog").mkdir(parents=True)
    with FileLock(here / "runs/dog/.lock"):
        done = train(base, "dog")
    assert done.exit_code == 1
    assert "error: another training is running in runs/dog" in done.stderr
    assert train(base, "dog").exit_code == 0


def interrupt_after(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real SIGINT in the middle of a step."""
    from sbora_diffusion.diffusion import train as module

    steps = iter(range(1, step + 1))

    def memory_bytes(_: object) -> int:
        if next(steps) == step:
            monkeypatch.undo()
            signal.raise_signal(signal.SIGINT)
        return 0

    monkeypatch.setattr(module, "memory_bytes", memory_bytes)


@pytest.mark.parametrize(
    ("step", "message"),
    [(1, "stopped before the first checkpoint"), (5, "the last checkpoint is kept in runs/dog, go on with:")],
)
def test_ctrl_c_and_resume(here: Path, base: Path, trained: tuple[Path, list[Result]], step: int, message: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        interrupt_after(step, patch)
        stopped = train(base, "dog")
    assert stopped.exit_code == 130
    assert message in stopped.stderr
    assert Library("adapters").ledgers() == []
    if step > 1:
        refused = train(base, "dog")
        assert (refused.exit_code, "--resume" in refused.stderr) == (1, True)
    assert train(base, "dog", "--resume").exit_code == 0
    uninterrupted = trained[0] / "adapters/dog.safetensors"
    assert (here / "adapters/dog.safetensors").read_bytes() == uninterrupted.read_bytes()


def test_resume_keeps_the_columns(here: Path, base: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        interrupt_after(5, patch)
        train(base, "dog", "--interval", "16:24")
    assert train(base, "dog", "--resume").exit_code == 0
    assert str(Adapter.load(here / "adapters/dog.safetensors").spec.intervals[0]) == "16:24"


def test_force_begins_anew(adapters: Path, base: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        interrupt_after(5, patch)
        train(base, "dog", "--force")
    anew = train(base, "dog", "--force", "--set", "seed=1")
    assert anew.exit_code == 0, anew.output
    assert Adapter.load(adapters / "dog.safetensors").spec.recipe["seed"] == 1


@pytest.mark.parametrize("killed_at", ["first checkpoint.pt", "again checkpoint.pt", "first dog.safetensors"])
def test_kill_and_resume(here: Path, base: Path, trained: tuple[Path, list[Result]], killed_at: str) -> None:
    words = ["train", "--concept", "dog", "--base", str(base), *QUICK]
    killed = subprocess.run([sys.executable, "-c", KILLED_AT, *killed_at.split(), *words], capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert Library("adapters").names() == []
    assert train(base, "dog", "--resume").exit_code == 0
    uninterrupted = trained[0] / "adapters/dog.safetensors"
    assert (here / "adapters/dog.safetensors").read_bytes() == uninterrupted.read_bytes()


def test_ctrl_c_at_the_console(here: Path, base: Path) -> None:
    words = ["train", "--concept", "dog", "--base", str(base), *QUICK, "--set", "steps=1000000"]
    with subprocess.Popen([*CLI, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        wait_until(lambda: (here / "runs/dog/checkpoint.pt").exists() or process.poll() is not None)
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate()
    assert (process.returncode, stdout) == (130, ""), stderr
    assert "Traceback" not in stderr
    assert stderr.splitlines()[-1].endswith("--resume")


def wait_until(condition: Callable[[], bool]) -> None:
    while not condition():
        time.sleep(0.05)


@pytest.mark.usefixtures("adapters")
def test_stderr_is_quiet() -> None:
    words = ["generate", "a <dog>", "--adapter", "dog", "--set", "steps=2"]
    done = subprocess.run([*CLI, *words], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
