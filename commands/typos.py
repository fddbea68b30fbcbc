"""Finds mistakes in a command line or an installation at once, before the imports, which take seconds.

The names of flags and keys are read from the source of a command and of configs/default.py.
"""

import gc
import importlib
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from runtime.errors import UserError
from runtime.files import PROGRAM
from runtime.screen.text import nearest

_FLAG = re.compile(r'\bDEFINE_(\w+)\(\s*"(\w+)"')
_KEY = re.compile(r"^    config\.(\w+) = (\S+)", re.MULTILINE)
_OF_ALL = {"debug": "bool", "help": "bool", "h": "bool", "flagfile": "string", "undefok": "string"}
_ALSO_CALLED = {  # names of our commands and keys in other programs
    **{"generate": "sample", "chat": "sample", "evaluate": "eval", "tokenize": "prepare", "resume": "train"},
    **{"learning_rate": "lr", "n_layer": "num_blocks", "num_layers": "num_blocks", "num_hidden_layers": "num_blocks"},
    **{"n_head": "num_heads", "num_attention_heads": "num_heads", "block_size": "context_len", "data": "dataset"},
    **dict.fromkeys(("n_embd", "d_model", "hidden_size"), "embedding_dim"),
    **{"max_iters": "max_steps", "steps": "max_steps", "num_epochs": "epochs", "name": "run", "d_ff": "mlp_dim"},
    **{"gradient_accumulation_steps": "accumulation_steps", "eval_interval": "eval_every", "seq_len": "context_len"},
}


def hint(word: str, words: Sequence[str]) -> str:
    """ "; did you mean X?" for one of `words` with a similar spelling, or known elsewhere as `word`; or ""."""
    other = _ALSO_CALLED.get(word, word)
    return nearest(other if other in words else word, words, alike=0.78)  # "stop" is no misspelt "step"


def flags_of(command: str) -> tuple[dict[str, str], list[str]]:
    """A command's flags, each with its type, and the keys of --config.KEY if it takes a config."""
    source = Path(__file__).with_name(f"{command}.py").read_text(encoding="utf-8")
    if "define_checkpoint(" in source:  # flags that several commands have
        shared = Path(__file__).with_name("flags.py").read_text(encoding="utf-8")
        source += shared.partition("def define_checkpoint(")[2].partition("\n\n\n")[0]
    flags = {name: kind for kind, name in _FLAG.findall(source)} | _OF_ALL
    if "config=True" not in source:
        return flags, []
    keys = _KEY.findall((PROGRAM / "configs" / "default.py").read_text(encoding="utf-8"))
    flags |= {f"config.{key}": "bool" if value in ("True", "False") else "" for key, value in keys}
    return flags | {"config": "string"}, [key for key, _ in keys]


def check_words(command: str, words: Sequence[str], commands: Sequence[str]) -> None:
    """Raises UserError if the command is none of `commands`, or if a flag in `words` is none of its flags or keys."""
    if command not in commands:
        near = hint(command, commands) or ";"
        raise UserError(f"{command}: unknown command{near} use one of {', '.join(commands)}")
    flags, keys = flags_of(command)
    rest = iter(words)
    for word in rest:
        if word == "--":
            return
        if not word.startswith("--"):
            continue
        name, equals, _ = word[2:].partition("=")
        kind = flags.get(name) or flags.get(name.removeprefix("no"))
        if name in flags:
            if kind != "bool" and not equals:
                next(rest, None)  # the value
        elif name.startswith("no") and kind == "bool":
            continue
        elif name.removeprefix("no").startswith("config.") and keys:
            key = name.partition(".")[2]
            raise UserError(f"config.{key}: unknown key{hint(key, keys)}")
        elif (key := _ALSO_CALLED.get(name, name)) in keys:
            raise UserError(f"--{name}: unknown flag; did you mean --config.{key}?")
        else:
            raise UserError(f"--{name}: unknown flag{hint(name, [*flags])}")


def load(command: str) -> ModuleType:
    """The command's module, imported. Raises UserError if a package is not installed."""
    gc.disable()  # nearly all objects that imports make are kept: looking for others took a quarter of the time
    try:
        return importlib.import_module(f"commands.{command}")
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if (PROGRAM / package).exists() or (PROGRAM / f"{package}.py").exists():
            raise
        raise UserError(
            f"{package}: not installed for {sys.executable}; activate the environment that has it (source "
            ".venv/bin/activate), or pip install -r requirements.txt"
        ) from error
    finally:
        gc.freeze()
        gc.enable()
