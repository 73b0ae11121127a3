"""The eval command end to end on a tiny base model and a tiny judge: stopped, killed, resumed, and given nonsense."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from sbora_diffusion.adapters.merge import merge
from sbora_diffusion.cli.app import app
from sbora_diffusion.evaluation import images as series_module
from sbora_diffusion.evaluation.evaluate import default_suite_and_judge
from sbora_diffusion.models.base import Base, load_base

from ..evaluation.conftest import make_adapter
from ..tiny_clip import save_tiny_clip
from ..tiny_pipeline import save_tiny_pipeline

QUICK = ["--set", "seeds=2", "--set", "steps=2", "--set", "batch_size=2"]
KILLED = """
import os, pathlib, signal, sys
from sbora_diffusion.cli.app import main

replace, sys.argv = pathlib.Path.replace, sys.argv[:1] + sys.argv[1:]

def replace_or_die(self, target):
    if pathlib.Path(target).name == "001-0.png":
        os.kill(os.getpid(), signal.SIGKILL)
    return replace(self, target)

pathlib.Path.replace = replace_or_die
main()
"""


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return load_base(str(save_tiny_pipeline(tmp_path_factory.mktemp("base") / "tiny")))


@pytest.fixture(scope="session")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture
def here(base: Base, clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Adapters of dog, cat, both, and somebody's mug; two prompts for one concept, one for two."""
    adapters = [make_adapter(base, name, 4 * number) for number, name in enumerate(("dog", "cat", "mug"))]
    for adapter in [*adapters, merge(adapters[:2], [1, 1], "sum")]:
        adapter.save(tmp_path / f"adapters/{adapter.spec.name}.safetensors")
    (tmp_path / "two.txt").write_text("a <TOK>\na red <TOK>\n")
    (tmp_path / "pairs.txt").write_text("a {0} and a {1}\n")
    (tmp_path / "mug").mkdir()
    Image.new("RGB", (40, 40), "orange").save(tmp_path / "mug/1.png")
    (tmp_path / "clip").symlink_to(clip)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["sbora-diffusion", "eval", "it's"])  # what reports say they were made with
    return tmp_path


def run(*words: str) -> Result:
    return CliRunner().invoke(app, ["eval", "--encoder", "clip", *QUICK, *words])


def images(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("0*.png"))}


def test_single_and_merged(here: Path, base: Base) -> None:
    done = run("dog", "cat", "--merged", "cat+dog", "--suite", "two.txt")
    assert done.exit_code == 0, done.output
    table, files = done.stdout.split("\n\n")
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table.splitlines()]
    assert [row[:3] for row in rows[2:]] == [
        ["dog", "single", "4"],
        ["cat", "single", "4"],
        ["dog", "merged", "4"],
        ["cat", "merged", "4"],
        ["dog", "merged − single", ""],
        ["cat", "merged − single", ""],
    ]
    assert rows[0][3:] == ["text (mos)", "text (cd)", "image", "success"]
    folder = Path("evaluations/dog-cat-in-cat+dog-two")
    assert files.split() == [
        str(folder / name) for name in ("report.md", "report.json", "grid-dog.png", "grid-cat.png")
    ]
    assert all((here / path).stat().st_size for path in files.split())
    about = json.loads((folder / "report.json").read_text())["about"]
    assert about["command"] == """sbora-diffusion eval 'it'"'"'s'"""
    assert about["base"] == {"id": base.id, "fingerprint": base.fingerprint}
    assert {"dog", "cat", "penguin"} <= about["references"].keys()


@pytest.mark.usefixtures("here")
def test_joint_prompts() -> None:
    done = run("dog", "cat", "--suite", "pairs.txt", "--out", "out")
    assert done.exit_code == 0, done.output
    assert "| dog (with cat) | together | 2 |" in done.stdout
    assert done.stdout.endswith("out/grid-dog+cat.png\n")


@pytest.mark.usefixtures("here")
def test_a_concept_of_ones_own() -> None:
    assert run("mug", "--suite", "two.txt").exit_code == 1
    done = run("mug", "--suite", "two.txt", "--concept", "mug")
    assert done.exit_code == 0, done.output
    assert json.loads(Path("evaluations/mug-two/report.json").read_text())["about"]["references"]["mug"]["images"] == 1


@pytest.mark.usefixtures("here")
def test_defaults_suit_the_base() -> None:
    assert default_suite_and_judge("emoji64") == ("emoji64", "emoji-clip")
    assert default_suite_and_judge("stabilityai/sd")[0] == "objects"


