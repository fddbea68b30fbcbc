#!/usr/bin/env bash
# transformers 5.24.0: config.json has "eos_token_id": 5, and generation_config.json beside it sets only what it is for,
# say {"temperature": 0.7}. One would expect `generate` to stop at 5, as it does without that second file, or a warning
# that the two disagree. It never stops: a generation_config.json replaces config.json's ends of a text as a whole, and a
# key that it lacks counts as None. `model.config.eos_token_id` still says 5. So a file that only tunes sampling, added
# by hand to a model that stopped, makes it run on to max_new_tokens.
# Seen on 2026-11-29, Python 3.11 on Linux x86_64: transformers 5.24.0, torch 2.13.0.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

"${PYTHON:-python3}" -m venv "$folder/environment"
packages=(torch==2.13.0 transformers==5.24.0)
"$folder/environment/bin/python" -m pip install --quiet --disable-pip-version-check "${packages[@]}" 2>/dev/null

"$folder/environment/bin/python" - "$folder/model" 2>/dev/null <<'PYTHON'
import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

directory = Path(sys.argv[1])
sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
model = LlamaForCausalLM(LlamaConfig(vocab_size=9, eos_token_id=5, bos_token_id=None, pad_token_id=0, **sizes))
with torch.no_grad():
    model.model.embed_tokens.weight.fill_(1)
    model.lm_head.weight.zero_()
    model.lm_head.weight[5] = 1  # after any token, 5 is the likeliest
model.save_pretrained(directory)


def written() -> int:
    """How many tokens come after the first."""
    read = AutoModelForCausalLM.from_pretrained(directory)
    assert read.config.eos_token_id == 5
    return read.generate(torch.tensor([[1]]), max_new_tokens=20, do_sample=False).shape[1] - 1


generation = directory / "generation_config.json"
generation.unlink()
without = written()
generation.write_text(json.dumps({"temperature": 0.7}))
beside = written()
print(f"config.json alone: {without} token; with a generation_config.json that sets the temperature: {beside} tokens")
sys.exit((without, beside) != (1, 20))
PYTHON
