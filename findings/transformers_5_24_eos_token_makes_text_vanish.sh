#!/usr/bin/env bash
# transformers 5.24.0 and 4.57.6: a tokenizer.json lists its newline as an added token with "special": false, and
# tokenizer_config.json names that newline as the eos_token, as small models without a token of their own for it do. One
# would expect the file's "special": false to stand: `decode(skip_special_tokens=True)` keeps newlines. The class sets it
# to true when it reads the files, so that every line break is gone from what a model wrote; the library tokenizers, given
# the same file, keeps them. Leaving the token out of the file, or writing it there with either value, makes no difference.
# Seen on 2026-11-29, Python 3.11 on Linux x86_64: transformers 5.24.0 with tokenizers 0.23.3, 4.57.6 with 0.22.2.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

cat >"$folder/try.py" <<'PYTHON'
import json
import sys
from pathlib import Path

import tokenizers
import transformers
from tokenizers import AddedToken, decoders, models

directory = Path(sys.argv[1])
directory.mkdir(exist_ok=True)
made = tokenizers.Tokenizer(models.BPE({"\n": 0, "a": 1, "b": 2}, [], unk_token="a"))
made.decoder = decoders.Fuse()
made.add_tokens([AddedToken("\n", special=False, normalized=False)])
made.save(str(directory / "tokenizer.json"))
config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "\n", "clean_up_tokenization_spaces": False}
(directory / "tokenizer_config.json").write_text(json.dumps(config))
read = transformers.AutoTokenizer.from_pretrained(directory)
texts = [tokenizer.decode([1, 0, 2], skip_special_tokens=True) for tokenizer in (made, read)]
print(f"tokenizers {tokenizers.__version__}: {texts[0]!r}; transformers {transformers.__version__}: {texts[1]!r}")
sys.exit(texts != ["a\nb", "ab"])
PYTHON

for version in 5.24.0 4.57.6; do
    "${PYTHON:-python3}" -m venv "$folder/$version"
    "$folder/$version/bin/python" -m pip install --quiet --disable-pip-version-check "transformers==$version" 2>/dev/null
    "$folder/$version/bin/python" "$folder/try.py" "$folder/files" 2>/dev/null || { echo "this has changed"; exit 1; }
done
