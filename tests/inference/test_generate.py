"""Generation: the base model comes back bit for bit, images depend on their own seed only, mistakes are named."""

from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sbora_diffusion.adapters.basis import Interval
from sbora_diffusion.adapters.file import Adapter
from sbora_diffusion.adapters.merge import merge
from sbora_diffusion.data.concept import Concept
from sbora_diffusion.inference.generate import ConceptPatcher, applied, generate
from sbora_diffusion.inference.text_to_image import generate as sbora_generate
from sbora_diffusion.models.base import Base
from sbora_diffusion.utils.errors import SboraError

from ..helpers import short_config, train

TRAINED: list[Adapter] = []


@pytest.fixture
def adapters(base: Base, concept: Concept, tmp_path: Path) -> list[Adapter]:
    """Two concepts in neighbouring intervals, trained once for all tests."""
    for number, name in enumerate(("rex", "tom")[len(TRAINED) :], len(TRAINED)):
        renamed = replace(concept, name=name, token=f"<{name}>", images=tuple(
            replace(image, caption=image.caption.replace("rex", name)) for image in concept.images
        ))  # fmt: skip
        config = short_config(seed=str(number), learning_rate="5e-2")
        last = train(renamed, base, Interval(4 * number, 4), config, tmp_path / name)
        assert last.adapter
        TRAINED.append(last.adapter)
    return list(TRAINED)


def draw(base: Base, prompt: str, seed: int = 0) -> np.ndarray:
    return np.asarray(generate(base, [prompt], seeds=[seed], steps=2)[0])


def test_applied_and_gone_bit_for_bit(base: Base, adapters: list[Adapter]) -> None:
    before = {key: value.clone() for key, value in base.pipeline.unet.state_dict().items()}
    plain = draw(base, "a dog")
    with applied(base, adapters):
        assert not np.array_equal(draw(base, "a <rex> and a <tom>"), plain)
    assert np.array_equal(draw(base, "a dog"), plain)
    after = base.pipeline.unet.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[key]) for key, value in before.items())


def test_concepts_come_and_go_while_others_stay(base: Base, adapters: list[Adapter]) -> None:
    rex, tom = adapters
    state = weights(base)
    plain = draw(base, "a dog")
    with applied(base, [rex]):
        only_rex = draw(base, "a <rex>")
    with applied(base, [tom], [0.5]):
        half_tom = draw(base, "a <tom>")
    with applied(base, []) as concepts:
        assert np.array_equal(draw(base, "a dog"), plain)
        concepts.write([tom])
        concepts.write([rex])
        assert concepts.strengths == {"rex": 1.0, "tom": 1.0}
        concepts.restore(["tom"])
        assert np.array_equal(draw(base, "a <rex>"), only_rex)
        with pytest.raises(SboraError, match=r"brings the token <tom>, known: <rex>$"):
            draw(base, "a <tom>")
        concepts.write([tom])
        concepts.set_strength("tom", 0.5)
        concepts.restore(["rex"])
        assert concepts.strengths == {"tom": 0.5}
        assert np.array_equal(draw(base, "a <tom>"), half_tom)
        concepts.set_strength("tom", 0.0)
        assert same(weights(base), state)
        concepts.restore_all()
        assert np.array_equal(draw(base, "a dog"), plain)
    assert same(weights(base), state)


def test_a_refused_change_changes_nothing(base: Base, adapters: list[Adapter]) -> None:
    rex, tom = adapters
    other = replace(tom, spec=replace(tom.spec, tokens={"a</w>": "dog"}), tokens={
        key.replace("<tom>", "a</w>"): value for key, value in tom.tokens.items()
    })  # fmt: skip
    with applied(base, [rex]) as concepts:
        state, image = weights(base), draw(base, "a <rex>")
        for change, message in (
            (lambda: concepts.write([tom, rex]), "two adapters bring the name 'rex'"),
            (lambda: concepts.write([other]), "the base model knows the token"),
            (lambda: concepts.write([tom], [float("nan")]), "strength nan"),
            (lambda: concepts.set_strength("rex", float("inf")), "strength inf"),
            (lambda: concepts.set_strength("tom", 1.0), "'tom' is not written into the base model, only rex is"),
            (lambda: concepts.restore(["rex", "tom"]), "'tom' is not written"),
        ):
            with pytest.raises(SboraError, match=message):
                change()
            assert concepts.strengths == {"rex": 1.0}
            assert same(weights(base), state)
            assert np.array_equal(draw(base, "a <rex>"), image)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_random_cycles_restore_the_pipeline(base: Base, adapters: list[Adapter], dtype: torch.dtype) -> None:
    assert base.fingerprint == adapters[0].spec.base_fingerprint
    base.pipeline.to(dtype)
    original, random, concepts = weights(base), Random(0), ConceptPatcher(base)
    tokenizer, embedding = base.pipeline.tokenizer, base.pipeline.text_encoder.get_input_embeddings()
    chosen = [
        replace(adapter, spec=replace(adapter.spec, name=f"{adapter.spec.name}{number}", tokens={}), tokens={})
        for number in range(2)
        for adapter in adapters  # the same columns twice
    ] + adapters
    for _ in range(300):
        written = [adapter for adapter in chosen if adapter.spec.name in concepts.strengths]
        absent = [adapter for adapter in chosen if adapter not in written]
        match random.choice(("write", "restore", "strength", "restore")):
            case "write" if absent:
                some = random.sample(absent, random.randint(1, min(2, len(absent))))
                concepts.write(some, [random.uniform(-2, 2) for _ in some])
            case "restore" if written:
                some = random.sample(written, random.randint(1, len(written)))
                concepts.restore([adapter.spec.name for adapter in some])
            case "strength" if written:
                concepts.set_strength(random.choice(written).spec.name, random.uniform(-2, 2))
        if not concepts.strengths:
            assert same(weights(base), original)
            assert base.pipeline.tokenizer is tokenizer
    concepts.restore_all()
    assert same(weights(base), original)
    assert base.pipeline.text_encoder.get_input_embeddings() is embedding


