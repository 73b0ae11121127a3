"""A token's text is what a prompt says: every vector is read, or an error names the token."""

import re
from pathlib import Path
from unicodedata import normalize

import pytest
import torch

from sbora_diffusion.data.concept import ConceptImage
from sbora_diffusion.inference.generate import check_captions, check_tokens
from sbora_diffusion.models.base import Base
from sbora_diffusion.models.tokens import added_tokens
from sbora_diffusion.utils.errors import SboraError
from sbora_diffusion.utils.text import tokens_in

VECTORS = 4


def rows(base: Base, token: str) -> dict[str, torch.Tensor]:
    width = base.component("text_encoder").get_input_embeddings().embedding_dim  # type: ignore[operator]
    return {f"text_encoder.{token}": torch.zeros(VECTORS, width)}


def vectors_read(base: Base, token: str, prompt: str) -> list[int]:
    """The numbers of the token's vectors that are read, in the order of the prompt."""
    size = base.component("text_encoder").get_input_embeddings().num_embeddings  # type: ignore[operator]
    with added_tokens(base, rows(base, token)):
        return [number - size for number in base.tokenize([prompt])[0].tolist() if number >= size]


@pytest.mark.parametrize("token", ["<rex>", "<Rex>", "<REX>", "<Ünï>", "<été-2>", "<My Fox v1.0>", "<कुत्ता>", "<a_b>"])
@pytest.mark.parametrize("prompt", ["a {} here", "{}", "a{}on", "A {}, wet."])
def test_every_vector_is_read(base: Base, token: str, prompt: str) -> None:
    assert vectors_read(base, token, prompt.format(token)) == [0, 1, 2, 3]
    assert vectors_read(base, token, normalize("NFD", prompt.format(token))) == [0, 1, 2, 3]


def test_upper_case_is_another_token(base: Base) -> None:
    assert vectors_read(base, "<Rex>", "a <rex>") == []
    with (
        added_tokens(base, rows(base, "<Rex>")),
        pytest.raises(SboraError, match="brings the token <rex>, known: <Rex>"),
    ):
        check_tokens(base, ["a <rex>"])


def words(base: Base, count: int) -> str:
    """A text that is read as so many tokens."""
    ids = base.pipeline.tokenizer("a " * count, add_special_tokens=False).input_ids
    assert len(ids) == count
    return "a " * count


@pytest.mark.parametrize("token", ["<rex>", "<Rex>"])
def test_a_token_is_read_whole_or_refused(base: Base, token: str) -> None:
    length = base.pipeline.tokenizer.model_max_length - 2
    with added_tokens(base, rows(base, token)):
        check_tokens(base, [words(base, length - VECTORS) + token])
        for count in range(length - VECTORS + 1, length + 2):
            prompt = words(base, count) + token
            with pytest.raises(SboraError, match=f"is too long: {token} is beyond its {length + 2} tokens"):
                check_tokens(base, [prompt])
            with pytest.raises(SboraError, match=r"the caption of dog/1\.jpg is too long"):
                check_captions(base, [ConceptImage(path=Path("dog/1.jpg"), caption=prompt)])
        with pytest.raises(SboraError, match="is too long"):  # the second mention is cut
            check_tokens(base, [token + words(base, length - VECTORS - 2) + token])


def test_captions_that_are_read_in_part_are_named(base: Base, caplog: pytest.LogCaptureFixture) -> None:
    length = base.pipeline.tokenizer.model_max_length - 2
    fits, long = words(base, length - VECTORS), words(base, length - VECTORS + 1)
    with added_tokens(base, rows(base, "<rex>")):
        check_captions(base, [ConceptImage(path=Path("1.jpg"), caption=f"<rex> {fits}")])
        assert not caplog.records
        images = [ConceptImage(path=Path(f"{name}.jpg"), caption=f"<rex> {long}") for name in ("2", "3")]
        check_captions(base, images)
    assert "that the text encoder reads: 2.jpg, 3.jpg" in caplog.text


@pytest.mark.parametrize(
    ("prompt", "named"),
    [
        ("a <dog> and a <Cat>", ["<dog>", "<Cat>"]),
        ("a <My Fox v1.0>!", ["<My Fox v1.0>"]),
        ("<dog><cat>", ["<dog>", "<cat>"]),
        ("1girl, <o>_<o>, @_@", []),
        ("a < b and c > d", []),
        ("x <3 y, <>, < dog >, 2 > 1", []),
        ("a <" + normalize("NFD", "été") + ">", ["<été>"]),
    ],
)
def test_tokens_in_a_prompt(prompt: str, named: list[str]) -> None:
    assert tokens_in(prompt) == named


def test_a_token_with_blanks_that_nobody_brings(base: Base) -> None:
    with pytest.raises(SboraError, match=re.escape("no loaded concept brings the token <My Fox v1.0>")):
        check_tokens(base, ["a <My Fox v1.0> here"])


def test_a_caption_may_hold_other_angle_brackets(base: Base) -> None:
    with added_tokens(base, rows(base, "<rex>")):
        check_captions(base, [ConceptImage(path=Path("1.jpg"), caption="a <rex>, <o>_<o>, <lora:x:1>")])
