"""Reports: numbers that hold every score, tables that say the same, grids that show it."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sbora_diffusion.evaluation.judges.clip import METRICS
from sbora_diffusion.evaluation.metrics import bootstrap_interval
from sbora_diffusion.evaluation.report import Report, Result, grid, summary, to_json, to_markdown, write_report

PROMPTS = ("a <dog>", "a <dog> | a <cat>")
RED = Image.new("RGB", (40, 40), "red")


def result(model: str, concept: str, shown: tuple[str, ...], folder: Path, shift: float = 0.0) -> Result:
    files = tuple(tuple(folder / f"images/{model}/{n:03d}-{seed}.png" for seed in range(3)) for n in range(2))
    for number, path in enumerate(path for row in files for path in row):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 40), (0, 40 * number, 200)).save(path)
    scores = torch.tensor([[0.1, 0.2, 0.3], [0.5, 0.7, 0.9]])
    success = torch.tensor([[1.0, 0.0, 1.0], [1.0, 1.0, 1.0]])
    values = {"text_mos": scores + shift, "text_cd": scores * 2, "image": scores**2, "success": success}
    return Result(model=model, concept=concept, shown=shown, prompts=PROMPTS, images=files, scores=values)


def make_report(*results: Result) -> Report:
    about = {
        "encoder": {"id": "emoji-clip", "weights": "f00d"},
        "seeds": [0, 1, 2],
        "suite": {"name": "s", "sha256": "0123456789abcdef" * 4, "prompts": list(PROMPTS)},
    }
    return Report(
        title="dog on s", about=about, metrics=METRICS, results=results, references={"dog": [RED] * 9, "cat": [RED]}
    )


@pytest.fixture
def report(tmp_path: Path) -> Report:
    """The merge is better by 0.1 in every image's text alignment."""
    return make_report(
        result("single", "dog", ("dog",), tmp_path), result("merged", "dog", ("dog",), tmp_path, shift=0.1)
    )


@pytest.fixture
def joint(tmp_path: Path) -> Report:
    return make_report(*(result("merged", concept, ("dog", "cat"), tmp_path) for concept in ("dog", "cat")))


def test_estimates(report: Report) -> None:
    estimate = report.results[0].estimates()["text_mos"]
    assert estimate.mean == pytest.approx(2.7 / 6)
    assert (estimate.low, estimate.high) == bootstrap_interval(report.results[0].scores["text_mos"])
    assert estimate.low < estimate.mean < estimate.high


def test_retention_is_of_pairs(report: Report, joint: Report) -> None:
    """Where each image gains the same, the interval has no width, however much the images differ."""
    change = report.retention()["dog"]
    for end in (change["text_mos"].low, change["text_mos"].mean, change["text_mos"].high):
        assert end == pytest.approx(0.1, abs=1e-6)
    assert change["image"].mean == 0
    assert joint.retention() == {}


def test_json_holds_everything(report: Report, tmp_path: Path) -> None:
    text = to_json(report, tmp_path)
    content = json.loads(text)
    assert content["about"] == report.about
    merged = content["results"][1]
    assert (merged["model"], merged["concept"], merged["n"]) == ("merged", "dog", 6)
    assert merged["prompts"][1]["prompt"] == "a <dog> | a <cat>"
    expected = {"file": "images/merged/001-2.png", "text_mos": 1.0, "text_cd": 1.8, "image": 0.81, "success": 1.0}
    assert merged["prompts"][1]["images"][2] == pytest.approx(expected)
    assert merged["prompts"][0]["mean"]["success"] == pytest.approx(2 / 3, abs=1e-6)
    assert merged["estimates"]["text_mos"]["mean"] == pytest.approx(0.55)
    assert content["retention"]["dog"]["text_mos"]["mean"] == pytest.approx(0.1, abs=1e-6)
    assert json.dumps(content, indent=1, sort_keys=True, ensure_ascii=False) + "\n" == text


def test_summary(report: Report) -> None:
    lines = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in summary(report).splitlines()]
    assert lines[0] == ["concept", "model", "n", "text (mos)", "text (cd)", "image", "success"]
    assert lines[2][:3] == ["dog", "single", "6"]
    assert lines[2][3].startswith("0.450 [")
    assert lines[4][:4] == ["dog", "merged − single", "", "+0.100 [+0.100, +0.100]"]
    assert len({len(line) for line in summary(report).splitlines()}) == 1


def test_markdown(report: Report, joint: Report) -> None:
    text = to_markdown(report)
    assert text.splitlines()[2:5] == [
        "- suite: name s, sha256 0123456789abcdef, prompts 2",
        "- encoder: id emoji-clip, weights f00d",
        "- seeds: 0, 1, 2",
    ]
    assert r"| a \<dog> \| a \<cat> | 0.800" in text
    assert "dog (with cat)" in to_markdown(joint)


def test_write_report(report: Report, joint: Report, tmp_path: Path) -> None:
    written = write_report(report, tmp_path / "out")
    assert [path.name for path in written] == ["report.md", "report.json", "grid-dog.png"]
    assert [path.name for path in write_report(joint, tmp_path / "out")][2:] == ["grid-dog+cat.png"]
    assert written[0].read_text() == to_markdown(joint)
    with Image.open(written[2]) as page:
        assert page.width > 6 * 160


def test_grid_shows_the_images(report: Report, joint: Report) -> None:
    """Four references, then each prompt's three images of both models side by side."""
    page = np.asarray(grid(report.results, report.references))
    size, left, top = 160, 6, 6 + 32
    step, row = size + 6, size + 32 + 6
    middles = [[page[top + row * n + 80, left + step * c + 80].tolist() for c in range(6)] for n in range(3)]
    assert middles[0] == [[255, 0, 0]] * 4 + [[255, 255, 255]] * 2
    assert middles[1] == [[0, 40 * number, 200] for number in (0, 1, 2)] * 2
    assert middles[2] == [[0, 40 * number, 200] for number in (3, 4, 5)] * 2
    assert np.asarray(grid(joint.results, joint.references)).shape[1] == 6 + 3 * (224 + 6)  # two concepts, three seeds
