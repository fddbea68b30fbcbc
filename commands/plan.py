"""What a config takes on a mesh of devices that need not be here: memory, traffic, time. Nothing is trained.

The step is compiled for so many simulated devices, from shapes alone; speeds come from a table of data sheets.
`--hardware=here` measures this machine instead, and `--check_steps` runs the step on it.
"""

import dataclasses
import math
import textwrap

from absl import flags
from ml_collections import ConfigDict

import config_lib
import run_lib
from commands.flags import parse_flags
from commands.planning.hardware import ATTAINED, TABLE, Hardware, measure_here
from commands.planning.predict import Planned, forecast, plan_step, run_steps
from commands.planning.traffic import axes_of_group
from runtime import devices
from runtime.errors import UserError
from runtime.screen.console import Console
from runtime.screen.text import duration, human
from training.cost import parameter_counts
from transformer.sharding import make_mesh, parse_mesh

HERE = "here"
RULES = (
    "exact: from shapes. counted: PaLM's convention. rule: training/cost.py, within -16 % and +30 % of compiled CPU "
    "steps. compiled: for simulated CPU devices, where what is bfloat16 may travel as float32 and attention is chunked."
)
ASSUMED = (
    f"{RULES} Assumed: the share of peak that a device reaches, {ATTAINED:.0%} of a link's speed, 5 us a collective "
    "and each doubling of its devices, float32 products at half the rate of the others, nodes of 8 in the order of the "
    "mesh, each device with a network card of its own."
)
MEASURED = f"{RULES} Measured: products, copies and sums of this model's sizes, alone, on all devices."
VOCABULARIES = {  # size and end-of-text token, so that nothing need be fetched
    "byte": (256, None),
    "gpt2": (50_257, 50_256),
    "cl100k_base": (100_277, 100_257),
    "o200k_base": (200_019, 199_999),
}


def _define(values: flags.FlagValues) -> None:
    flags.DEFINE_enum(
        "hardware", "H100", [*TABLE, HERE], "The devices; here: this machine, measured.", flag_values=values
    )
    flags.DEFINE_integer("devices", 0, "How many, where config.mesh leaves it open; 0: one.", flag_values=values)
    flags.DEFINE_float("efficiency", 0.0, "Share of peak FLOP/s a device reaches; 0: 0.4.", flag_values=values)
    flags.DEFINE_float("tokens", 0.0, "Budget, for the days; 0: the config's max_steps.", flag_values=values)
    flags.DEFINE_integer("check_steps", 0, "With --hardware=here: run so many steps too.", flag_values=values)


def main(argv: list[str]) -> None:
    values = parse_flags("plan", __doc__, argv, _define, config=True)
    config, here, console = values.config, values.hardware == HERE, Console()
    config_lib.check(config)
    if values.check_steps and not here:
        raise UserError("--check_steps: can run only on this machine; add --hardware=here")
    if not 0 <= values.efficiency <= 1 or values.tokens < 0 or values.devices < 0 or values.check_steps < 0:
        raise UserError("--efficiency, --tokens, --devices, --check_steps: must not be negative, the first at most 1")
    if here:
        devices.set_up_cpu_devices(config.cpu_devices, config.batch_size, console.warn)
    else:
        devices.simulate_cpu_devices(num_devices(config, values.devices))
        if config.dtype == "auto":
            config.dtype = "bfloat16"
    devices.set_up_compile_cache()
    config_lib.check_devices(config, len(devices.wake_up()))
    mesh = make_mesh(config.mesh)
    vocab_size, eot = vocabulary(config, console)
    planned = plan_step(config, vocab_size, eot, mesh)
    if here:
        tokens = config.batch_size * config.context_len // planned.mesh.size
        state = planned.memory["parameters"]
        hardware = measure_here(planned.mesh, tokens, config.embedding_dim, config.mlp_dim, state)
    else:
        hardware = TABLE[values.hardware]
    try:
        report(planned, hardware, values.efficiency, values.tokens, console)
        if values.check_steps:
            check(planned, hardware, values.check_steps, console)
    except ValueError as error:
        raise UserError(f"config.{error}; take another --hardware") from error


def num_devices(config: ConfigDict, asked: int) -> int:
    """How many devices the mesh is of: as many as it names, or as were asked for."""
    sizes = parse_mesh(config.mesh).values()
    return asked or (1 if -1 in sizes else math.prod(sizes))


