"""Evaluations on a tiny base model: single, merged, joint, resumed bitwise, and every error."""

import hashlib
import logging
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sbora_diffusion.adapters.file import Adapter
from sbora_diffusion.adapters.merge import merge
from sbora_diffusion.data.concept import Concept
from sbora_diffusion.evaluation import images as series_module
from sbora_diffusion.evaluation.evaluate import Evaluation, OnImage, evaluate, run_evaluation
from sbora_diffusion.evaluation.images import merged_token, plan, reference_images
from sbora_diffusion.evaluation.judges.base import prepare
from sbora_diffusion.evaluation.judges.clip import METRICS, Encoder
from sbora_diffusion.evaluation.quick import quick_score
from sbora_diffusion.evaluation.report import Report, read_report, write_report
from sbora_diffusion.evaluation.suites import Suite
from sbora_diffusion.inference.generate import applied, generate
from sbora_diffusion.models.base import Base
from sbora_diffusion.models.families.base import Sampling
from sbora_diffusion.utils.errors import SboraError

from .conftest import make_adapter

QUICK = Sampling(steps=2, guidance=3.0)
SEEDS = range(2)
Evaluate = Callable[..., Report]


@pytest.fixture
def run(
    base: Base, adapters: list[Adapter], suite: Suite, concepts: list[Concept], judge: Encoder, tmp_path: Path
) -> Evaluate:
    """Evaluate rex, or what is said instead."""

    def evaluated(force: bool = False, on_image: OnImage = None, **changes: Any) -> Report:
        job = Evaluation(base, adapters[:1], None, suite, concepts, [judge], QUICK, SEEDS, batch_size=4)
        folder = changes.pop("folder", tmp_path / "out")
        return run_evaluation(replace(job, **changes), folder, force, on_image)

    return evaluated


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.png"))}


def test_one_concept(run: Evaluate, base: Base, adapters: list[Adapter], tmp_path: Path) -> None:
    seen = []
    report = run(on_image=lambda done, total: seen.append((done, total)))
    (result,) = report.results
    assert (result.model, result.concept, result.shown) == ("single", "rex", ("rex",))
    assert result.prompts == ("a red <rex>", "a <rex> on a blue background", "a green <rex>")
    assert {values.shape for values in result.scores.values()} == {(3, 2)}
    assert seen == [(0, 6), (4, 6), (6, 6)]
    names = [f"single/rex/{prompt:03d}-{seed}.png" for prompt in range(3) for seed in SEEDS]
    assert list(contents(tmp_path / "out/images")) == names
    with applied(base, adapters[:1]):
        (expected,) = generate(base, ["a green <rex>"], seeds=[1], steps=2, guidance=3.0)
    with Image.open(tmp_path / "out/images/single/rex/002-1.png") as image:
        assert np.abs(np.asarray(image, int) - np.asarray(expected, int)).max() <= 1  # in a batch or alone


def test_scores_are_those_of_the_images(run: Evaluate, judge: Encoder, concepts: list[Concept]) -> None:
    (result,) = run().results
    with Image.open(result.images[1][0]) as image:
        score = prepare([judge], reference_images(concepts))
        alone = score([image.copy()], [result.prompts[1]], {"<rex>": "dog"}, ["rex"])["rex"]
    for metric, values in result.scores.items():
        assert values[1, 0].item() == pytest.approx(alone[metric].item(), abs=1e-6)


def test_what_a_report_says_about_itself(run: Evaluate, base: Base, adapters: list[Adapter], tmp_path: Path) -> None:
    about = run(merged=merge(adapters, [1, 1], "sum")).about
    adapters[0].save(tmp_path / "rex.safetensors")
    file = (tmp_path / "rex.safetensors").read_bytes()
    assert about["adapters"] == {"rex": hashlib.sha256(file).hexdigest()}
    assert list(about["merged"]) == ["rex+tom"]
    assert about["base"] == {"id": base.id, "fingerprint": base.fingerprint}
    assert about["encoder"] == {"id": "colours", "weights": "0" * 16}
    assert about["sampling"] == {"steps": 2, "guidance": 3.0, "negative_prompt": ""}
    assert (about["seeds"], about["dtype"], about["suite"]["sha256"][:6]) == ([0, 1], "float32", "c0ffee")
    assert sorted(about["references"]) == ["ann", "rex", "tom"]
    assert {"torch", "diffusers", "transformers", "sbora-diffusion"} <= about["versions"].keys()


