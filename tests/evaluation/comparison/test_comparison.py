"""A comparison of methods on a tiny base: cells made once, added to, and summed up with an independent mean."""

import json
import shutil
from pathlib import Path

import pytest

from sbora_diffusion.data.concept import default_roots
from sbora_diffusion.evaluation.comparison.plan import Comparison, load_plan, path_of
from sbora_diffusion.evaluation.comparison.run import compare, write_comparison
from sbora_diffusion.evaluation.comparison.tables import (
    changes,
    compared_metrics,
    differences,
    differences_table,
    summarise,
)
from sbora_diffusion.utils.errors import SboraError


def comparison(**changes: object) -> Comparison:
    given = {"variants": ("lora", "lora:rank=2"), "concepts": ("dog", "pumpkin"), "seeds": (0, 1), "sizes": (1, 2)}
    return Comparison(**(given | changes))  # type: ignore[arg-type]


def fill(folder: Path, told: Comparison) -> None:
    for number, key in enumerate(told.trainings()):
        path = path_of(folder, "trained", key)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"seconds": number, "bytes": 2e6, "parameters": 1000, "peak_bytes": 3e8}))
    for key in told.merges():
        path = path_of(folder, "scores", key)
        path.parent.mkdir(parents=True, exist_ok=True)
        values = {"dog": 0.2, "pumpkin": 0.6}
        cells = {
            n: {"text_mos": [values[n], values[n] + 0.1], "image": [0.5, 0.5]} for n in key.split("/")[-1].split("+")
        }
        path.write_text(json.dumps(cells))


def test_a_variants_settings_arrive() -> None:
    told = comparison(settings={"steps": "7"})
    config = told.config("lora:rank=2,learning_rate=1e-2", 5)
    assert (config.method.name, config.method.rank, config.optim.learning_rate, config.seed, config.optim.steps) == (
        "lora",
        2,
        1e-2,
        5,
        7,
    )
    with pytest.raises(SboraError, match="expected method or method:key=value"):
        told.config("lora:rank", 0)
    with pytest.raises(SboraError, match="unknown method"):
        told.config("lore", 0)


def test_cells_are_all_and_once() -> None:
    told = comparison()
    assert len(set(told.trainings())) == len(list(told.trainings())) == 2 * 2 * 2
    assert list(told.merges())[-1] == "lora:rank=2/1/dog+pumpkin"
    assert len(list(told.merges())) == 2 * 2 * (2 + 1)


def test_the_table_is_of_what_is_there(tmp_path: Path) -> None:
    told = comparison()
    fill(tmp_path, told)
    path_of(tmp_path, "scores", "lora/0/dog").unlink()
    rows = {(row["variant"], row["size"]): row for row in summarise(tmp_path, told)}
    assert {key: row["n"] for key, row in rows.items()} == {
        ("lora", 1): 3, ("lora", 2): 4, ("lora:rank=2", 1): 4, ("lora:rank=2", 2): 4,
    }  # fmt: skip
    text = rows["lora", 2]["text_mos"]
    assert text["character"]["mean"] == pytest.approx(0.25)
    assert text["object"]["mean"] == pytest.approx(0.65)
    assert text["mean"]["mean"] == pytest.approx(0.45)
    assert text["mean"]["low"] < 0.45 < text["mean"]["high"]
    written = write_comparison(tmp_path, told, "a command")
    assert "| lora:rank=2 | 2 | 4 |" in written
    assert all(
        (tmp_path / name).stat().st_size > 200 for name in ("table.md", "table.json", "scatter.png", "retention.png")
    )


def test_a_folder_holds_one_comparison(tmp_path: Path) -> None:
    comparison().save(tmp_path)
    comparison(variants=("dora",), seeds=(3,)).save(tmp_path)
    assert Comparison.load(tmp_path).variants == ("dora",)
    with pytest.raises(SboraError, match="holds a comparison with settings"):
        comparison(settings={"steps": "9"}).save(tmp_path)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"sizes": (0,)}, "got 2 concepts and merges of 0"),
        ({"sizes": (1, 3)}, "got 2 concepts and merges of 3"),
        ({"concepts": ("dog", "cat", "pumpkin"), "sizes": (2,)}, "got 3 concepts and merges of 2"),
        ({"concepts": ("dog", "dog")}, "got the concepts dog dog, expected at least one, all different"),
        ({"seeds": ()}, "got the seeds"),
    ],
)
def test_what_cannot_be_compared(given: dict, words: str) -> None:
    with pytest.raises(SboraError, match=words):
        comparison(**given)


def test_cells_of_one_table_saw_the_same_prompts_and_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    prompts, out = tmp_path / "mine.txt", tmp_path / "out"
    out.mkdir()
    prompts.write_text("a <TOK>\n")
    told = comparison(suite=str(prompts))
    told.save(out)
    told.save(out)
    prompts.write_text("a red <TOK>\n")
    with pytest.raises(SboraError, match=r"the suite .*mine.txt changed since the cells"):
        told.save(out)
    prompts.write_text("a <TOK>\n")
    shutil.copytree(default_roots()[1] / "cat", tmp_path / "concepts/dog")
    with pytest.raises(SboraError, match="concept dog changed since"):
        told.save(out)


