"""`eval --tasks` and lm-eval on the exported model: the same log-probabilities and scores."""

import json
import subprocess
import sys

import numpy as np
import pytest
from helpers import tiny_config
from test_export import LLAMA
from travel import make_run

import config_lib
import main
import run_lib
from corpus.tokenizer import build_tokenizer
from training import tasks

pytestmark = pytest.mark.slow

PACKAGES = ["torch==2.13.0", "transformers==5.24.0", "lm-eval[hf]==0.4.13"]
TASK = """
task: herons
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{context}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""


def test_the_same_scores_as_lm_eval(tmp_path, random_params, capsys):
    tokenizer, config = build_tokenizer("byte", ""), tiny_config(**LLAMA | {"context_len": 48, "position": "rope"})
    params = random_params(config_lib.model_config_of(config, tokenizer.vocab_size))
    params["embedding.embedding"] *= 0.3
    workdir, out = make_run(tmp_path / "run", config, tokenizer, params), tmp_path / "out"
    rng, words = np.random.default_rng(0), ["heron", "a lamp", "it", "my aunt", "paints two eels", "crème"]
    some = lambda n: " ".join(rng.choice(words, n))
    rows = [
        {"context": some(1 + n % 5), "choices": [some(1 + (n + i) % 3) for i in range(2 + n % 3)], "answer": n % 2}
        for n in range(40)
    ]
    file, task = tmp_path / "herons.jsonl", tmp_path / "task"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task.mkdir()
    (task / "herons.yaml").write_text(TASK.format(file=file))
    assert main.main(["export", f"--workdir={workdir}", f"--out={out}"]) == 0
    capsys.readouterr()
    assert main.main(["eval", f"--workdir={workdir}", f"--tasks={file}"]) == 0
    ours = json.loads(capsys.readouterr().out.splitlines()[-1])
    questions = [tasks.read_question(row) for row in rows]
    requests = [pair for question in questions for pair in tasks.encode(question, tokenizer, tokenizer.encode)]
    log_probs = tasks.log_likelihoods(run_lib.load_model(workdir)[0], requests, lambda count: None)

    environment = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", environment], check=True)
    python = environment / "bin" / "python"
    if subprocess.run([python, "-m", "pip", "install", "-q", *PACKAGES], check=False).returncode:
        pytest.skip("lm-eval could not be installed")
    command = [python, "-m", "lm_eval", "--model", "hf", "--device", "cpu", "--tasks", "herons", "--log_samples"]
    command += [
        "--model_args",
        f"pretrained={out},dtype=float32",
        "--include_path",
        task,
        "--output_path",
        tmp_path / "lm",
    ]
    subprocess.run(command, check=True, cwd=tmp_path)
    [results] = (tmp_path / "lm").rglob("results*.json")
    theirs = json.loads(results.read_text())["results"]["herons"]
    for name in ("acc", "acc_norm"):
        assert ours[name] == pytest.approx(theirs[f"{name},none"], abs=1e-4)
    [samples] = (tmp_path / "lm").rglob("samples*.jsonl")
    told = sorted(map(json.loads, samples.read_text().splitlines()), key=lambda sample: sample["doc_id"])
    their_log_probs = [
        float(choice[0][0] if isinstance(choice[0], list) else choice[0]) for s in told for choice in s["resps"]
    ]
    np.testing.assert_allclose(log_probs, their_log_probs, rtol=0, atol=1e-4 * np.abs(log_probs).max())
