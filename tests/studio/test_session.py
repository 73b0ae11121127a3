"""What the page draws with: concepts written and restored live, and names that cannot leave the library."""

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from sbora_diffusion.adapters.dense import Dense
from sbora_diffusion.adapters.file import Adapter
from sbora_diffusion.adapters.spec import FORMAT_OF_METHODS
from sbora_diffusion.inference.generate import applied, generate
from sbora_diffusion.inference.image_file import Settings, read_settings
from sbora_diffusion.inference.regions import Region, generate_regions, parse_region, whole_scene
from sbora_diffusion.models.base import Base, load_base
from sbora_diffusion.studio.session import Folders, Workshop
from sbora_diffusion.utils.errors import SboraError

from .conftest import random_concept


def weights(base: Base) -> dict[str, torch.Tensor]:
    return {key: layer.weight.clone() for key, layer in base.layers.items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[key], other[key]) for key in one | other)


def settings(workshop: Workshop, **changes: object) -> Settings:
    fields = {"base": workshop.bases()[1], "prompt": "a <dog>", "negative_prompt": "", "seed": 3, "steps": 2}
    return Settings(**{**fields, "guidance": 3.0, "concepts": {"dog": 1.0}, **changes})  # pyright: ignore[reportArgumentType]


def test_any_order_of_switching_gives_the_same_weights(workshop: Workshop, tiny_folder: Path) -> None:
    name = str(tiny_folder)
    untouched = weights(load_base(name))
    fresh = load_base(name)
    with applied(fresh, [workshop.load("dog"), workshop.load("cat")], [0.5, 1.0]):
        wanted = weights(fresh)
    for strengths in ({"dog": 1.0}, {"cat": 1.0, "dog": 0.25}, {}, {"cat": 1.0}, {"dog": 0.5, "cat": 1.0}):
        assert same(workshop.with_model(name, strengths, weights), untouched) == (strengths == {})
    assert same(workshop.with_model(name, {"cat": 1.0, "dog": 0.5}, weights), wanted)
    assert same(workshop.with_model(name, {}, weights), untouched)


def random_dora(base: Base, name: str) -> Adapter:
    """It adds what depends on the base weights."""
    like = random_concept(base, name, 0)
    dense = {
        key: Dense(factor.weight, torch.ones(4, base.layer_shapes[key][1]), torch.ones(len(factor.weight), 1))
        for key, factor in like.factors.items()
    }
    spec = replace(like.spec, method="dora", format=FORMAT_OF_METHODS, intervals=())
    return Adapter(spec, {}, like.tokens, dense)


def test_a_dora_comes_whatever_was_switched_on_before(workshop: Workshop, tiny_folder: Path) -> None:
    name, fresh = str(tiny_folder), load_base(str(tiny_folder))
    random_dora(fresh, "owl").save(workshop.library.path("owl"))
    with applied(fresh, [workshop.load("dog"), workshop.load("owl")], [0.5, 1.0]):
        wanted = weights(fresh)
    for before in ({}, {"dog": 0.5}, {"dog": 1.0, "cat": 1.0}, {"owl": 1.0}):
        workshop.with_model(name, before, weights)
        assert same(workshop.with_model(name, {"dog": 0.5, "owl": 1.0}, weights), wanted)
    assert same(workshop.with_model(name, {}, weights), weights(load_base(name)))


def test_images_are_those_of_the_command_line(workshop: Workshop, tiny_folder: Path) -> None:
    *_, paths = workshop.draw(settings(workshop), 6)
    assert [read_settings(path).seed for path in paths] == [3, 4, 5, 6, 7, 8]
    base = load_base(str(tiny_folder))
    with applied(base, [workshop.load("dog")]):
        expected = generate(base, ["a <dog>"] * 6, seeds=range(3, 9), steps=2, guidance=3.0)
    for path, image in zip(paths, expected, strict=True):
        with Image.open(path) as file:
            assert file.tobytes() == image.tobytes()


