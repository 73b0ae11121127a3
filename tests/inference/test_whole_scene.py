"""Every region hears of all the others, and names its own concept alone."""

from sbora_diffusion.inference.regions import Region, whole_scene

LEFT, RIGHT = (
    Region(box=(0, 0, 0.5, 1), prompt="a <dog>", adapters=("ink",)),
    Region(box=(0.5, 0, 1, 1), prompt="a <cat>"),
)
NOUNS = {"<dog>": "dog", "<cat>": "cat"}


def test_a_concept_is_named_in_its_own_region_only() -> None:
    prompt, (left, right) = whole_scene("on the beach", [LEFT, RIGHT], NOUNS)
    assert prompt == "a dog and a cat on the beach"
    assert (left.prompt, right.prompt) == ("a <dog> and a cat on the beach", "a dog and a <cat> on the beach")
    assert (left.box, left.adapters, right.feather) == (LEFT.box, ("ink",), RIGHT.feather)


def test_a_noun_has_the_article_it_needs() -> None:
    octopus = Region(box=(0, 0, 0.5, 1), prompt="a <octopus>")
    prompt, _ = whole_scene("on the beach", [octopus, RIGHT], NOUNS | {"<octopus>": "octopus"})
    assert prompt == "an octopus and a cat on the beach"


def test_nothing_is_said_of_the_whole_image() -> None:
    prompt, (left, right) = whole_scene("", [LEFT, RIGHT], NOUNS)
    assert (prompt, left.prompt, right.prompt) == ("a dog and a cat", "a <dog> and a cat", "a dog and a <cat>")


def test_an_unknown_token_stays_for_others_to_refuse() -> None:
    assert whole_scene("", [LEFT], {})[0] == "a <dog>"
