"""Train, evaluate and sample a Transformer language model.

python main.py [train] --config=configs/shakespeare.py [--config.KEY=VALUE ...]
python main.py COMMAND --help
"""

import sys
from pathlib import Path

if __package__ or sys.flags.safe_path:  # installed, or `python -P`: the folder of the modules has to be on the path
    sys.path.insert(0, str(Path(__file__).parent))

from runtime.errors import ExpectedError, Interrupted
from runtime.malloc import restart_with_large_pages
from runtime.processes import runs_one_command

COMMANDS = {
    "train": "train a model, or go on where the run stopped",
    "sample": "write text with a trained model",
    "eval": "exact loss over a whole split, or any text",
    "verify": "check every checkpoint of a run",
    "serve": "a page to try a model on, and the endpoints of OpenAI's clients",
    "report": "one page on a run: curves, samples, config, what the sinks do",
    "sinks": "what the heads of any model attend to, and its largest activations",
    "compare": "runs side by side: what differs, losses, costs, curves",
    "sweep": "train a grid of configs and seeds, then compare them",
    "config": "every key of a config, its value and its meaning",
    "export": "write a trained model for other programs",
    "import": "make a run of another program's model",
    "plan": "what a config takes on a mesh of devices: memory and traffic",
    "prepare": "tokenise a corpus into shards on disk",
    "tokenizer": "learn a tokenizer from a corpus",
}


def _parted(argv: list[str]) -> tuple[str, list[str]]:
    """The command, and its flags."""
    return (argv[0], argv[1:]) if argv and not argv[0].startswith("-") else ("train", argv)


def main(argv: list[str]) -> int:
    """Run one command and return its exit status; `argv` is without the program's name."""
    from commands.typos import check_words, load
    from runtime.files import expected_error
    from runtime.screen.console import Console

    if argv[:1] in (["--help"], ["-h"], ["help"]):
        Console().line("\n".join([__doc__.strip(), *(f"  {name:<10}{text}" for name, text in COMMANDS.items())]))
        return 0
    command, flags = _parted(argv)
    try:
        check_words(command, flags, list(COMMANDS))
        with Console(silent="--process_id" in " ".join(flags)).busy("loading JAX"):
            module = load(command)
        module.main(flags)
    except Interrupted as signal:
        return 128 + signal.signum
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        expected = None
        if isinstance(error, ExpectedError):
            expected = error
        elif isinstance(error, OSError):
            expected = expected_error(error)
        elif (devices := sys.modules.get("runtime.devices")) and devices.lacks_memory(error):
            advice = "let other programs end, or take a device with more of it"
            expected = ExpectedError(f"{command}: out of memory; {advice}")
        if expected is None or "--debug" in flags:
            raise
        Console().print_error(expected)
        return expected.status
    return 0


def run() -> int:
    """Runs the command of the process, with large memory pages if possible; returns its exit status."""
    if _parted(sys.argv[1:])[0] in ("train", "sample", "eval") and not {"--help", "-h"} & {*sys.argv}:
        restart_with_large_pages()
    runs_one_command()
    return main(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(run())
