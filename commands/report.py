"""Write a run's report.html: curves, samples, config, and what its heads attend to."""

from pathlib import Path

from absl import flags

import run_lib
from commands.flags import define_checkpoint, parse_flags
from corpus.tokenizer import UnknownCharacters
from reports import run_page
from runtime import devices, programs
from runtime.errors import NoCheckpointError, UserError
from runtime.screen.console import Console


def _define(values: flags.FlagValues) -> None:
    define_checkpoint(values)
    flags.DEFINE_string("text", None, "Whose attention is shown; default the last sample's.", values)


def main(argv: list[str]) -> None:
    values = parse_flags("report", __doc__, argv, _define)
    workdir, console = Path(values.workdir), Console()
    programs.set_up_compile_cache(console.warn)
    devices.start_jax()
    try:
        model, tokenizer, _, meta = run_lib.load_model(workdir, values.step, console.warn, values.weights)
        which = f"checkpoint {meta['step']}"
    except NoCheckpointError as error:
        if values.step is not None:
            raise
        model, tokenizer, which = str(error), run_lib.load_tokenizer(workdir), ""
    try:
        path = run_page.write_report(workdir, model, tokenizer, which, console.warn, values.text)
    except UnknownCharacters as error:
        raise UserError(f"--text: {error}; leave them out") from error
    console.line(f"wrote {path}")
