"""Write text with a trained model; without a prompt, on a terminal, one types prompts to it.

A run on conversations (config.chat) answers: a prompt is what a user says, and on a terminal it remembers the turns.
"""

import contextlib
import dataclasses
import io
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from absl import flags

import run_lib
from commands.flags import define_checkpoint, parse_flags
from corpus.chat import chat_tokens
from corpus.tokenizer import Tokenizer, UnknownCharacters, until
from runtime import devices, programs
from runtime.errors import UserError, one_line
from runtime.files import new_file, parse_json, read_file, user_state
from runtime.screen.console import Console
from runtime.screen.text import printable
from transformer.model import Transformer
from transformer.sampling import Prompt, Sampling, prompt_tokens, stream


def _define(values: flags.FlagValues) -> None:
    default = Sampling()
    define_checkpoint(values)
    flags.DEFINE_string("prompt", None, "What the text goes on from; default: typed, or else standard input.", values)
    lines = 'A file with a prompt on each line; a .jsonl has objects with a "prompt".'
    flags.DEFINE_string("prompts", None, lines, values)
    flags.DEFINE_integer("num_tokens", 300, "How many tokens to write.", 0, None, values)
    flags.DEFINE_integer("num_samples", 1, "Texts for each prompt; each has the next seed.", 1, None, values)
    flags.DEFINE_multi_string("stop", [], "Ends a text before these words; may be given again.", values)
    flags.DEFINE_string("out", None, "A new file of JSON lines: prompt, text and seed.", values)
    flags.DEFINE_float("temperature", default.temperature, "0 is greedy.", flag_values=values)
    flags.DEFINE_integer("top_k", default.top_k, "Only the k most likely tokens; 0: all.", flag_values=values)
    flags.DEFINE_float("top_p", default.top_p, "Only the likeliest tokens up to this probability.", flag_values=values)
    flags.DEFINE_float("min_p", default.min_p, "Only tokens this likely, against the top one.", flag_values=values)
    flags.DEFINE_integer("seed", default.seed, "Another seed writes another text.", flag_values=values)
    flags.DEFINE_bool("replace_unknown", False, "Replace characters that the model lacks.", values)


def main(argv: list[str]) -> None:
    values = parse_flags("sample", __doc__, argv, _define)
    if "" in values.stop:
        raise UserError("--stop: must not be empty; leave it out to write on")
    if values.prompt is not None and values.prompts is not None:
        raise UserError("--prompts: names the prompts of a file; leave out that or --prompt")
    try:
        sampling = Sampling(values.temperature, values.top_k, values.top_p, values.min_p, values.seed)
    except ValueError as error:
        raise UserError(f"--{error}") from error
    programs.set_up_compile_cache(Console().warn)
    devices.start_jax()
    model, tokenizer, config, _ = run_lib.load_model(Path(values.workdir), values.step, Console().warn, values.weights)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a locale may lack what the model writes
    if values.prompts is not None:
        given = _read_prompts(Path(values.prompts))
    elif values.prompt is not None:
        given = {"--prompt": values.prompt}
    elif values.out is None and sys.stdin is not None and sys.stdin.isatty() and sys.stdout.isatty():
        say = lambda line: print(line, flush=True)
        how = sampling, values.num_tokens, say, write_text, values.replace_unknown, values.stop
        talk((Conversation if config.chat else Session)(model, tokenizer, *how))
        return
    else:
        given = {"standard input": _read_prompt() or tokenizer.opening}
    texts, room, long = [], model.config.context_len, []
    for name, prompt in given.items():
        try:
            if values.replace_unknown:
                prompt = tokenizer.decode(tokenizer.encode(prompt, replace_unknown=True))
            begin = run_lib.prompt_of(config, tokenizer, prompt)
            length = len(prompt_tokens(tokenizer, begin))
        except UnknownCharacters as error:
            raise UserError(f"{name}: {error}; leave them out, or give --replace_unknown") from error
        if length > room:
            long.append(f"the prompt has {length} tokens; the model reads the last {room}")
        seeds = [(sampling.seed + i) % 2**63 for i in range(values.num_samples)]
        texts += [(prompt, begin, dataclasses.replace(sampling, seed=seed)) for seed in seeds]
    if long:
        several = f"{len(long)} of {len(given)} prompts have more than {room} tokens; the model reads their last {room}"
        print(long[0] if len(given) == 1 else several, file=sys.stderr)
    go_on = lambda begin, how: until(stream(model, tokenizer, begin, values.num_tokens, how), values.stop)
    if values.out is not None:
        with new_file(Path(values.out), "--out") as file:
            for prompt, begin, how in texts:
                text = "".join(go_on(begin, how))
                file.write(json.dumps({"prompt": prompt, "text": text, "seed": how.seed}) + "\n")
        return
    try:
        for number, (prompt, begin, how) in enumerate(texts, start=1):
            if len(texts) > 1:
                write_text(f"--- {number} of {len(texts)}, seed {how.seed} ---\n")
            write_text("" if config.chat else prompt)
            for text in go_on(begin, how):
                write_text(text)
            write_text("\n")
    except BrokenPipeError:  # the reader has seen enough
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _read_prompts(path: Path) -> dict[str, str]:
    """The prompts of a file, by the names of their lines; empty lines and a byte order mark are left out.

    Raises UserError if the file cannot be read, is not UTF-8, has no prompt, or has a line of JSON without one.
    """
    try:
        lines = read_file(path).decode("utf-8-sig").replace("\r\n", "\n").split("\n")
    except (OSError, ValueError) as error:
        raise UserError(f"--prompts={path}: cannot be read ({one_line(error)}); name a file of text") from error
    found = {f"{path}: line {number}": line for number, line in enumerate(lines, start=1) if line.strip()}
    if path.suffix == ".jsonl":
        for name, line in found.items():
            try:
                found[name] = parse_json(line)["prompt"]
            except (ValueError, LookupError, TypeError):
                found[name] = None
            if not isinstance(found[name], str):
                raise UserError(f'{name}: is no JSON object with a "prompt"; write it so, or use a .txt')
    if not found:
        raise UserError(f"--prompts={path}: has no prompt; write one on each line")
    return found