def test_merged_against_single(run: Evaluate, adapters: list[Adapter]) -> None:
    """A merge of weights one and zero differs from rex alone in nothing; of another strength it does."""
    same = run(merged=merge(adapters, [1, 0], "sum"))
    assert [(result.model, result.concept) for result in same.results] == [("single", "rex"), ("merged", "rex")]
    single, merged = same.results
    assert contents(single.images[0][0].parent) == contents(merged.images[0][0].parent)
    assert all(change.mean == change.low == change.high == 0 for change in same.retention()["rex"].values())
    half = run(merged=merge(adapters, [0.5, 0], "sum"), force=True)
    assert half.retention()["rex"]["image"].mean == pytest.approx(
        (half.results[1].scores["image"] - half.results[0].scores["image"]).mean().item(), abs=1e-6
    )
    assert half.retention()["rex"]["image"].mean != 0


def test_several_concepts(run: Evaluate, adapters: list[Adapter]) -> None:
    report = run(adapters=adapters, merged=merge(adapters, [1, 1], "sum"))
    order = [(result.model, result.concept) for result in report.results]
    assert order == [("single", "rex"), ("single", "tom"), ("merged", "rex"), ("merged", "tom")]
    assert sorted(report.retention()) == ["rex", "tom"]


def test_joint_prompts(run: Evaluate, adapters: list[Adapter], joint_suite: Suite) -> None:
    together = run(adapters=adapters, suite=joint_suite)
    assert [(result.model, result.concept) for result in together.results] == [("together", "rex"), ("together", "tom")]
    assert together.results[0].prompts == ("a <rex> and a <tom>", "a red <tom> and a <rex>")
    assert together.results[0].shown == ("rex", "tom")
    assert together.retention() == {}
    merged = run(adapters=adapters, suite=joint_suite, merged=merge(adapters, [1, 1], "sum"), force=True)
    assert [result.model for result in merged.results] == ["merged", "merged"]
    assert merged.results[0].scores["image"].allclose(together.results[0].scores["image"], atol=1e-2)


def test_a_merge_that_renamed_tokens(run: Evaluate, base: Base, concepts: list[Concept]) -> None:
    """Two concepts that both call themselves <it>: each keeps its own, whatever the merge calls it."""
    both = [make_adapter(base, name, start, "<it>") for name, start in (("rex", 0), ("tom", 4))]
    merged = merge(both, [1, 1], "sum")
    assert [merged_token(merged, adapter) for adapter in both] == ["<it>", "<it-2>"]
    loaded = Adapter(
        replace(merged.spec, tokens=dict(sorted(merged.spec.tokens.items()))), merged.factors, merged.tokens
    )
    report = run(adapters=both, merged=loaded, concepts=concepts)
    assert [result.prompts[0] for result in report.results] == [
        "a red <it>",
        "a red <it>",
        "a red <it>",
        "a red <it-2>",
    ]


