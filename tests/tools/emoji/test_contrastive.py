"""emoji-clip's training: its losses against formulas written another way, its batches, and the command end to end."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from transformers import CLIPModel, CLIPTokenizer

from tools.emoji import contrastive
from tools.emoji.art import WIDE_ART, Art, save_art
from tools.emoji.compose import Composer, Plan, places
from tools.emoji.model import WEIGHTS


def unit(*angles: float) -> torch.Tensor:
    return torch.tensor([[math.cos(angle), math.sin(angle)] for angle in angles])


def test_contrastive_loss_is_the_mean_of_both_directions() -> None:
    images, texts = unit(0.0, 1.0, 2.5), unit(0.2, 1.1, 2.0)
    ids = torch.arange(3).view(3, 1)
    logits = [[5 * math.cos(i - j) for j in (0.2, 1.1, 2.0)] for i in (0.0, 1.0, 2.5)]
    rows = [-math.log(math.exp(row[n]) / sum(map(math.exp, row))) for n, row in enumerate(logits)]
    columns = [-math.log(math.exp(c[n]) / sum(map(math.exp, c))) for n, c in enumerate(zip(*logits, strict=True))]
    expected = (sum(rows) + sum(columns)) / 6
    found = contrastive.contrastive_loss(images, texts, ids, torch.tensor(math.log(5)))
    assert found.item() == pytest.approx(expected, rel=1e-5)


def test_equal_captions_are_no_negatives_of_each_other() -> None:
    images = unit(0.3, 0.3, 2.0)
    ids = torch.tensor([[7], [7], [9]])
    found = contrastive.contrastive_loss(images, images, ids, torch.tensor(math.log(100)))
    assert found.item() == pytest.approx(2 / 3 * math.log(2), abs=1e-3)  # two equal texts share one half each


def test_identity_loss_knows_views_of_one_cut_out() -> None:
    images = unit(0.0, 0.5, 0.8, 1.2, 1.0)
    individuals = torch.tensor([4, 4, 8, 8, -1])  # the pair's image takes no part
    angles, partner = (0.0, 0.5, 0.8, 1.2), (1, 0, 3, 2)
    terms = []
    for n, angle in enumerate(angles):
        others = {m: math.exp(math.cos(angle - other) / 0.1) for m, other in enumerate(angles) if m != n}
        terms.append(-math.log(others[partner[n]] / sum(others.values())))
    assert contrastive.identity_loss(images, individuals).item() == pytest.approx(sum(terms) / 4, rel=1e-4)


def test_batches_need_every_word(art: Art) -> None:
    """Single subjects: two styles, each in the same two places; pairs: four in a ring, in one style and place."""
    scenes = contrastive.Scenes(art, CLIPTokenizer.from_pretrained(WEIGHTS / "tokenizer"), seed=0)
    plans: list[Plan] = []
    scenes.say = lambda plan: plans.append(plan) or plan.caption
    batch = scenes.batch(16)
    assert len(batch.captions) == len(batch.images) == len(batch.individuals) == len(plans)
    singles = batch.individuals[batch.individuals >= 0].tolist()
    assert all(singles.count(number) == 2 for number in singles)
    ring = plans[len(singles) :]
    assert len(ring) == 8
    for four in (ring[:4], ring[4:]):
        assert len({(plan.style, plan.place) for plan in four}) == 1
        assert [plan.subjects[1] for plan in four] == [plan.subjects[0] for plan in four[1:] + four[:1]]
    for subject in {plan.subjects for plan in plans[: len(singles)]}:
        seen = {(plan.style, plan.place) for plan in plans if plan.subjects == subject}
        styles, where = {style for style, _ in seen}, {place for _, place in seen}
        assert seen == {(style, place) for style in styles for place in where}
        assert len(where) == 2
    assert all(plan.place in places(plan.subjects, plan.style, withheld=False) for plan in plans)


def test_the_command_writes_a_model_that_transformers_loads(
    art: Art, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    save_art(art, tmp_path, WIDE_ART)
    CLIPTokenizer.from_pretrained(WEIGHTS / "tokenizer").save_pretrained(tmp_path / "tokenizer")
    monkeypatch.setattr(contrastive, "UNSEEN", 8)
    for steps in (1, 2):
        words = ["--data", tmp_path, "--out", tmp_path / "clip", "--steps", steps, "--batch", 8]
        monkeypatch.setattr(sys, "argv", ["command", *map(str, words)])
        contrastive.main()
    assert torch.load(tmp_path / "clip.pt")["step"] == 2
    model = CLIPModel.from_pretrained(tmp_path / "clip")
    assert model.config.projection_dim == 192
    assert json.loads((tmp_path / "clip" / "preprocessor_config.json").read_text())["size"] == {"shortest_edge": 128}
    assert (tmp_path / "clip" / "model.safetensors").stat().st_size < 25e6


def test_unseen_plans_are_combinations_kept_for_tests(art: Art) -> None:
    plans = contrastive.unseen_plans(Composer(art, 0, contrastive.VARIETY, variants=1), 6)
    assert len({plan.caption for plan in plans}) == len(plans) == 6
    assert all(plan.place in places(plan.subjects, plan.style, withheld=True) for plan in plans)
