"""Paraphrases say the same things in other words, and fit emoji-clip's 24 tokens."""

from random import Random

from transformers import CLIPTokenizer

from tools.emoji.model import WEIGHTS
from tools.emoji.phrases import COLOUR, PLACES, paraphrase
from tools.emoji.world import load_world


def test_every_scene_has_its_phrases_and_the_first_is_the_worlds() -> None:
    assert {scene: phrases[0] for scene, phrases in PLACES.items()} == load_world().scenes
    assert {len(phrases) for phrases in (*PLACES.values(), COLOUR)} == {3}


def test_paraphrases_name_the_subjects_and_vary() -> None:
    rng = Random(0)
    said = [paraphrase(["owl", "red apple"], "3d", "beach", rng) for _ in range(200)]
    assert all("owl" in words and "red apple" in words for words in said)
    assert len(set(said)) > 30
    assert said.count("a 3d owl and a red apple on the beach") > 80
    assert any(words.startswith("a photo depicts a 3d red apple and an owl") for words in said)


def test_the_longest_caption_fits() -> None:
    tokenizer = CLIPTokenizer.from_pretrained(WEIGHTS / "tokenizer")
    words = "a photo depicts a drawing of a christmas tree and a birthday cake on a yellow background"
    assert len(tokenizer(words).input_ids) <= 24