@pytest.mark.usefixtures("here")
def test_ctrl_c_and_again(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run("dog", "--suite", "two.txt", "--out", "whole").exit_code == 0
    write = series_module.write_image

    def write_one(image: Image.Image, path: Path) -> None:
        if path.name == "000-1.png":
            signal.raise_signal(signal.SIGINT)
        write(image, path)

    with monkeypatch.context() as patch:
        patch.setattr(series_module, "write_image", write_one)
        stopped = run("dog", "--suite", "two.txt", "--out", "out")
    assert stopped.exit_code == 130
    assert "stopped; the images so far are kept in out; resume with: sbora-diffusion eval " in stopped.stderr
    assert len(images(Path("out"))) == 2
    again = run("dog", "--suite", "two.txt", "--out", "out")
    assert again.exit_code == 0, again.output
    assert images(Path("out")) == images(Path("whole"))
    for name in ("report.md", "grid-dog.png"):
        assert Path("out", name).read_bytes() == Path("whole", name).read_bytes()


def test_kill_and_again(here: Path) -> None:
    """Killed just before the second image got its name: the first is kept, of the second nothing is taken for one."""
    words = ["eval", "dog", "--suite", "two.txt", "--encoder", "clip", *QUICK, "--out"]
    killed = subprocess.run([sys.executable, "-c", KILLED, *words, "out"], capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert list(images(here / "out")) == ["images/single/dog/000-0.png"]
    kept = (here / "out/images/single/dog/000-0.png").stat().st_mtime_ns
    assert run(*words[1:4], "--out", "out").exit_code == 0
    assert run(*words[1:4], "--out", "whole").exit_code == 0
    assert images(here / "out") == images(here / "whole")
    assert (here / "out/images/single/dog/000-0.png").stat().st_mtime_ns == kept
    assert not list((here / "out/images/single/dog").glob(".*"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("nosuch --suite two.txt", "no adapter 'nosuch'"),
        ("dog --suite two.txt --merged nosuch", "no adapter 'nosuch'"),
        ("dog --suite two.txt --merged cat", "the merge 'cat' does not contain <dog>"),
        ("cat+dog --suite two.txt", "has the tokens <cat>, <dog>"),
        ("dog --suite nosuch", "no suite and no file 'nosuch'"),
        ("dog --suite empty.txt", "the suite empty has no prompts"),
        ("dog --suite odd.txt", "unknown placeholder {token}"),
        ("dog --suite pairs.txt", "needs 2 concepts in one image, got 1"),
        ("mug --suite two.txt", "no reference images of mug were found"),
        ("dog --suite two.txt --concept nosuch", "no concept and no folder 'nosuch'"),
        ("dog --suite two.txt --out taken", "taken has images, but no evaluation.json"),
        ("dog --suite two.txt --set seeds=0", "got 1 adapters and 0 seeds"),
        ("dog --suite two.txt --set steps=0", "got steps=0"),
        ("dog --suite two.txt --base OTHER", "trained for"),
    ],
)
def test_bad_input(here: Path, tmp_path: Path, words: str, message: str) -> None:
    (here / "taken/images").mkdir(parents=True)
    (here / "empty.txt").write_text("\n")
    (here / "odd.txt").write_text("a {token}\n")
    other = save_tiny_pipeline(tmp_path / "other", seed=1) if "OTHER" in words else here
    done = run(*(str(other) if word == "OTHER" else word for word in words.split()))
    assert (done.exit_code, done.stdout) == (1, ""), done.output
    lines = [line for line in done.stderr.splitlines() if line]
    assert message in lines[0]
    assert [line.split(":")[0] for line in lines] in (["error"], ["error", "hint"])
    assert not Path("evaluations").exists()


def test_a_damaged_image_and_another_evaluation(here: Path) -> None:
    assert run("dog", "--suite", "two.txt", "--out", "out").exit_code == 0
    (here / "out/images/single/dog/001-1.png").write_bytes(b"half")
    damaged = run("dog", "--suite", "two.txt", "--out", "out")
    assert damaged.exit_code == 1
    assert "error: cannot read out/images/single/dog/001-1.png" in damaged.stderr
    shutil.rmtree(here / "out/images/single/dog")
    assert run("dog", "--suite", "two.txt", "--out", "out").exit_code == 0
    other = run("cat", "--suite", "two.txt", "--out", "out")
    assert other.exit_code == 1
    assert "error: out holds another evaluation: it differs in adapter cat" in other.stderr
    assert run("cat", "--suite", "two.txt", "--out", "out", "--force").exit_code == 0


@pytest.mark.parametrize("words", [["dog", "--set", "nonsense=1"], ["dog", "--set", "seeds=many"], []])
def test_usage_errors(here: Path, words: list[str]) -> None:
    done = CliRunner().invoke(app, ["eval", *words])
    assert (done.exit_code, done.stdout) == (2, "")
    assert not (here / "evaluations").exists()