def vocabulary(config: ConfigDict, console: Console) -> tuple[int, int | None]:
    """The vocabulary's size and end-of-text token, from the data where the tokenizer's name does not say."""
    if config.tokenizer in VOCABULARIES:
        return VOCABULARIES[config.tokenizer]
    tokenizer = run_lib.load_data(config, console.line).tokenizer
    return tokenizer.vocab_size, tokenizer.eot


def report(planned: Planned, hardware: Hardware, efficiency: float, budget: float, console: Console) -> None:
    """Print the plan; each figure with where it comes from."""
    config, mesh, n = planned.config, planned.mesh, planned.mesh.size
    shape = ", ".join(f"{axis}={size}" for axis, size in mesh.shape.items() if size > 1) or "one device"
    parameters = sum(parameter_counts(planned.model).values())
    row = lambda name, text, source: console.line(f"{name:<14}{text:<52}  {source}")
    source = "measured" if hardware.measured else "data sheet"
    row("model", f"{human(parameters)} parameters, {config.dtype}", "exact")
    row("mesh", f"{n:,} x {hardware.name}: {shape}", "")
    row("step", f"{human(planned.tokens)} tokens, {human(planned.flops)} FLOPs in the model", "counted")
    console.line("")
    console.line("memory on each device")
    for name, size in planned.memory.items():
        row(f"  {name}", f"{size / 1e6:12,.3f} MB", "exact" if name in ("parameters", "optimizer") else "rule")
    total = sum(planned.memory.values())
    verdict = "fits" if total < 0.9 * hardware.memory else "does NOT fit"
    row("  together", f"{total / 1e6:12,.3f} MB of {hardware.memory / 1e6:,.0f}: {verdict}", f"rule; {source}")
    row("  compiler", f"{planned.compiled_bytes / 1e6:12,.3f} MB", "compiled, for a CPU")
    console.line("")
    console.line("sent by each device, a step")
    for c in planned.traffic:
        where = axes_of_group(c.group, dict(mesh.shape))
        times = c.count * config.accumulation_steps
        text = f"{c.sent * config.accumulation_steps / 1e6:12,.3f} MB in {times:,} among {len(c.group)} ({where})"
        row(f"  {c.op}", text, "compiled" + (", a loop counted once" if c.in_open_loop else ""))
    if not planned.traffic:
        row("  nothing", "", "compiled")
    console.line("")
    if efficiency:
        hardware = dataclasses.replace(hardware, efficiency=efficiency)
    seconds = forecast(planned, hardware)
    console.line("time of a step")
    assumed = "measured" if hardware.measured else f"assumed: {hardware.efficiency:.0%} of peak"
    row("  model", f"{seconds.model * 1000:12,.2f} ms", assumed)
    row("  optimizer", f"{seconds.optimizer * 1000:12,.2f} ms", assumed)
    row("  traffic", f"{seconds.traffic * 1000:12,.2f} ms", f"{source} x traffic")
    tokens = budget or config.max_steps * planned.tokens
    for name, step in (("  all hidden", seconds.hidden), ("  none hidden", seconds.exposed)):
        mfu = planned.flops / (step * n * hardware.flops)
        text = f"{step * 1000:12,.2f} ms, MFU {mfu:.1%}, {human(planned.tokens / step)} tokens/s"
        row(name, text, "")
        if tokens:
            row("", f"{human(tokens)} tokens in {duration(tokens / planned.tokens * step)}", "")
    console.line("")
    for line in textwrap.wrap(MEASURED if hardware.measured else ASSUMED, 100):
        console.line(line)


def check(planned: Planned, hardware: Hardware, steps: int, console: Console) -> None:
    """Run the step here, and print what was predicted beside it."""
    seconds, grown = run_steps(planned, steps)
    expected = forecast(planned, hardware).exposed
    console.line("")
    console.line(
        f"checked       {seconds * 1000:,.2f} ms a step (median of {steps}); predicted {expected * 1000:,.2f} ms, "
        f"{expected / seconds - 1:+.0%}"
    )
    if grown is not None:
        together = sum(planned.memory.values()) * planned.mesh.size
        console.line(
            f"              grew by {grown / 1e6:,.1f} MB; rule {together / 1e6:,.1f} MB, {together / grown - 1:+.0%}; "
            f"compiler {planned.compiled_bytes * planned.mesh.size / 1e6:,.1f} MB"
        )
