"""A CLIP tokenizer whose vocabulary fits the captions: byte-level BPE, so that any Latin text still has tokens."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from transformers import CLIPTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

MODEL_LENGTH = 40  # tokens; four fully described objects, floor and time of day fit
START, END = "<|startoftext|>", "<|endoftext|>"


def train_tokenizer(texts: Iterable[str], folder: Path, vocabulary: int = 1024) -> CLIPTokenizer:
    """Learns at most `vocabulary` tokens from `texts`; writes the tokenizer to `folder` and loads it from there."""
    letters = list(bytes_to_unicode().values())
    alphabet = [*letters, *(letter + "</w>" for letter in letters), START, END]
    blank = CLIPTokenizer(vocab={token: i for i, token in enumerate(alphabet)}, merges=[])
    # Every Latin letter once as a word of its own, so that each also exists as the end of a word.
    spelled = [chr(code) for code in range(33, 384)]
    tokenizer = blank.train_new_from_iterator([*texts, *spelled], vocab_size=vocabulary)
    tokenizer.model_max_length = MODEL_LENGTH
    tokenizer.save_pretrained(folder)
    write_classic_files(folder)
    return CLIPTokenizer.from_pretrained(folder)


def write_classic_files(folder: Path) -> None:
    """vocab.json and merges.txt beside tokenizer.json: the classic layout, for readers that know no other."""
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    merges = [" ".join(m) if isinstance(m, list) else m for m in model["merges"]]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
