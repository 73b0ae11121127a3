"""The state behind the page: concepts written and restored live, names that cannot escape the library."""

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from sbora_diffusion.adapters.basis import FORMAT_OF_METHODS
from sbora_diffusion.adapters.file import Adapter, Dense
from sbora_diffusion.inference.generate import applied, generate
from sbora_diffusion.inference.image_file import Settings, read_settings
from sbora_diffusion.inference.regions import Region, generate_regions, parse_region, whole_scene
from sbora_diffusion.models.base import Base, load_base
from sbora_diffusion.studio.session import Folders, Session
from sbora_diffusion.utils.errors import SboraError

from .conftest import random_concept


def weights(base: Base) -> dict[str, torch.Tensor]:
    return {key: layer.weight.clone() for key, layer in base.layers.items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[key], other[key]) for key in one | other)


def settings(session: Session, **changes: object) -> Settings:
    fields = {"base": session.bases()[1], "prompt": "a <dog>", "negative_prompt": "", "seed": 3, "steps": 2}
    return Settings(**{**fields, "guidance": 3.0, "concepts": {"dog": 1.0}, **changes})  # pyright: ignore[reportArgumentType]


def test_any_order_of_switching_gives_the_same_weights(session: Session, tiny_folder: Path) -> None:
    name = str(tiny_folder)
    untouched = weights(load_base(name))
    fresh = load_base(name)
    with applied(fresh, [session.load("dog"), session.load("cat")], [0.5, 1.0]):
        wanted = weights(fresh)
    for strengths in ({"dog": 1.0}, {"cat": 1.0, "dog": 0.25}, {}, {"cat": 1.0}, {"dog": 0.5, "cat": 1.0}):
        assert same(session.with_model(name, strengths, weights), untouched) == (strengths == {})
    assert same(session.with_model(name, {"cat": 1.0, "dog": 0.5}, weights), wanted)
    assert same(session.with_model(name, {}, weights), untouched)


def random_dora(base: Base, name: str) -> Adapter:
    """Return a DoRA, whose change depends on the base weights."""
    like = random_concept(base, name, 0)
    dense = {
        key: Dense(factor.weight, torch.ones(4, base.layer_shapes[key][1]), torch.ones(len(factor.weight), 1))
        for key, factor in like.factors.items()
    }
    spec = replace(like.spec, method="dora", format=FORMAT_OF_METHODS, intervals=())
    return Adapter(spec, {}, like.tokens, dense)


def test_a_dora_can_be_added_to_any_concepts(session: Session, tiny_folder: Path) -> None:
    name, fresh = str(tiny_folder), load_base(str(tiny_folder))
    random_dora(fresh, "owl").save(session.library.path("owl"))
    with applied(fresh, [session.load("dog"), session.load("owl")], [0.5, 1.0]):
        wanted = weights(fresh)
    for before in ({}, {"dog": 0.5}, {"dog": 1.0, "cat": 1.0}, {"owl": 1.0}):
        session.with_model(name, before, weights)
        assert same(session.with_model(name, {"dog": 0.5, "owl": 1.0}, weights), wanted)
    assert same(session.with_model(name, {}, weights), weights(load_base(name)))


def test_images_equal_those_of_the_command_line(session: Session, tiny_folder: Path) -> None:
    *_, paths = session.generate(settings(session), 6)
    assert [read_settings(path).seed for path in paths] == [3, 4, 5, 6, 7, 8]
    base = load_base(str(tiny_folder))
    with applied(base, [session.load("dog")]):
        expected = generate(base, ["a <dog>"] * 6, seeds=range(3, 9), steps=2, guidance=3.0)
    for path, image in zip(paths, expected, strict=True):
        with Image.open(path) as file:
            assert file.tobytes() == image.tobytes()


