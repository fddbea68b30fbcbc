"""The command line: flags, `--config`, and the messages for wrong ones."""

import contextlib
import os
import re
import signal
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType

from absl import flags
from ml_collections import ConfigDict, config_flags

from configs import default
from runtime.errors import Interrupted, UserError, one_line
from runtime.files import PROGRAM
from runtime.screen.console import Console
from runtime.screen.text import nearest
from runtime.workdir import WEIGHTS

DEFAULT_CONFIG = "configs/shakespeare.py"  # beside main.py
DEFAULT_WORKDIR = "runs/shakespeare"
_CONFIG_SECONDS = 60.0  # how long a config file may run
_CONFIG = re.compile(r"(?<=\0)(--?config[=\0])([^\0]*)")  # --config=PATH, or the two words, among words that \0 parts
config_flags.register_flag_parser_for_type(object, flags.ArgumentParser())  # for a key that takes words and switches


def parse_flags(
    command: str,
    about: str,
    argv: Sequence[str],
    define: Callable[[flags.FlagValues], None],
    config: bool = False,
    words: list[str] | None = None,
) -> flags.FlagValues:
    """Parses a command's flags, which `define` adds, and `config` those of its config; `--help` prints them and exits.

    `argv` starts after the command's name. `words`, if given, is the list for words that are no flags.
    Raises UserError for an unknown flag or key, a wrong type of value, a word that is no flag, a broken config file.
    """
    values = flags.FlagValues()
    values.set_gnu_getopt(words is not None)  # flags may stand after words
    flags.DEFINE_bool("debug", False, "Show the traceback of an expected error too.", values)
    flags.DEFINE_bool("help", False, "Show this.", values, short_name="h")
    define(values)
    if config:
        argv = _with_config(argv)
        config_flags.DEFINE_config_file("config", None, "The config file.", flag_values=values, sys_argv=argv)
    try:
        with _in_time():
            rest = values(["main.py", *argv])[1:]
            if config:
                len(values.config)  # a config file that cannot be loaded raises only when it is read
    except Interrupted:
        raise
    except flags.UnrecognizedFlagError as error:
        raise UserError(f"--{error.flagname}: unknown flag{nearest(error.flagname, list(values))}") from error
    except (Exception, SystemExit, KeyboardInterrupt) as error:  # a wrong value, or whatever the config file raises
        raise UserError(_explain_value(argv, error)) from error
    for name in {*values} & {"workdir", "out", "from"}:  # a shell leaves ~ after = as it is
        if values[name].value:
            values[name].value = os.path.expanduser(values[name].value)
    if values.help:
        _print_help(command, about, values, config)
        sys.exit(0)
    if words is not None:
        words.extend(rest)
    elif rest:
        raise UserError(f"{rest[0]}: not a flag; flags look like --name=value, and the command comes first")
    return values


def define_checkpoint(values: flags.FlagValues) -> None:
    """The flags of a command that reads the weights of a run."""
    flags.DEFINE_string("workdir", DEFAULT_WORKDIR, "The run's directory.", values)
    flags.DEFINE_integer("step", None, "The checkpoint's number; default the best one.", flag_values=values)
    flags.DEFINE_enum("weights", WEIGHTS[0], WEIGHTS, "auto: their average, if kept.", values)


