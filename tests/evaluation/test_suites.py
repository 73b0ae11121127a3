"""Suites: our own, everybody else's layouts, and every way of writing a prompt that cannot be used."""

import hashlib
import json
import tomllib
from pathlib import Path

import pytest

from sbora_diffusion.evaluation.suites import Prompt, Suite, default_suites, known_suites, load_suite
from sbora_diffusion.utils.errors import SboraError

DREAMBOOTH = """Classes

subject_name,class
vase,vase
dog6,dog
bear_plushie,stuffed animal

Prompts

Object Prompts

prompt_list = [
'a {0} {1} on top of a mirror'.format(unique_token, class_token),
'a red {0} {1}'.format(unique_token, class_token)
]

Live Subject Prompts

prompt_list = [
'a {0} {1} in a chef outfit'.format(unique_token, class_token)
]
"""
CUSTOM = [
    {"instance_data_dir": "./benchmark_dataset/pet_cat1", "prompt_filename": "prompts/cat.txt"},
    {"instance_data_dir": "./benchmark_dataset/furniture_sofa1", "prompt_filename": "prompts/sofa.txt"},
]
CUSTOM_JOINT = [[*CUSTOM, {"prompt_filename_compose": "prompts/pet_furniture.txt"}]]


@pytest.mark.parametrize("name", known_suites())
def test_our_suites_have_twenty_different_prompts(name: str) -> None:
    suite = load_suite(name)
    assert len({prompt.text for prompt in suite.prompts}) == 20
    assert suite.num_concepts == (2 if "joint" in name else 1)
    file = default_suites() / f"{name}.toml"
    assert suite.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
    assert suite.name == name


def test_the_emoji64_suites_use_words_of_its_world() -> None:
    folder = Path(__file__).parents[2] / "tools/emoji"
    world = tomllib.loads((folder / "world.toml").read_text())
    nouns = [
        entry if isinstance(entry, str) else entry["name"] for tier in world["subjects"]["tiers"][:2] for entry in tier
    ]
    words = {
        word for phrase in [*world["styles"].values(), *world["scenes"].values(), *nouns] for word in phrase.split()
    }
    words |= {*world["colours"], "a", "and", "on", "background"}
    for name in ("emoji64", "emoji64-joint"):
        for prompt in load_suite(name).bind(["a", "a"][: load_suite(name).num_concepts]):
            assert set(prompt.split()) <= words


def test_joint_suites_put_each_concept_first_as_often() -> None:
    for name in ("joint", "emoji64-joint"):
        texts = load_suite(name).bind(["LEFT", "RIGHT"])
        assert sum(text.index("LEFT") < text.index("RIGHT") for text in texts) == 10


def test_bind() -> None:
    assert load_suite("emoji64").bind(["<dog-2>"])[0] == "a <dog-2> on the grass"
    assert load_suite("emoji64-joint").bind(["<dog>", "<cat>"])[1] == "a <cat> and a <dog> on the grass"
    with pytest.raises(SboraError, match="emoji64-joint needs 2 concepts in one image, got 1: <dog>"):
        load_suite("emoji64-joint").bind(["<dog>"])
    with pytest.raises(SboraError, match="needs 1 concepts in one image, got 2"):
        load_suite("emoji64").bind(["<dog>", "<cat>"])


@pytest.mark.parametrize("text", ["a {} at  night", "a <TOK> at night", "a {0} at night"])
def test_ways_to_write_the_placeholder(text: str) -> None:
    assert Prompt.parse(text, "object").text == "a {0} at night"