def test_regions_equal_those_of_the_command_line(session: Session, tiny_folder: Path) -> None:
    """Each box has its own concepts, named or only listed, at their strengths; the file holds all settings."""
    boxes = [
        Region(box=(0, 0, 0.5, 1), prompt="a <dog>"),
        Region(box=(0.5, 0, 1, 1), prompt="a cat", adapters=("cat",)),
    ]
    wanted = settings(session, prompt="on the beach", negative_prompt="blue", concepts={"dog": 0.5})
    *_, paths = session.generate_regions(wanted, boxes, 2)
    made = [read_settings(path) for path in paths]
    assert [one.seed for one in made] == [3, 4]
    assert made[0].concepts == {"cat": 1.0, "dog": 0.5}
    assert [parse_region(text) for text in made[0].regions] == boxes
    base, adapters = load_base(str(tiny_folder)), [session.load("cat"), session.load("dog")]
    prompt, regions = whole_scene("on the beach", boxes, {"<dog>": "dog", "<cat>": "cat"})
    for path, seed in zip(paths, (3, 4), strict=True):
        options = {"steps": 2, "guidance": 3.0, "negative_prompt": "blue", "strengths": [1.0, 0.5]}
        expected = generate_regions(base, prompt, regions, adapters, seeds=[seed], **options)[0]
        with Image.open(path) as file:
            assert file.tobytes() == expected.tobytes()


def test_regions_with_unknown_concepts(session: Session) -> None:
    with pytest.raises(SboraError, match=r"got the unknown token <owl>, known for .*: <cat>, <dog>"):
        list(session.generate_regions(settings(session), [Region(box=(0, 0, 1, 1), prompt="an <owl>")], 1))
    boxes = [Region(box=(0, 0, 1, 1), prompt="an owl", adapters=("owl",))]
    with pytest.raises(SboraError, match="the concept 'owl' no longer exists"):
        list(session.generate_regions(settings(session), boxes, 1))


def test_the_first_batch_is_one_image(session: Session) -> None:
    assert [len(paths) for paths in session.generate(settings(session), 7)] == [1, 5, 7]


def test_a_retrained_concept_is_read_again(session: Session, tiny_folder: Path) -> None:
    name = str(tiny_folder)
    before = session.with_model(name, {"dog": 1.0}, weights)
    random_concept(load_base(name), "dog", 8).save(session.library.path("dog"), True)
    assert not same(session.with_model(name, {"dog": 1.0}, weights), before)
    session.library.remove("dog")
    with pytest.raises(SboraError, match="the concept 'dog' no longer exists"):
        session.with_model(name, {"dog": 1.0}, weights)


def test_one_thread_uses_the_model(session: Session, tiny_folder: Path) -> None:
    with ThreadPoolExecutor(8) as visitors:
        threads = visitors.map(
            lambda _: session.with_model(str(tiny_folder), {}, lambda _: threading.get_ident()), range(16)
        )
    assert len(set(threads)) == 1


def test_one_torch_thread_during_a_training(tmp_path: Path, tiny_folder: Path) -> None:
    is_training = iter([False, True, False])
    session = Session(Folders(adapters=tmp_path), (str(tiny_folder),), lambda: next(is_training))
    threads = [session.with_model(str(tiny_folder), {}, lambda _: torch.get_num_threads()) for _ in range(3)]
    assert threads == [torch.get_num_threads(), 1, torch.get_num_threads()]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": " "}, "the prompt is empty"),
        ({"prompt": "a <cat>"}, "its concept is off"),
        ({"prompt": "a <owl>"}, "got the unknown token <owl>"),
        ({"prompt": "a" * 2001}, "got a text of 2001 characters, expected at most 2000"),
        ({"negative_prompt": "é" * 9999}, "got a text of 9999 characters"),
        ({"base": "/etc"}, "got the base model '/etc', expected one of emoji64"),
        ({"concepts": {"dog": float("nan")}}, "strength"),
    ],
)
def test_invalid_settings(session: Session, changes: dict[str, object], message: str) -> None:
    with pytest.raises(SboraError, match=message):
        list(session.generate(settings(session, **changes), 1))
    assert len(list(session.generate(settings(session), 1))) == 1, "the session works afterwards"


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "adapters/dog.safetensors", ""])
def test_names_cannot_escape_the_library(session: Session, name: str, tmp_path: Path) -> None:
    (tmp_path / "secret.safetensors").write_bytes(b"x")
    with pytest.raises(SboraError):
        session.load(name)
    with pytest.raises(SboraError):
        session.with_model(session.bases()[1], {name: 1.0}, weights)
