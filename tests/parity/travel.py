"""What the tests of models that travel share: directories of both sides, commands, and the other side's numbers."""

import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch
from helpers import SCRATCH, assert_one_line
from ml_collections import ConfigDict
from safetensors.numpy import load_file, save_file
from stock import V

import config_lib
import main
import run_lib
from corpus.tokenizer import CharTokenizer, Tokenizer
from input_pipeline import eval_batches
from interop.families import Arrays
from interop.tokenizer_json import to_tokenizers
from runtime.checkpoints.manager import Checkpoints
from runtime.files import write_json
from transformer.model import Transformer, model_of, params_of

# Relative L2 of logits, or difference of losses. Both sides round to float32, whose unit is 6e-8, a few dozen times.
LIMIT = 2e-6

CHAR = CharTokenizer(["\n", *map(chr, range(ord("A"), ord("A") + V - 1))])


def make_run(workdir: Path, config: ConfigDict, tokenizer: Tokenizer, params: Mapping[str, jax.Array]) -> Path:
    """What training would leave behind for `export`, `sample` and `eval`."""
    workdir.mkdir()
    config.tokenizer = tokenizer.name
    with Checkpoints(workdir) as checkpoints:
        checkpoints.save(7, params, {"micro_step": np.int32(7)}, run_lib.identity(config, tokenizer), None)
    write_json(workdir / run_lib.TOKENIZER_FILE, tokenizer.to_dict())
    write_json(workdir / run_lib.CONFIG_FILE, {"config": config_lib.to_dict(config)})
    return workdir


def save(directory: Path, model: torch.nn.Module, **options: Any) -> Path:
    """What save_pretrained writes, and a tokenizer.json of V characters."""
    model.save_pretrained(directory, **options)
    to_tokenizers(CHAR).save(str(directory / "tokenizer.json"))
    return directory


def text_file() -> Path:
    """A text with each of those characters, one of them more often than the others."""
    path, rng = SCRATCH / "characters.txt", np.random.default_rng(0)
    path.write_text(CHAR.decode([*range(V), *(rng.integers(0, V, 2000) * rng.integers(0, 2, 2000))]))
    return path


def call(capsys: Any, *argv: str) -> str:
    """What a command that succeeds without a complaint writes."""
    capsys.readouterr()
    status, output = main.main(list(argv)), capsys.readouterr()
    assert (status, output.err) == (0, ""), output.err
    return output.out


def refuse(capsys: Any, argv: list[str], *words: str, status: int = 2) -> None:
    """The command fails with a status and one line that has the words."""
    capsys.readouterr()
    assert main.main(argv) == status
    assert_one_line(capsys.readouterr().err, *words)


def read_model(source: Path) -> tuple[ConfigDict, Arrays, Tokenizer]:
    """What `import` would make a run of."""
    return importlib.import_module("commands.import").read_model(source, None, None, print)  # the name is a keyword


def greedy(capsys: Any, workdir: Path, prompt: str, num_tokens: int) -> str:
    flags = f"--workdir={workdir}", f"--prompt={prompt}", f"--num_tokens={num_tokens}", "--temperature=0"
    return call(capsys, "sample", *flags)


def eval_loss(capsys: Any, workdir: Path) -> float:
    return json.loads(call(capsys, "eval", f"--workdir={workdir}").splitlines()[-1])["loss"]


def weights_of(workdir: Path) -> Arrays:
    return {name: np.asarray(value) for name, value in params_of(run_lib.load_model(workdir)[0]).items()}


def logits_of(model: Transformer, tokens_BT: np.ndarray) -> np.ndarray:
    return jax.jit(lambda params: model_of(model.config, params)(tokens_BT))(params_of(model))


def torch_logits(model: torch.nn.Module, tokens_BT: np.ndarray) -> torch.Tensor:
    with torch.no_grad():
        output = model(torch.tensor(tokens_BT, dtype=torch.long))
    return getattr(output, "logits", output)


def torch_loss(model: torch.nn.Module, batches: list[np.ndarray]) -> float:
    """Nats per token over batches [B, T + 1]; what is negative in them is no target."""
    total, count = 0.0, 0
    for batch_BT1 in batches:
        logits_BTV, targets_BT = torch_logits(model, batch_BT1[:, :-1].clip(0)), torch.tensor(batch_BT1[:, 1:])
        flat = logits_BTV.flatten(0, 1), targets_BT.flatten().long()
        total += torch.nn.functional.cross_entropy(*flat, ignore_index=-1, reduction="sum").item()
        count += int((targets_BT >= 0).sum())
    return total / count


def val_batches(workdir: Path) -> list[np.ndarray]:
    """All of the validation split of the text that a run is evaluated on."""
    config = run_lib.read_config(workdir)
    split = run_lib.load_data(config, print, run_lib.load_tokenizer(workdir)).val
    return list(eval_batches(split, config.context_len, batch_size=8))


def edit_config(directory: Path, name: str = "config.json", /, **changes: Any) -> None:
    """Change keys of a config.json, or another file; None takes a key out."""
    path = directory / name
    changed = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in changed.items() if value is not None}))


def edit_weights(directory: Path, edit: Any) -> None:
    """Put `edit(arrays)` in the place of the arrays of a model.safetensors."""
    path = directory / "model.safetensors"
    save_file(edit(load_file(path)), path)