def weights(base: Base) -> dict[str, torch.Tensor]:
    return {key: layer.weight.detach().clone() for key, layer in base.layers.items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(weight, other[key]) for key, weight in one.items())


def test_an_error_inside_takes_the_concepts_out_too(base: Base, adapters: list[Adapter]) -> None:
    plain = draw(base, "a dog")
    with pytest.raises(SboraError, match="<kim>"), applied(base, adapters):
        draw(base, "a <kim>")
    assert np.array_equal(draw(base, "a dog"), plain)


def test_order_does_not_matter_and_a_merge_is_the_same(base: Base, adapters: list[Adapter]) -> None:
    images = []
    for chosen in (adapters, adapters[::-1], [merge(adapters, [1.0, 1.0], "sum")]):
        with applied(base, chosen):
            images.append(draw(base, "a <rex> and a <tom>"))
    assert np.array_equal(images[0], images[1])
    assert np.array_equal(images[0], images[2])


def test_strength_zero_is_the_base_with_the_token(base: Base, adapters: list[Adapter]) -> None:
    plain = draw(base, "a dog")
    with applied(base, adapters[:1], [0.0]):
        assert np.array_equal(draw(base, "a dog"), plain)
    with applied(base, adapters[:1], [1.0]):
        assert not np.array_equal(draw(base, "a dog"), plain)


def test_a_image_depends_on_its_own_seed(base: Base) -> None:
    together = generate(base, ["a", "b", "a"], seeds=[3, 4, 5], steps=2)
    assert_close(together[1], generate(base, ["b"], seeds=[4], steps=2)[0])
    assert not np.array_equal(np.asarray(together[0]), np.asarray(together[2]))


def assert_close(one: Image.Image, other: Image.Image) -> None:
    """Equal up to the rounding of other batch sizes."""
    assert np.abs(np.asarray(one, int) - np.asarray(other, int)).max() <= 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"base_fingerprint": "0" * 16, "base_id": "sd15"}, r"was trained for sd15 \[0000"),
        ({"name": "tom"}, "two adapters bring the name 'tom'"),
        ({"name": "other", "tokens": {"<tom>": "dog"}}, "two adapters bring the token '<tom>'"),
        ({"name": "other", "tokens": {"<TOM>": "dog"}}, "two adapters bring the token '<tom>'"),
    ],
)
def test_adapters_that_do_not_go_together(
    base: Base, adapters: list[Adapter], change: dict[str, object], message: str
) -> None:
    first = replace(adapters[0], spec=replace(adapters[0].spec, **change))  # type: ignore[arg-type]
    with pytest.raises(SboraError, match=message), applied(base, [first, adapters[1]]):
        pass


def test_embeddings_of_another_width(base: Base, adapters: list[Adapter]) -> None:
    wide = replace(adapters[0], tokens={"text_encoder.<rex>": torch.zeros(1, 7)})
    with pytest.raises(SboraError, match="of 'rex' has 7 dimensions, not "), applied(base, [wide]):
        pass


@pytest.mark.parametrize(
    ("prompt", "settings", "message"),
    [
        ("a <rex>", {"steps": 0}, "got steps=0, expected 1 to 1000"),
        ("a <rex>", {"seeds": [2**63]}, "got the seed 9223372036854775808"),
        ("a <rex>", {"guidance": float("nan")}, "got guidance=nan"),
        ("a <rex>", {"negative_prompt": "a <tom>"}, "brings the token <tom>"),
        ("a" + " dog" * 100 + " <rex>", {}, r"dog …' is too long: <rex> is beyond its \d+ tokens"),
        ("a \udcff", {}, "expected text in UTF-8"),
    ],
)
def test_what_cannot_be_drawn(
    base: Base, adapters: list[Adapter], prompt: str, settings: dict[str, Any], message: str
) -> None:
    with applied(base, adapters[:1]), pytest.raises(SboraError, match=message):
        generate(base, [prompt], **{"seeds": [0], "steps": 2} | settings)


def test_numbers_of_prompts_seeds_and_strengths_must_match(base: Base, adapters: list[Adapter]) -> None:
    with pytest.raises(SboraError, match="2 prompts and 1 seeds"):
        generate(base, ["a", "b"], seeds=[1])
    with pytest.raises(SboraError, match="1 adapters and 2 strengths"), applied(base, adapters[:1], [1.0, 2.0]):
        pass


@pytest.mark.parametrize("strength", [float("nan"), float("inf"), -float("inf"), 1e30, -1e35])
@pytest.mark.parametrize("gated", [False, True])
def test_images_of_invalid_numbers_are_refused(
    base: Base, adapters: list[Adapter], strength: float, gated: bool
) -> None:
    seen: list[Image.Image] = []
    with pytest.raises(SboraError, match=r"got the strength|infinite or undefined values"):
        sbora_generate(
            "a <rex>",
            adapters[:1],
            base=base,
            strengths=[strength],
            gated=gated,
            steps=2,
            on_image=lambda *a: seen.append(a[0]),
        )
    assert not seen
    assert not base.pipeline.vae.decoder._forward_hooks