@contextlib.contextmanager
def _in_time() -> Iterator[None]:
    """Limits the time of what runs inside, and lets Ctrl-C end it: a config file is a program, which may loop."""

    def stop(signum: int, _frame: FrameType | None) -> None:
        if signum == signal.SIGINT:
            raise Interrupted(signum)
        raise RuntimeError(f"not done after {_CONFIG_SECONDS:g} s; does it loop?")

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    heard = [signal.SIGALRM] + [signal.SIGINT] * (signal.getsignal(signal.SIGINT) == signal.default_int_handler)
    before = {signum: signal.signal(signum, stop) for signum in heard}
    signal.setitimer(signal.ITIMER_REAL, _CONFIG_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _print_help(command: str, about: str, values: flags.FlagValues, config: bool) -> None:
    """What a command is for, and its flags with their defaults, on a screen of 80 columns."""
    from config_lib import key_docs, written  # which loads JAX, and `prepare` needs none

    say = Console().line
    own = [values[name] for name in sorted(set(values) - {"h", "help", "config"})]
    shown = lambda flag: f"={written(flag.default)}" if type(flag.default) in (str, int, float) else ""
    told = [(f"--{flag.name}{shown(flag)}", flag.help.split(";\n")[0]) for flag in own]  # absl appends its own text
    if config:
        told += [("--config=FILE", f"The config; default {DEFAULT_CONFIG}."), ("--config.KEY=VALUE", "Change a key:")]
        docs = map(key_docs().__getitem__, default.MOST_USED)
        told += [(f"  {doc.key}={written(doc.default)}", doc.comment) for doc in docs]
    say(f"{textwrap.fill(about, 80)}\n\n    python main.py {command} [--FLAG=VALUE ...]\n")
    for name, text in told:
        if name.startswith(" "):  # a key: one line, so that all fit on the screen
            text = textwrap.shorten(text, 49, placeholder=" ...")
        indent = f"  {name:<26} " if len(name) <= 26 else f"  {name}\n{'':29}"
        say(textwrap.fill(text, 80, initial_indent=indent, subsequent_indent=" " * 29))
    if config:
        say("\nDefaults are those of configs/default.py; `main.py config` shows every key.")


def _config_path(argv: Sequence[str]) -> str | None:
    """The path in the last --config=PATH or --config PATH."""
    found = _CONFIG.findall("\0".join(["", *argv]))
    return found[-1][1] if found else None


def _with_config(argv: Sequence[str]) -> list[str]:
    """`argv` with the last --config replaced by an existing file: the path itself, or else one beside main.py.

    There `configs/shakespeare.py`, `shakespeare.py` and `shakespeare` mean the same. Without --config: the default.
    """
    named = _config_path(argv)
    path, *argument = (named or DEFAULT_CONFIG).split(":", 1)
    beside = [PROGRAM / folder / f"{path}{ending}" for folder in ("", "configs") for ending in ("", ".py")]
    found = next((str(place) for place in (Path(path), *beside) if place.is_file()), path)
    if named is None:
        return [f"--config={found}", *argv]
    return _renamed(argv, ":".join([found, *argument]))


def _renamed(argv: Sequence[str], new: str) -> list[str]:
    """`argv` with another text in each --config, of which the last one counts."""
    return _CONFIG.sub(lambda found: found[1] + new, "\0".join(["", *argv])).split("\0")[1:]


def each_argument(argv: Sequence[str]) -> list[tuple[dict[str, str], list[str]]]:
    """For each text of --config=FILE.py:TEXT,TEXT: {FILE: text}, and `argv` with it alone; else {}, and `argv`.

    Texts that hold commas are parted by semicolons; what names a path is one text.
    """
    named = _config_path(argv) or ""
    file, _, listed = named.partition(":")
    texts = listed.split(";" if ";" in listed else ",")
    if len(texts) == 1 or os.path.exists(listed):  # a list too long for a name is no error
        return [({}, list(argv))]
    return [({Path(file).stem: text}, _renamed(argv, f"{file}:{text}")) for text in texts]


def _explain_value(argv: Sequence[str], error: BaseException) -> str:
    """One line for a value that did not parse: it names the key and its type; the library's text names flags."""
    known = default.get_config()
    given = str(error).removesuffix(f": {error.__context__}")
    if (wrong := re.fullmatch(r"flag --config\.(\w+)=(.*)", given, re.DOTALL)) and wrong[1] in known:
        from config_lib import type_name

        usual = known[wrong[1]]
        return f"config.{wrong[1]}: expected {type_name(type(usual))}, got {wrong[2]!r}; the default is {usual!r}"
    path = _config_path(argv)
    if path is None or (isinstance(error, flags.Error) and "config file" not in str(error)):
        return one_line(error).removeprefix("flag ")
    while error.__context__ and "config file" in str(error):  # the library wraps what the file raised
        error = error.__context__
    if isinstance(error, UserError):
        return str(error)
    if not Path(path.split(":")[0]).is_file():
        return f"--config={path}: no such file; see configs/"
    return f"--config={path}: {type(error).__name__}: {one_line(error)}"


@contextlib.contextmanager
def spoken_in_flags() -> Iterator[None]:
    """Renames config keys in errors to the flags of the same name, for commands that have these keys as flags."""
    try:
        yield
    except UserError as error:
        keys = "dataset|tokenizer|unknown_characters|text_column|skip_bad_rows"
        raise UserError(re.sub(rf"\bconfig\.({keys})", r"--\1", str(error))) from error


def default_workdir(argv: Sequence[str], config: ConfigDict) -> Path:
    """runs/<run>, or runs/<name of the config file>."""
    return Path("runs") / (config.run or Path((_config_path(argv) or DEFAULT_CONFIG).split(":")[0]).stem)