def test_concepts_of_ones_own_are_neither_characters_nor_objects(tmp_path: Path) -> None:
    told = comparison(concepts=("dog", "teapot"), sizes=(1,), variants=("lora",))
    for number, key in enumerate(told.merges()):
        path = path_of(tmp_path, "scores", key)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({key.split("/")[-1]: {"text_mos": [number, number], "image": [0.5, 0.5]}}))
    (row,) = summarise(tmp_path, told)
    assert {kind: score["mean"] for kind, score in row["text_mos"].items()} == {"character": 1, "mean": 1.5}


SUM_SAFE = "sbora-fa:recipe=sum-safe"


def test_different_budgets_are_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for variants, words in (
        (("lora", "lora:rank=2"), None),
        (("lora", SUM_SAFE), f"lora 200 × (8 + 2), {SUM_SAFE} 200 × (4 + 1)"),
    ):
        told = comparison(variants=variants)
        fill(tmp_path / variants[1], told)
        compare(told, tmp_path / variants[1])
        assert (words in caplog.text) if words else not caplog.text


def test_differences_are_taken_pair_by_pair(tmp_path: Path) -> None:
    told = comparison(seeds=(0, 1, 2), sizes=(1,))
    fill(tmp_path, told)
    for seed in told.seeds:  # the second variant is better by 0.1 at every prompt, while concepts differ by 0.4
        for name, mean in (("dog", 0.2), ("pumpkin", 0.6)):
            cell = {name: {"text_mos": [mean + 0.1, mean + 0.2], "image": [0.5 + 0.2 * seed, 0.3], "success": [1, 0]}}
            path_of(tmp_path, "scores", f"lora:rank=2/{seed}/{name}").write_text(json.dumps(cell))
    path_of(tmp_path, "scores", "lora/1/dog").unlink()
    (row,) = differences(tmp_path, told)
    assert (row["variant"], row["minus"], row["size"], row["n"]) == ("lora:rank=2", "lora", 1, 5)
    assert [row["text_mos"][key] for key in ("mean", "low", "high")] == pytest.approx([0.1, 0.1, 0.1], abs=1e-6)
    seeds = [0, 0, 1, 2, 2]  # of the five pairs
    assert row["image"]["mean"] == pytest.approx(sum(0.2 * seed - 0.2 for seed in seeds) / 10, abs=1e-6)
    assert row["image"]["low"] < row["image"]["mean"] < row["image"]["high"]
    written = differences_table([row], compared_metrics(told))
    assert "**+0.100 [+0.100, +0.100]**" in written
    assert f"| {row['image']['mean']:+.3f} [" in written, "an interval with 0 in it is not bold"


def test_what_a_merge_changes_is_of_the_same_concepts_alone(tmp_path: Path) -> None:
    told = comparison(sizes=(1, 2))
    fill(tmp_path, told)
    merged = {
        "dog": {"text_mos": [0.1, 0.2], "image": [0.4, 0.3]},
        "pumpkin": {"text_mos": [0.5, 0.6], "image": [1.0, 1.0]},
    }
    for seed in told.seeds:
        path_of(tmp_path, "scores", f"lora/{seed}/dog+pumpkin").write_text(json.dumps(merged))
        path_of(tmp_path, "scores", f"lora/{seed}/pumpkin").unlink()  # so the dog's are the only pairs
    row, other = changes(tmp_path, told)
    assert (row["variant"], row["minus"], row["size"], row["n"]) == ("lora", "single concepts", 2, 2)
    assert [row["text_mos"][key] for key in ("mean", "low", "high")] == pytest.approx([-0.1, -0.1, -0.1], abs=1e-6)
    assert row["image"]["mean"] == pytest.approx(-0.15, abs=1e-6)
    assert (other["variant"], other["n"], other["image"]["mean"]) == ("lora:rank=2", 4, 0)
    assert changes(tmp_path, comparison(sizes=(1,))) == []
    assert "| minus single concepts | K | n |" in write_comparison(tmp_path, told, "a command")


def test_plans_of_the_studies(tmp_path: Path) -> None:
    plan = Path(__file__).parents[3] / "eval/plans/methods.toml"
    told = load_plan(f"{plan}#over_k")
    assert (told.seeds, told.sizes, len(told.concepts), told.variants[1]) == ((0,), (1, 3, 6, 12), 12, "mix-of-show")
    assert told.config(told.variants[0], 0).loss.output_penalty == 2
    assert told.config("sbora-fa:quiet_weight=3", 0).loss.output_penalty == 3, "by its older name"
    (tmp_path / "one.toml").write_text('variants = ["lora"]\nconcepts = ["dog"]\n')
    assert load_plan(str(tmp_path / "one.toml")) == Comparison(variants=("lora",), concepts=("dog",))
    for name, words in (
        (f"{plan}#nosuch", "has no part 'nosuch'"),
        (f"{plan}#retention", "got unknown key 'hows'"),
        ("nosuch.toml", "cannot read the plan nosuch.toml"),
    ):
        with pytest.raises(SboraError, match=words):
            load_plan(name)