def _read_prompt() -> str:
    """Standard input without a byte order mark and the last line break; "" on a terminal. UserError if not UTF-8."""
    if sys.stdin is None or sys.stdin.isatty():
        return ""
    try:
        text = sys.stdin.buffer.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"standard input: not UTF-8 at byte {error.start}; give text") from error
    return text.removesuffix("\n").removesuffix("\r")


# --- Talking: the model continues each line that is typed, and commands change the settings -----------------------

_HELP = """
  /temperature 0.7   0 is greedy              /top_k 20    only the 20 likeliest tokens; 0: all
  /top_p 0.9   the likeliest up to 90 %       /min_p 0.1   only those a tenth as likely as the top one
  /seed 1      of the next text; each text after it takes the next one
  /num_tokens 300                             without a number these show what is set
  /help        this                           /quit or Ctrl-D ends
Ctrl-C stops the text. A line that ends in \\ goes on in the next one; // stands for a / at the beginning."""


@dataclasses.dataclass
class Session:
    """The settings and the last text of somebody who types to a model."""

    GREETING = "type the beginning of a text; /help says more"
    HELP = f"Type the beginning of a text; the model goes on from it. An empty line goes on from the last text.{_HELP}"

    model: Transformer
    tokenizer: Tokenizer
    sampling: Sampling
    num_tokens: int
    say: Callable[[str], None]  # takes one line for the person
    write: Callable[[str], None]  # takes pieces of the model's text
    replace_unknown: bool = False  # whether characters that the model lacks are replaced, not refused
    stops: Sequence[str] = ()  # each text ends before the first of these
    _text = ""

    def answer(self, line: str) -> bool:
        """Executes a command or replies to the line; False if it ends the conversation."""
        if line.startswith("/") and not line.startswith("//"):
            return self._command(*line[1:].partition(" ")[::2])
        self._reply(line.removeprefix("/"))
        return True

    def _reply(self, text: str) -> None:
        """Goes on from the text, or without one from the last."""
        prompt, room = text or self._text, self.model.config.context_len
        try:
            if self.replace_unknown:
                prompt = self.tokenizer.decode(self.tokenizer.encode(prompt, replace_unknown=True))
            length = len(prompt_tokens(self.tokenizer, prompt))
        except UnknownCharacters as error:
            self.say(f"{error}; leave them out")
            return
        if length > room and text:
            self.say(f"the prompt has {length} tokens; the model reads the last {room}")
        self.write(prompt)
        self._text = prompt + self._say_on(prompt)

    def _say_on(self, prompt: Prompt) -> str:
        """What the model writes after a prompt, until Ctrl-C; the next text has the next seed."""
        new, came = "", []
        before = signal.signal(signal.SIGINT, lambda signum, _: came.append(signum))  # JAX may be compiling: no raise
        try:
            pieces = stream(self.model, self.tokenizer, prompt, self.num_tokens, self.sampling)
            for text in until(pieces, self.stops):
                if came:
                    break
                new += text
                self.write(text)
        finally:
            signal.signal(signal.SIGINT, before)
        self.write("\n")
        self.sampling = dataclasses.replace(self.sampling, seed=(self.sampling.seed + 1) % 2**32)
        return new

    def _command(self, name: str, value: str) -> bool:
        settings = dataclasses.asdict(self.sampling) | {"num_tokens": self.num_tokens}
        if name in ("quit", "exit", "q"):
            return False
        if name == "help":
            self.say(self.HELP)
        elif name not in settings:
            self.say(f"/{name}: unknown; /help says what there is, and // writes a / at the beginning of a text")
        elif not value.strip():
            self.say(f"{name} {settings[name]}")
        else:
            try:
                self._set(name, type(settings[name])(value))
            except ValueError as error:
                text = str(error)
                self.say(f"/{text}" if text.startswith(name) else f"/{name}: {value.strip()!r} is no such number")
        return True

    def _set(self, name: str, value: float) -> None:
        if name != "num_tokens":
            self.sampling = dataclasses.replace(self.sampling, **{name: value})
        elif value < 0:
            raise ValueError(f"num_tokens: must be at least 0, got {value}")
        else:
            self.num_tokens = int(value)


