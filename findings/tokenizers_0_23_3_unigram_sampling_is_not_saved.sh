#!/usr/bin/env bash
# tokenizers 0.23.3: a Unigram model made with alpha and nbest_size draws among its best cuts of a text, as SentencePiece
# does, and a BPE model with dropout leaves out merges at random. One would expect both to be saved, or neither. dropout is
# in tokenizer.json and is at work again after reading it; alpha and nbest_size are not written, without a word, so the
# same file gives sampled ids before it is saved and always the same ids after. Who saves a tokenizer in order to train
# elsewhere with subword regularisation trains without; with BPE the opposite: who evaluates with such a file gets other
# ids each time.
# Seen on 2026-11-29, Python 3.11 on Linux x86_64: tokenizers 0.23.3.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

"${PYTHON:-python3}" -m venv "$folder/environment"
"$folder/environment/bin/python" -m pip install --quiet --disable-pip-version-check tokenizers==0.23.3 2>/dev/null

"$folder/environment/bin/python" - <<'PYTHON'
import sys

from tokenizers import Tokenizer, models


def cuts(tokenizer: Tokenizer) -> int:
    """How many different ids one text has been given in 200 tries."""
    return len({tuple(tokenizer.encode("abababab").ids) for _ in range(200)})


unigram = Tokenizer(models.Unigram([("a", -1.0), ("b", -1.0), ("ab", -1.5)], 0, False, alpha=0.5, nbest_size=9))
bpe = Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")], dropout=0.5))
seen = {}
for name, made in (("Unigram", unigram), ("BPE", bpe)):
    text = made.to_str()
    again = Tokenizer.from_str(text)
    written = [word for word in ("alpha", "nbest_size", "dropout") if f'"{word}"' in text]
    seen[name] = cuts(made) > 1, cuts(again) > 1
    print(f"{name}: the file has {written}; several cuts before saving: {seen[name][0]}, after: {seen[name][1]}")
if seen != {"Unigram": (True, False), "BPE": (True, True)}:
    sys.exit("this has changed")
PYTHON
