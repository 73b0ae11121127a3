"""Build emoji64's tokenizer: a byte-level BPE of 3,200 tokens in CLIP's conventions, 24 positions.

One command: `python -m tools.emoji.tokenizer [--data DIR]`. Rare merges of equal frequency come in another
order each time: weights belong to the tokenizer that lies beside them.
"""

import argparse
import json
import logging
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTokenizer, PreTrainedTokenizerBase

from tools.emoji.art import default_data_dir
from tools.emoji.world import caption, load_world

log = logging.getLogger(__name__)

LENGTH = 24
START, END = "<|startoftext|>", "<|endoftext|>"
CLIP_WORDS = Regex(r"""'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+""")
EVERYDAY = (
    "a the an of and with in on at under over near next to left right big small tiny red green blue "
    "yellow purple orange pink black white grey brown photo image painting sketch style cute happy sad "
    "wearing holding riding eating playing forest city mountain river space rain field garden room street "
    "kitchen table man woman boy girl person animal toy "
)


def corpus(names_package: Path) -> Iterator[str]:
    """Every caption of the world's single subjects, emojibase's labels and tags, and everyday words."""
    world = load_world()
    places = [*world.scenes.values(), *(f"on a {colour} background" for colour in world.colours)]
    for subject, style, place in product(world.subjects, [*world.styles, None], places):
        yield caption([subject.name], style, place)
    for entry in json.loads((names_package / "en" / "data.json").read_text()):
        yield from [" ".join([entry["label"], *entry.get("tags", [])]).lower()] * 5
    yield from [EVERYDAY.strip()] * 50


def train_bpe(texts: Iterator[str]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """CLIP's vocabulary order (bytes, bytes ending a word, merges, start, end) and the merges."""
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>", continuing_subword_prefix="", unk_token=END))
    bpe.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    split = pre_tokenizers.Split(CLIP_WORDS, behavior="removed", invert=True)
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=2944, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False, min_frequency=2
    )
    bpe.train_from_iterator(texts, trainer)
    merges = [tuple(merge) for merge in json.loads(bpe.to_str())["model"]["merges"]]
    tokens = [*alphabet, *(f"{byte}</w>" for byte in alphabet), *(a + b for a, b in merges), START, END]
    return {token: number for number, token in enumerate(dict.fromkeys(tokens))}, merges


def build(names_package: Path, out: Path) -> PreTrainedTokenizerBase:
    """Train on the corpus and store a CLIPTokenizer folder."""
    merges: Any  # a list of pairs, whatever the annotation of CLIPTokenizer says
    vocabulary, merges = train_bpe(corpus(names_package))
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=LENGTH, pad_token=END, unk_token=END)
    tokenizer.save_pretrained(out)
    return CLIPTokenizer.from_pretrained(out)


def forget_origin(folder: Path) -> None:
    """Drop from a saved tokenizer's settings how it was loaded here, which is nobody's business elsewhere."""
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    kept = {key: value for key, value in settings.items() if key not in ("is_local", "local_files_only")}
    path.write_text(json.dumps(kept, indent=2, ensure_ascii=False) + "\n")


def main() -> None:
    """Build the tokenizer and store it as DATA/tokenizer."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--data", type=Path, default=default_data_dir())
    data = parser.parse_args().data
    logging.basicConfig(level=logging.INFO, format="%(message)s", force=True)
    tokenizer = build(data / "npm" / "names" / "package", data / "tokenizer")
    sample = "a drawing of an owl and a red apple in the snow"
    log.info("%d tokens; %s -> %s", len(tokenizer), sample, tokenizer.tokenize(sample))


if __name__ == "__main__":
    main()
