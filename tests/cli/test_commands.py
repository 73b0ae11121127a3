"""Every command end to end on a tiny base model."""

import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from sbora_diffusion.adapters.file import Adapter
from sbora_diffusion.cli.app import app
from sbora_diffusion.inference.image_file import read_settings
from sbora_diffusion.library.library import Library
from sbora_diffusion.training.run import Preview

from .running import CLI, pixels, run, train


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


def test_a_finished_training_pins_nothing(adapters: Path, base: Path, trained: tuple[Path, list[Result]]) -> None:
    shutil.copytree(trained[0] / "runs", adapters.parent / "runs")
    for words, intervals in (("--rank 4", ["0:4"]), ("--method lora", [])):
        again = train(base, "dog", *words.split(), "--force", "--resume")
        assert again.exit_code == 0, again.output
        assert [str(one) for one in Adapter.load(adapters / "dog.safetensors").spec.intervals] == intervals


def test_fuse(adapters: Path) -> None:
    fused = run("merge", "dog", "cat", "--how", "fuse")
    assert fused.stdout.splitlines() == ["adapters/cat+dog.safetensors"], fused.output
    recipe = Adapter.load(adapters / "cat+dog.safetensors").spec.recipe
    assert (recipe["how"], recipe["prior_weight"]) == ("fuse", 0.3)
    assert run("merge", "dog", "cat", "--how", "fuse").exit_code == 1
    without = run("merge", "dog", "cat", "--how", "fuse", "--prior-weight", "0", "--force")
    assert without.exit_code == 0, without.output
    wrong = run("merge", "dog", "cat", "--how", "fuse", "--prior-weight", "-1", "--force")
    assert "-1.0, expected a number from 0 on" in wrong.stderr


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
    merged = run("merge", "dog", adapters / "cat.safetensors", "--how", "sum", "--weights", "1,0.5")
    assert merged.stdout.splitlines() == ["adapters/cat+dog.safetensors"], merged.output
    assert run("generate", "a <dog>", "--adapter", "cat+dog", "--set", "steps=2").exit_code == 0
    assert run("merge", "dog", "cat", "--how", "sum", "--out", "both.safetensors").exit_code == 0
    drawn = run("ledger").stdout
    assert "several owners" not in drawn
    assert re.search(r"^ +merged +cat\+dog *$", drawn, re.MULTILINE)
    assert run("remove", "cat+dog", "--yes").exit_code == 0
    assert Library(adapters).names() == ["cat", "dog"]
    asked = CliRunner().invoke(app, ["remove", "dog"], input="n\n")
    assert (asked.exit_code, Library(adapters).names()) == (1, ["cat", "dog"])
    assert "Delete adapters/dog.safetensors?" in asked.output
    unasked = CliRunner().invoke(app, ["remove", "nosuch"])
    assert "Delete" not in unasked.output


def test_columns_that_a_merge_keeps(adapters: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert run("merge", "dog", "cat", "--how", "sum").exit_code == 0
    assert run("remove", "dog", "--yes").exit_code == 0
    assert caplog.messages[-1] == "its columns are not free: cat+dog has them, too"
    assert Library(adapters).names() == ["cat", "cat+dog"]
    assert re.search(r"^[█▓] +0:8 +cat\+dog *$", run("ledger").stdout, re.MULTILINE)
    before = len(caplog.messages)
    assert run("remove", "cat+dog", "--yes").exit_code == 0
    assert len(caplog.messages) == before


def test_a_file_that_comes_during_a_training_stays(
    here: Path, base: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    target, generate_after = here / "adapters/dog.safetensors", Preview.generate_after

    def meanwhile(preview: Preview) -> Any:
        target.write_text("somebody else's")
        return generate_after(preview)

    monkeypatch.setattr(Preview, "generate_after", meanwhile)
    done = train(base, "dog")
    assert done.stdout.splitlines()[0] == "runs/dog/dog.safetensors", done.output
    assert target.read_text() == "somebody else's"
    assert Adapter.load(here / "runs/dog/dog.safetensors").spec.name == "dog"
    assert "--adapter runs/dog/dog.safetensors" in caplog.text


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
    assert run("merge", "dog", "hound", "--how", "sum", "--out", "both.safetensors").exit_code == 0
    assert "<dog-2> in the merge" in caplog.text
    assert "not disjoint" in caplog.text
    assert run("merge", "dog", "cat", "--out", "both.safetensors").exit_code == 1
    assert run("merge", "dog", "cat", "--how", "sum", "--out", "both.safetensors", "--force").exit_code == 0


def test_a_sum_of_many_concepts_recommends_fuse(adapters: Path, caplog: pytest.LogCaptureFixture) -> None:
    names = [f"dog{number}" for number in range(7)]
    for name in names:
        shutil.copy(adapters / "dog.safetensors", adapters / f"{name}.safetensors")
    assert run("merge", *names[:6], "--how", "sum", "--out", "six.safetensors").exit_code == 0
    assert "--how fuse" not in caplog.text
    assert run("merge", *names, "--how", "sum", "--out", "seven.safetensors").exit_code == 0
    assert "a plain sum of 7 concepts loses more of them than --how fuse does" in caplog.text


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


def test_inspect_prints_nothing_that_a_terminal_obeys(adapters: Path) -> None:
    dog = Adapter.load(adapters / "dog.safetensors")
    recipe = {"note": "\x1b[31mred", "half": "\ud800"}
    replace(dog, spec=replace(dog.spec, recipe=recipe)).save(adapters / "odd.safetensors")
    shown = run("inspect", "odd")
    assert shown.exit_code == 0
    assert "\\x1b[31mred" in shown.stdout
    assert "\x1b" not in shown.stdout


def test_inspect_what_cannot_be_merged(adapters: Path, caplog: pytest.LogCaptureFixture) -> None:
    dog = Adapter.load(adapters / "dog.safetensors")
    replace(dog, spec=replace(dog.spec, base_fingerprint="beef")).save(adapters / "other.safetensors")
    assert run("inspect", "dog", "other").exit_code == 0
    assert "cannot be merged: the adapters differ in base fingerprint" in caplog.messages[-1]
    assert caplog.messages[-1].endswith("Train them for the same base model.")


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
    asked = CliRunner().invoke(app, ["remove", "fox"], input="n\n")
    assert "Delete the reservation of fox?" in asked.output
    assert train(base, "cat", "--rank", "4").exit_code == 0
    assert str(Adapter.load(here / "adapters/cat.safetensors").spec.intervals[0]) == "8:12"
    assert "cat (reserved)" not in run("ledger").stdout
    assert run("ledger", "--release", "dog").exit_code == 0
    assert "the columns reserved for dog are free" in caplog.text
    assert run("ledger", "--release", "cat").exit_code == 1
    assert (here / "adapters/cat.safetensors").exists()
    assert run(*words, "owl").stdout == "0:4\n"


@pytest.mark.usefixtures("here")
def test_ledger_of_nothing(caplog: pytest.LogCaptureFixture) -> None:
    nothing = run("ledger")
    assert (nothing.exit_code, nothing.stdout) == (0, "")
    assert "train --concept dog" in caplog.text
    assert not Path("adapters").exists()


@pytest.mark.usefixtures("adapters")
def test_stderr_is_quiet() -> None:
    words = ["generate", "a <dog>", "--adapter", "dog", "--set", "steps=2"]
    done = subprocess.run([*CLI, *words], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
