"""Tokenizers trained on captions: CLIP's (byte-level BPE, so that any text has tokens) and T5's (unigram pieces)."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers.trainers import BpeTrainer
from transformers import CLIPTokenizer, T5Tokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

MODEL_LENGTH = 40  # tokens: enough for four fully described objects, the floor and the time of day
START, END = "<|startoftext|>", "<|endoftext|>"


def train_tokenizer(texts: Iterable[str], folder: Path, vocabulary: int = 1024) -> CLIPTokenizer:
    """Learn at most `vocabulary` tokens from `texts`, always the same for the same texts; write the tokenizer to
    `folder` and load it from there."""
    letters = list(bytes_to_unicode().values())
    # As in CLIP's own, each letter also as the end of a word. The trainer would number letters in a random order of
    # appearance and break ties by their numbers: listing all of them as special tokens fixes the order.
    alphabet = [START, END, *letters, *(letter + "</w>" for letter in letters)]
    learner: Any = CLIPTokenizer(vocab={token: i for i, token in enumerate(alphabet)}, merges=[]).backend_tokenizer
    trainer = BpeTrainer(vocab_size=vocabulary, special_tokens=alphabet, end_of_word_suffix="</w>", show_progress=False)
    learner.train_from_iterator(texts, trainer)
    model = json.loads(learner.to_str())["model"]
    merges: Any = [tuple(pair) for pair in model["merges"]]
    tokenizer = CLIPTokenizer(vocab=model["vocab"], merges=merges)
    tokenizer.model_max_length = MODEL_LENGTH
    tokenizer.save_pretrained(folder)
    write_classic_files(folder)
    return CLIPTokenizer.from_pretrained(folder)


def train_unigram(texts: Iterable[str], folder: Path, vocabulary: int = 1024) -> T5Tokenizer:
    """Return a T5 tokenizer of at most `vocabulary` pieces: the most frequent words of `texts` and every printable
    Latin character, on its own and as the beginning of a word. Written to `folder`.

    The scores are log-probabilities of the words. There is no search for pieces inside words: captions of rendered
    scenes use few words, and this way the result does not depend on the order of a hash table.
    """
    words: Counter[str] = Counter()
    for text in texts:
        words.update("▁" + word for word in re.findall(r"[^\W\d_]+", text))
    total = max(1, sum(words.values()))
    letters = [chr(code) for code in (*range(0x21, 0x7F), *range(0xA1, 0x100))]
    pieces = {"<pad>": 0.0, "</s>": 0.0, "<unk>": 0.0, "▁": -6.0}
    pieces |= dict.fromkeys([*letters, *("▁" + letter for letter in letters)], -12.0)
    ranked = sorted(words.items(), key=lambda item: (-item[1], item[0]))
    pieces |= {word: math.log(count / total) for word, count in ranked[: max(0, vocabulary - len(pieces))]}
    # Real T5 checkpoints have 100 sentinels for its pretraining task; nothing here needs them.
    tokenizer = T5Tokenizer(vocab=list(pieces.items()), extra_ids=0, model_max_length=MODEL_LENGTH)
    tokenizer.save_pretrained(folder)
    return load_unigram(folder)


def load_unigram(folder: Path) -> T5Tokenizer:
    """Load the T5 tokenizer of a folder."""
    return T5Tokenizer.from_pretrained(folder)


def write_classic_files(folder: Path) -> None:
    """Write vocab.json and merges.txt beside tokenizer.json, for programs that read only this older layout."""
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    merges = [" ".join(m) if isinstance(m, list) else m for m in model["merges"]]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