class Conversation(Session):
    """The same with a model that answers; it remembers what was said."""

    GREETING = "say something; /help says more"
    HELP = f"""Say something; the model answers, and remembers the turns that its context has room for.
  /new         forgets them                   /system TEXT  forgets them, and says what the model shall be{_HELP}"""
    _said: tuple[dict[str, str], ...] = ()

    def _command(self, name: str, value: str) -> bool:
        if name not in ("new", "system"):
            return super()._command(name, value)
        self._said = ({"role": "system", "content": value.strip()},) if value.strip() else ()
        return True

    def _reply(self, text: str) -> None:
        """Answers the text; nothing without one."""
        if not text:
            return
        context_len = self.model.config.context_len
        room = context_len - min(self.num_tokens, context_len // 2)
        first = [message for message in self._said[:1] if message["role"] == "system"]
        turns = [*self._said[len(first) :], {"role": "user", "content": text}]
        while len(prompt := chat_tokens(self.tokenizer, [*first, *turns])) > room and len(turns) > 1:
            del turns[:2]
        if len(prompt) > context_len:
            self.say(f"that makes {len(prompt)} tokens; the model reads the last {context_len}")
        self._said = (*first, *turns, {"role": "assistant", "content": self._say_on(prompt)})


def talk(person: Session) -> None:
    """Reads lines from the terminal until a command or Ctrl-D ends the conversation. Ctrl-C drops the line."""
    lines: list[str] = []
    with line_history():
        person.say(person.GREETING)
        while True:
            try:
                line = input("… " if lines else "> ")
            except EOFError:
                print()
                return
            except KeyboardInterrupt:
                lines = []
                print()
                continue
            except UnicodeDecodeError:
                person.say("what was typed is not UTF-8")
                continue
            lines.append(line.removesuffix("\\"))
            if not line.endswith("\\"):
                text, lines = "\n".join(lines), []
                if not person.answer(text):
                    return


@contextlib.contextmanager
def line_history() -> Iterator[None]:
    """Arrow keys edit a line and bring back earlier ones, also from earlier sessions, if Python has readline."""
    try:
        import readline

        path = user_state() / "history"
    except (ImportError, UserError):  # a Python that was built without it; without a home there is no history
        yield
        return
    readline.parse_and_bind("tab: self-insert")
    with contextlib.suppress(OSError):
        readline.read_history_file(path)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            readline.set_history_length(1000)
            readline.write_history_file(path)


def write_text(text: str) -> None:
    """A piece of a model's text to stdout, at once; a terminal gets no control characters but tabs and newlines."""
    sys.stdout.write(printable(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()