def test_regions_are_those_of_the_command_line(workshop: Workshop, tiny_folder: Path) -> None:
    """Each box with its own concepts, named or only given to it, at their strengths; all of it is in the file."""
    boxes = [
        Region(box=(0, 0, 0.5, 1), prompt="a <dog>"),
        Region(box=(0.5, 0, 1, 1), prompt="a cat", adapters=("cat",)),
    ]
    wanted = settings(workshop, prompt="on the beach", negative_prompt="blue", concepts={"dog": 0.5})
    *_, paths = workshop.draw_regions(wanted, boxes, 2)
    made = [read_settings(path) for path in paths]
    assert [one.seed for one in made] == [3, 4]
    assert made[0].concepts == {"cat": 1.0, "dog": 0.5}
    assert [parse_region(text) for text in made[0].regions] == boxes
    base, adapters = load_base(str(tiny_folder)), [workshop.load("cat"), workshop.load("dog")]
    prompt, told = whole_scene("on the beach", boxes, {"<dog>": "dog", "<cat>": "cat"})
    for path, seed in zip(paths, (3, 4), strict=True):
        options = {"steps": 2, "guidance": 3.0, "negative_prompt": "blue", "strengths": [1.0, 0.5]}
        expected = generate_regions(base, prompt, told, adapters, seeds=[seed], **options)[0]
        with Image.open(path) as file:
            assert file.tobytes() == expected.tobytes()


def test_regions_name_what_is_there(workshop: Workshop) -> None:
    with pytest.raises(SboraError, match=r"nobody has taught .* the token <owl> \(known: <cat>, <dog>\)"):
        list(workshop.draw_regions(settings(workshop), [Region(box=(0, 0, 1, 1), prompt="an <owl>")], 1))
    boxes = [Region(box=(0, 0, 1, 1), prompt="an owl", adapters=("owl",))]
    with pytest.raises(SboraError, match="there is no concept 'owl' any more"):
        list(workshop.draw_regions(settings(workshop), boxes, 1))


def test_the_first_image_comes_alone(workshop: Workshop) -> None:
    assert [len(paths) for paths in workshop.draw(settings(workshop), 7)] == [1, 5, 7]


def test_a_concept_trained_anew_is_read_anew(workshop: Workshop, tiny_folder: Path) -> None:
    name = str(tiny_folder)
    before = workshop.with_model(name, {"dog": 1.0}, weights)
    random_concept(load_base(name), "dog", 8).save(workshop.library.path("dog"), True)
    assert not same(workshop.with_model(name, {"dog": 1.0}, weights), before)
    workshop.library.remove("dog")
    with pytest.raises(SboraError, match="there is no concept 'dog' any more"):
        workshop.with_model(name, {"dog": 1.0}, weights)


def test_one_thread_has_the_model(workshop: Workshop, tiny_folder: Path) -> None:
    with ThreadPoolExecutor(8) as visitors:
        threads = visitors.map(
            lambda _: workshop.with_model(str(tiny_folder), {}, lambda _: threading.get_ident()), range(16)
        )
    assert len(set(threads)) == 1


def test_one_thread_of_torch_beside_a_training(tmp_path: Path, tiny_folder: Path) -> None:
    is_training = iter([False, True, False])
    workshop = Workshop(Folders(adapters=tmp_path), (str(tiny_folder),), lambda: next(is_training))
    threads = [workshop.with_model(str(tiny_folder), {}, lambda _: torch.get_num_threads()) for _ in range(3)]
    assert threads == [torch.get_num_threads(), 1, torch.get_num_threads()]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": " "}, "there is no prompt"),
        ({"prompt": "a <cat>"}, "its concept is off"),
        ({"prompt": "a <owl>"}, "nobody has taught .* the token <owl>"),
        ({"base": "/etc"}, "got the base model '/etc', expected one of emoji64"),
        ({"concepts": {"dog": float("nan")}}, "strength"),
    ],
)
def test_what_cannot_be_drawn(workshop: Workshop, changes: dict[str, object], message: str) -> None:
    with pytest.raises(SboraError, match=message):
        list(workshop.draw(settings(workshop, **changes), 1))
    assert len(list(workshop.draw(settings(workshop), 1))) == 1, "it goes on afterwards"


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "adapters/dog.safetensors", ""])
def test_a_name_cannot_leave_the_library(workshop: Workshop, name: str, tmp_path: Path) -> None:
    (tmp_path / "secret.safetensors").write_bytes(b"x")
    with pytest.raises(SboraError):
        workshop.load(name)
    with pytest.raises(SboraError):
        workshop.with_model(workshop.bases()[1], {name: 1.0}, weights)
