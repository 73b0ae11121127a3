"""Every score against an independent formula, on embeddings small enough to work out by hand."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sbora_diffusion.evaluation.metrics import (
    bootstrap_interval,
    cd_text,
    class_rank,
    cosine,
    image_alignment,
    mos_first_reference,
    mos_image_alignment,
    mos_text,
    overall,
    roc_auc,
    succeeds,
    text_alignment,
)


def at(*degrees: float) -> Tensor:
    """Unit vectors of the plane at these angles: the cosine of two is the cosine of their difference."""
    return torch.tensor([[math.cos(math.radians(d)), math.sin(math.radians(d))] for d in degrees])


def random_units(count: int, seed: int) -> Tensor:
    return torch.nn.functional.normalize(torch.randn(count, 7, generator=torch.Generator().manual_seed(seed)), dim=-1)


def cosine_by_hand(a: Tensor, b: Tensor) -> float:
    u, v = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    return sum(x * y for x, y in zip(u, v, strict=True)) / math.sqrt(sum(u**2) * sum(v**2))


def test_overall_is_the_harmonic_mean_and_knows_no_negatives() -> None:
    assert overall(0.2, 0.8) == pytest.approx(1 / ((1 / 0.2 + 1 / 0.8) / 2))
    assert overall(-0.1, 0.8) == overall(0.3, 0.0) == 0


def test_cosine_of_known_angles() -> None:
    expected = torch.tensor([1, 0.5, 0, -0.5, -1])
    torch.testing.assert_close(cosine(at(10, 60, 90, 150, 200), at(10, 0, 0, 30, 20)), expected, rtol=0, atol=1e-6)


def test_text_alignment_is_two_and_a_half_times_the_clipped_cosine() -> None:
    expected = torch.tensor([2.5, 1.25, 0, 0, 0])
    scores = text_alignment(at(10, 60, 90, 150, 200), at(10, 0, 0, 30, 20))
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-6)


def test_image_alignment_of_known_angles() -> None:
    images, references = at(0, 90), at(60, 180, 90)
    # 0°: 1/2, -1, 0; 90°: sqrt(3)/2, 0, 1
    root = math.sqrt(3) / 2
    for score, expected in (
        (image_alignment, [-0.5 / 3, (root + 1) / 3]),
        (mos_image_alignment, [0.5 / 3, (root + 1) / 3]),
        (mos_first_reference, [0.5, root]),
    ):
        torch.testing.assert_close(score(images, references), torch.tensor(expected), rtol=0, atol=1e-6)
    torch.testing.assert_close(mos_first_reference(at(0), at(180, 0)), torch.zeros(1), rtol=0, atol=1e-6)


def test_scores_of_random_embeddings_against_loops() -> None:
    images, references = random_units(5, 0), random_units(4, 1)
    pairs = np.array([[cosine_by_hand(image, reference) for reference in references] for image in images])
    for score, expected in (
        (image_alignment, pairs.mean(1)),
        (mos_image_alignment, np.maximum(pairs, 0).mean(1)),
        (mos_first_reference, np.maximum(pairs[:, 0], 0)),
    ):
        np.testing.assert_allclose(score(images, references), expected, atol=1e-6)
    np.testing.assert_allclose(cosine(images[:4], references), np.diag(pairs), atol=1e-6)
    np.testing.assert_allclose(text_alignment(images[:4], references), 2.5 * np.maximum(np.diag(pairs), 0), atol=1e-6)


def test_class_rank_keeps_concepts_apart() -> None:
    concepts = [random_units(size, size) for size in (1, 3, 2)]
    images = random_units(4, 9)
    scores = class_rank(images, concepts)
    for n, image in enumerate(images):
        for k, references in enumerate(concepts):
            by_hand = sum(cosine_by_hand(image, reference) for reference in references) / len(references)
            assert scores[n, k].item() == pytest.approx(by_hand, abs=1e-6)


def test_a_copied_or_dropped_concept_does_not_succeed() -> None:
    scores = class_rank(at(2, 88, 45), [at(0), at(90)])
    assert succeeds(scores, 0).tolist() == [True, False, False]  # at 45° both are equally near
    assert succeeds(scores, 1).tolist() == [False, True, False]


def test_succeeds_needs_the_first_rank_alone() -> None:
    scores = torch.tensor([[0.3, 0.2, 0.1], [0.3, 0.3, 0.1], [0.1, 0.2, 0.3], [-0.3, -0.2, -0.1]])
    assert [succeeds(scores, which).tolist() for which in range(3)] == [
        [True, False, False, False],
        [False, False, False, False],
        [False, False, True, True],
    ]
    assert succeeds(scores[:, :1], 0).tolist() == [True] * 4


@pytest.mark.parametrize("shape", [(1, 1), (1, 6), (5, 1), (20, 4)])
def test_interval_of_equal_values_has_no_width(shape: tuple[int, int]) -> None:
    value = torch.tensor(0.1)
    assert bootstrap_interval(value.expand(shape)) == (value.item(), value.item())


def test_interval_contains_the_mean_and_is_seeded() -> None:
    values = torch.rand(20, 4, generator=torch.Generator().manual_seed(0))
    low, high = bootstrap_interval(values)
    assert values.min() < low < values.mean() < high < values.max()
    assert bootstrap_interval(values) == (low, high)
    assert bootstrap_interval(values, seed=1) != (low, high)
    inner = bootstrap_interval(values, level=0.5)
    assert low < inner[0] < inner[1] < high


def test_interval_narrows_with_more_prompts_and_more_seeds() -> None:
    values = torch.randn(160, 40, generator=torch.Generator().manual_seed(0))

    def width(prompts: int, seeds: int) -> float:
        low, high = bootstrap_interval(values[:prompts, :seeds])
        return high - low

    assert width(10, 4) > width(40, 4) > width(160, 4)
    assert width(10, 4) > width(10, 40)


def test_interval_follows_the_values() -> None:
    values = torch.rand(6, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    low, high = bootstrap_interval(values)
    assert bootstrap_interval(2 * values + 5) == pytest.approx((2 * low + 5, 2 * high + 5))


@pytest.mark.parametrize(("prompts", "seeds"), [(40, 1), (1, 40), (40, 30)])
def test_interval_has_the_two_way_bootstraps_width(prompts: int, seeds: int) -> None:
    """Its variance in closed form: of the row means, of the column means, and of what neither explains."""
    generator = np.random.default_rng(0)
    values = generator.normal(size=(prompts, 1)) + 0.7 * generator.normal(size=seeds)
    values = values + generator.normal(size=(prompts, seeds))
    rows, columns = values.mean(1, keepdims=True), values.mean(0, keepdims=True)
    rest = values - rows - columns + values.mean()
    variance = rows.var() / prompts + columns.var() / seeds + rest.var() / (prompts * seeds)
    low, high = bootstrap_interval(torch.from_numpy(values), draws=20_000)
    assert high - low == pytest.approx(2 * 1.96 * math.sqrt(variance), rel=0.04)


def test_interval_over_prompts_concepts_and_seeds() -> None:
    """In closed form, the mean of what every axis adds: concepts whose seeds agree count once, however many seeds."""
    generator = np.random.default_rng(0)
    axes = [generator.normal(size=shape) for shape in ((30, 1, 1), (1, 25, 1), (1, 1, 20))]
    low, high = bootstrap_interval(torch.from_numpy(sum(axes)), draws=20_000)
    assert high - low == pytest.approx(2 * 1.96 * math.sqrt(sum(axis.var() / axis.size for axis in axes)), rel=0.04)
    again = torch.from_numpy(axes[0] + axes[1]).expand(-1, -1, 20)
    assert bootstrap_interval(again) == pytest.approx(bootstrap_interval(again[..., 0]))


def test_interval_of_what_is_there() -> None:
    values = torch.rand(6, 4, 3, generator=torch.Generator().manual_seed(0))
    values[:, 1, 2] = values[:, 3] = math.nan
    assert bootstrap_interval(values)[0] < values.nanmean() < bootstrap_interval(values)[1]
    values[:, 1] = values[:, 2] = values[:, 0, 1:] = math.nan  # one column is left
    assert bootstrap_interval(values) == pytest.approx(bootstrap_interval(values[:, :1, 0]), abs=0.05)


scores = st.lists(st.integers(-3, 3).map(lambda n: n / 7), min_size=1, max_size=12)


@settings(max_examples=60, deadline=None)
@given(scores, scores)
def test_auc_counts_pairs(positive: list[float], negative: list[float]) -> None:
    won = sum((p > n) + 0.5 * (p == n) for p in positive for n in negative)
    counted = roc_auc(torch.tensor(positive), torch.tensor(negative))
    assert counted == pytest.approx(won / (len(positive) * len(negative)))


def test_auc_of_separated_and_equal_scores() -> None:
    low, high = torch.tensor([0.1, 0.2]), torch.tensor([0.3, 0.4, 0.5])
    assert (roc_auc(high, low), roc_auc(low, high), roc_auc(low, low)) == (1, 0, 0.5)


TWO = {"<dog1>": "dog", "<dog2>": "dog"}


@pytest.mark.parametrize(
    ("prompt", "tokens", "plain"),
    [
        ("a <dog> on the beach", {"<dog>": "dog"}, "a dog on the beach"),
        ("a <dog1> <dog2>, on the beach", TWO, "a dog, on the beach"),
        ("<dog1>  <dog2> and <dog1>", TWO, "dog and dog"),
        ("photo of a <new1> dog", {"<new1>": "dog"}, "photo of a dog"),
        ("<new1> Dog in snow", {"<new1>": "dog"}, "Dog in snow"),
        ("a <new1> dogsled", {"<new1>": "dog"}, "a dog dogsled"),
        ("the <new1> red dog", {"<new1>": "dog"}, "the dog red dog"),
        ("a <truck> \n and a  <cat>", {"<truck>": "fire truck", "<cat>": "cat"}, "a fire truck and a cat"),
        ("a <truck> fire truck", {"<truck>": "fire truck"}, "a fire truck"),
        ("two <dog>s", {"<dog>": "dog"}, "two dogs"),
        ("a sks dog, a sksy sks", {"sks": "dog"}, "a dog, a sksy dog"),
        ("a <d.g> <dxg>", {"<d.g>": "dog"}, "a dog <dxg>"),
        ("a <dog> and a <cat>", {}, "a <dog> and a <cat>"),
    ],
)
def test_texts_in_plain_words(prompt: str, tokens: dict[str, str], plain: str) -> None:
    assert cd_text(prompt, tokens) == plain
    assert mos_text(prompt, tokens) == f"A photo depicts {plain}"