def test_an_interrupted_evaluation_goes_on(run: Evaluate, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    whole = run(folder=tmp_path / "whole")
    written = []

    def write_four(image: Image.Image, path: Path) -> None:
        if len(written) == 3:
            raise KeyboardInterrupt
        written.append(path)
        image.save(path.parent.mkdir(parents=True, exist_ok=True) or path)

    with monkeypatch.context() as patch:
        patch.setattr(series_module, "write_image", write_four)
        with pytest.raises(KeyboardInterrupt):
            run()
    before = {path: path.stat().st_mtime_ns for path in written}
    assert len(before) == 3
    seen = []
    resumed = run(on_image=lambda done, total: seen.append((done, total)))
    assert seen == [(3, 6), (4, 6), (6, 6)]
    assert before == {path: path.stat().st_mtime_ns for path in before}
    assert contents(tmp_path / "out/images") == contents(tmp_path / "whole/images")
    for metric, values in resumed.results[0].scores.items():
        assert torch.equal(values, whole.results[0].scores[metric])


def test_more_seeds_later(run: Evaluate, monkeypatch: pytest.MonkeyPatch) -> None:
    fewer = run(seeds=range(1)).results[0]
    more = run(seeds=range(2)).results[0]
    assert torch.equal(more.scores["image"][:, :1], fewer.scores["image"])
    monkeypatch.setattr(series_module, "generate", None)
    assert torch.equal(run(seeds=range(2)).results[0].scores["image"], more.scores["image"])


def test_another_evaluation_in_the_folder(run: Evaluate, adapters: list[Adapter]) -> None:
    run()
    with pytest.raises(SboraError, match=r"differs in steps"):
        run(sampling=Sampling(steps=3, guidance=3.0))
    with pytest.raises(SboraError, match=r"differs in adapter rex .*, adapter tom"):
        run(adapters=adapters[1:])
    run(adapters=adapters[1:], force=True)


def test_a_damaged_image(run: Evaluate) -> None:
    (result,) = run().results
    result.images[0][1].write_bytes(b"\x89PNG")
    with pytest.raises(SboraError, match=r"cannot read .*000-1.png"):
        run()


def test_other_images_than_the_trained_ones(
    run: Evaluate, adapters: list[Adapter], caplog: pytest.LogCaptureFixture
) -> None:
    trained = replace(adapters[0].spec, recipe={"images": "f00d"})
    with caplog.at_level(logging.WARNING):
        run(adapters=[Adapter(trained, adapters[0].factors, adapters[0].tokens)])
    assert "rex was trained with other images" in caplog.text


def test_what_cannot_be_evaluated(
    run: Evaluate, adapters: list[Adapter], concepts: list[Concept], joint_suite: Suite, tmp_path: Path
) -> None:
    rex = adapters[0]
    both = merge(adapters, [1, 1], "sum")
    stranger = Adapter(replace(rex.spec, base_fingerprint="f00d"), rex.factors, rex.tokens)
    for changes, message in (
        ({"adapters": []}, "got 0 adapters and 2 seeds"),
        ({"seeds": range(0)}, "got 1 adapters and 0 seeds"),
        ({"batch_size": 0}, "got batch_size=0"),
        ({"sampling": Sampling(steps=0, guidance=3.0)}, "got steps=0"),
        ({"sampling": Sampling(steps=2, guidance=math.nan)}, "got guidance=nan"),
        ({"concepts": concepts[1:]}, "no reference images of rex were found"),
        ({"adapters": [stranger]}, "trained for"),
        ({"merged": Adapter(replace(both.spec, base_fingerprint="f00d"), both.factors, both.tokens)}, "trained for"),
        ({"adapters": [rex, rex]}, "two adapters of one name: rex, rex"),
        ({"suite": joint_suite}, "needs 2 concepts in one image, got 1: <rex>"),
        ({"adapters": adapters, "merged": rex}, "the merge 'rex' does not contain <tom> of 'tom'"),
    ):
        with pytest.raises(SboraError, match=message):
            run(**changes)
    with pytest.raises(SboraError, match=r"'rex\+tom' has the tokens <rex>, <tom>, expected the adapter of one"):
        plan(joint_suite, [both], None)
    assert not (tmp_path / "out").exists()


def test_quick_score_of_what_is_in_the_model(
    base: Base, adapters: list[Adapter], concepts: list[Concept], judge: Encoder
) -> None:
    """The same numbers as a whole evaluation's, of the model as it is, and nobody's random numbers are touched."""
    prompts, random = ["a red <rex>", "a <rex>"], torch.get_rng_state()
    with applied(base, adapters[:1]):
        strong = quick_score(base, concepts[0], judge, prompts, SEEDS, QUICK)
        jobs = [(prompt, seed) for prompt in prompts for seed in SEEDS]
        images = generate(base, [p for p, _ in jobs], seeds=[seed for _, seed in jobs], steps=2, guidance=3.0)
    with applied(base, adapters[:1], [0.1]):
        weak = quick_score(base, concepts[0], judge, prompts, SEEDS, QUICK)
    assert torch.equal(torch.get_rng_state(), random)
    score = prepare([judge], reference_images(concepts[:1]))
    expected = score(images, [p for p, _ in jobs], {"<rex>": "dog"}, ["rex"])["rex"]
    assert strong == pytest.approx({metric: values.mean().item() for metric, values in expected.items()}, abs=1e-6)
    assert strong.keys() == METRICS.keys() - {"success"}
    assert strong["image"] != weak["image"]


def test_an_evaluation_of_an_earlier_version_is_resumed(
    base: Base, suite: Suite, concepts: list[Concept], judge: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """golden/ was written by 035ba5a, where folders, results and recipes had other names for some keys."""
    golden = Path(__file__).parent / "golden"
    shutil.copytree(golden / "evaluation", tmp_path / "out")
    rex = Adapter.load(golden / "rex.safetensors")
    assert rex.spec.recipe == {"output_penalty": 2.0, "final_learning_rate": 0.1, "steps": 6}
    same = replace(base)
    vars(same)["fingerprint"] = rex.spec.base_fingerprint
    one_prompt = replace(suite, prompts=suite.prompts[:1])
    monkeypatch.setattr(series_module, "generate", None)
    job = Evaluation(same, [rex], None, one_prompt, concepts, [judge], QUICK, range(1))
    report = run_evaluation(job, tmp_path / "out")
    before, titles = read_report(golden / "evaluation/report.json")
    now, _ = read_report(write_report(report, tmp_path / "out")[1])
    assert titles["text_mos"] == "text (mos)"
    assert before[0]["prompts"][0]["images"][0]["file"] == "pictures/single/rex/000-0.png"
    assert now[0]["prompts"][0]["images"][0]["file"] == "images/single/rex/000-0.png"
    assert now[0]["estimates"]["image"] == pytest.approx(before[0]["estimates"]["image"], abs=1e-5)
    assert run_evaluation(job, tmp_path / "out").results[0].images == report.results[0].images
    with pytest.raises(SboraError, match=r"differs in steps"):
        run_evaluation(replace(job, sampling=Sampling(steps=3, guidance=3.0)), tmp_path / "out")


def test_evaluate_by_names_and_objects(
    base: Base, adapters: list[Adapter], concepts: list[Concept], suite: Suite, judge: Encoder, tmp_path: Path
) -> None:
    """Adapters may be objects, paths or names; the report lies in the folder, and says how it was made."""
    adapters[0].save(tmp_path / "adapters/rex.safetensors")
    merged = merge(adapters, [1, 1], "sum")
    merged.save(tmp_path / "both.safetensors")
    settings: dict[str, Any] = {"base": base, "suite": suite, "judge": judge, "concepts": concepts, "seeds": range(1)}
    settings |= {"library": tmp_path / "adapters", "sampling": {"steps": 2}}
    report = evaluate(["rex"], tmp_path / "both.safetensors", folder=tmp_path / "out", command="this", **settings)
    assert [path.name for path in report.files] == ["report.md", "report.json", "grid-rex.png"]
    assert report.about["command"] == "this"
    assert report.about["sampling"] == {"steps": 2, "guidance": base.sampling.guidance, "negative_prompt": ""}
    same = evaluate([adapters[0]], merged, folder=tmp_path / "out", **settings)
    assert torch.equal(same.results[1].scores["image"], report.results[1].scores["image"])
    settings["sampling"] = {"stesp": 2}
    with pytest.raises(SboraError, match="unknown sampling setting 'stesp'") as caught:
        evaluate(["rex"], **settings)
    assert caught.value.hint == "allowed are steps, guidance, negative_prompt"
    with pytest.raises(SboraError, match="got no adapters"):
        evaluate([])