@pytest.mark.parametrize(
    ("text", "kind", "message"),
    [
        ("a dog", "object", "has no placeholder"),
        ("a {token}", "object", "unknown placeholder {token}"),
        ("a {0.name}", "object", "unknown placeholder {0.name}"),
        ("a {0!r}", "object", "unknown placeholder {0}"),
        ("a {} and a {}", "joint", "unknown placeholder {}"),
        ("a <dog>", "object", "unknown placeholder <dog>"),
        ("a {", "object", "cannot be read"),
        ("a {1}", "object", "names several concepts"),
        ("a {0} and a {1}", "object", "names several concepts"),
    ],
)
def test_prompts_that_cannot_be_used(tmp_path: Path, text: str, kind: str, message: str) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(f"kind = {json.dumps(kind)}\nprompts = [{json.dumps(text)}]\n")
    with pytest.raises(SboraError) as caught:
        load_suite(str(path))
    assert message in str(caught.value)
    assert str(caught.value).startswith(f"{path}: ")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "got kind = None"),
        ('kind = "thing"', "got kind = 'thing'"),
        ('kind = "object"', "the suite mine has no prompts"),
        ('kind = "object"\nprompts = "a {}"', "must be a list of texts"),
        ('kind = "object"\nprompts = ["a {}"]\ntitle = "x"', "unknown key 'title'"),
        ("kind = ", "cannot read"),
    ],
)
def test_toml_that_is_not_right(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(content)
    with pytest.raises(SboraError, match=message):
        load_suite(str(path))


def test_mix_of_show(tmp_path: Path) -> None:
    path = tmp_path / "test_pet.txt"
    path.write_bytes(b"A <TOK>, in the forest\r\n\r\nAn angry <TOK>")
    suite = load_suite(str(path))
    assert [prompt.text for prompt in suite.prompts] == ["A {0}, in the forest", "An angry {0}"]
    assert {prompt.kind for prompt in suite.prompts} == {"character"}
    (tmp_path / "test_vase.txt").write_text("A <TOK>")
    assert load_suite(str(tmp_path / "test_vase.txt")).prompts[0].kind == "object"


def test_dreambooth(tmp_path: Path) -> None:
    (tmp_path / "prompts_and_classes.txt").write_text(DREAMBOOTH)
    for subject in ("vase", "dog6", "unknown"):
        (tmp_path / subject).mkdir()
    vase, dog = load_suite(str(tmp_path / "vase")), load_suite(str(tmp_path / "prompts_and_classes.txt#dog6"))
    assert vase.bind(["<vase>"]) == ["a <vase> on top of a mirror", "a red <vase>"]
    assert [(prompt.text, prompt.kind) for prompt in dog.prompts] == [("a {0} in a chef outfit", "character")]
    with pytest.raises(SboraError, match="no subject 'unknown'; it has: vase, dog6, bear_plushie"):
        load_suite(str(tmp_path / "unknown"))


def test_custom_concept_101(tmp_path: Path) -> None:
    (tmp_path / "prompts").mkdir()
    (tmp_path / "prompts/cat.txt").write_text("{} in times square.\n")
    (tmp_path / "prompts/sofa.txt").write_text("photo of a {}.\n")
    (tmp_path / "prompts/pet_furniture.txt").write_text("photo of the {0} and {1}. \nA {0} at dawn\n")
    (tmp_path / "dataset.json").write_text(json.dumps(CUSTOM))
    (tmp_path / "joint.json").write_text(json.dumps(CUSTOM_JOINT))
    cat = load_suite(f"{tmp_path}/dataset.json#pet_cat1")
    assert (cat.prompts[0].text, cat.prompts[0].kind) == ("{0} in times square.", "character")
    assert cat.sha256 == hashlib.sha256(b"{} in times square.\n").hexdigest()
    assert load_suite(f"{tmp_path}/dataset.json#furniture_sofa1").prompts[0].kind == "object"
    joint = load_suite(f"{tmp_path}/joint.json#pet_cat1+furniture_sofa1")
    assert joint.bind(["<c>", "<s>"]) == ["photo of the <c> and <s>.", "A <c> at dawn"]
    with pytest.raises(SboraError, match="has 2 concepts; known: pet_cat1, furniture_sofa1"):
        load_suite(f"{tmp_path}/dataset.json")
    (tmp_path / "dataset.json").write_text('{"a": 1}')
    with pytest.raises(SboraError, match="not in CustomConcept101's layout"):
        load_suite(f"{tmp_path}/dataset.json#pet_cat1")


def test_nothing_to_read(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("x")
    (tmp_path / "a.txt").write_bytes(b"\xff {}")
    for name, message in {
        "nosuch": "known suites: characters, emoji64",
        "": "no suite and no file ''",
        str(tmp_path): "has no prompts_and_classes.txt",
        f"{tmp_path}/a.csv": "expected a .toml",
        f"{tmp_path}/a.txt": "cannot read",
        f"{tmp_path}/a.txt#x": "holds one suite",
    }.items():
        with pytest.raises(SboraError, match=message):
            load_suite(name)


@pytest.mark.parametrize("text", ["a {0}", "a {1}", "a {0} and a {2}"])
def test_joint_prompts_that_leave_a_concept_out(tmp_path: Path, text: str) -> None:
    (tmp_path / "mine.toml").write_text(f'kind = "joint"\nprompts = ["{text}"]\n')
    with pytest.raises(SboraError, match="suite mine have the placeholders"):
        load_suite(str(tmp_path / "mine.toml"))


def test_joint_prompts_stay_apart() -> None:
    prompts = (Prompt.parse("a {}", "object"), Prompt.parse("a {0} and a {1}", "joint"))
    with pytest.raises(SboraError, match="mixes joint prompts with others"):
        Suite(name="mixed", prompts=prompts, sha256="")
