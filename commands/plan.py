"""What a config takes on a mesh of devices that need not be here: memory and traffic. Nothing is trained.

The step is compiled for simulated devices, from shapes alone. The time of a run follows from `--mfu`, which is assumed.
"""

import math
import textwrap
from dataclasses import dataclass

import jax
from absl import flags
from jax.sharding import Mesh
from ml_collections import ConfigDict

import config_lib
import run_lib
from commands.flags import parse_flags
from runtime import devices
from runtime.errors import UserError
from runtime.screen.console import Console
from runtime.screen.text import duration, human
from training.cost import flops_per_token, held_bytes, parameter_counts, peak_flops
from training.micro_batch import compiled, program_bytes
from training.step import make_step
from training.traffic import Collective, axes_of_group, collectives
from transformer.config import TransformerConfig
from transformer.sharding import make_mesh, parse_mesh

MEMORY = {"A100": 80e9, "H100": 80e9, "H200": 141e9, "B200": 180e9}  # bytes of a device, from NVIDIA's data sheets
MOST_BLOCKS = 1000  # each is compiled; no published model has more
SOURCES = (
    "exact: from shapes. counted: PaLM's convention. rule: training/cost.py, within -16 % and +30 % of compiled CPU "
    "steps. compiled: for simulated CPU devices, where what is bfloat16 may travel as float32 and attention is chunked."
    " assumed: the share of the peak FLOP/s of the data sheet that the model's arithmetic reaches (MFU)."
)
VOCABULARIES = {  # size and end-of-text token, so that no file has to be downloaded
    "byte": (256, None),
    "gpt2": (50_257, 50_256),
    "cl100k_base": (100_277, 100_257),
    "o200k_base": (200_019, 199_999),
}


def _define(values: flags.FlagValues) -> None:
    flags.DEFINE_enum("hardware", "H100", [*MEMORY], "The devices.", flag_values=values)
    flags.DEFINE_integer("devices", 0, "How many, where config.mesh leaves it open; 0: one.", flag_values=values)
    flags.DEFINE_float("mfu", 0.4, "Share of the devices' peak FLOP/s to assume, for the days.", flag_values=values)
    flags.DEFINE_float("tokens", 0.0, "Budget, for the days; 0: the config's max_steps.", flag_values=values)


def main(argv: list[str]) -> None:
    values = parse_flags("plan", __doc__, argv, _define, config=True)
    config, console = values.config, Console()
    config_lib.check(config)
    config = config_lib.in_parts(config)
    if not 0 < values.mfu <= 1:
        raise UserError("--mfu: must be above 0 and at most 1")
    if values.tokens < 0 or values.devices < 0:
        raise UserError("--tokens, --devices: must not be negative")
    if config.num_blocks > MOST_BLOCKS:
        raise UserError(f"config.num_blocks: {config.num_blocks} would take hours to plan; use at most {MOST_BLOCKS}")
    devices.simulate_cpu_devices(num_devices(config, values.devices))
    if config.dtype == "auto":
        config.dtype = "bfloat16"
    devices.set_up_compile_cache(console.warn)
    config_lib.check_devices(config, len(devices.start_jax()))
    with console.busy("compiling the step"):
        mesh = make_mesh(config.mesh, devices=devices.start_jax())
        planned = plan_step(config, *vocabulary(config, console), mesh, MEMORY[values.hardware])
    report(planned, values.hardware, values.mfu, values.tokens, console)


def num_devices(config: ConfigDict, asked: int) -> int:
    """The number of devices: what the mesh names, or what was asked for."""
    sizes = parse_mesh(config.mesh).values()
    return asked or (1 if -1 in sizes else math.prod(sizes))


def vocabulary(config: ConfigDict, console: Console) -> tuple[int, int | None]:
    """The vocabulary's size and end-of-text token; from the data if the tokenizer's name does not determine them."""
    if config.tokenizer in VOCABULARIES:
        return VOCABULARIES[config.tokenizer]
    tokenizer = run_lib.load_data(config, console.line).tokenizer
    return tokenizer.vocab_size, tokenizer.eot


@dataclass(frozen=True)
class Planned:
    """A training step for a mesh, compiled and not run. Sizes are bytes on each device."""

    mesh: Mesh
    config: ConfigDict
    model: TransformerConfig
    memory: dict[str, int]  # parameters and optimizer exact, the rest by `training.cost.held_bytes`
    compiled_bytes: int  # arguments and temporary arrays, as the compiler for the simulated devices reports them
    traffic: list[Collective]

    @property
    def tokens(self) -> int:
        """Tokens of a real step."""
        return self.config.batch_size * self.config.context_len * self.config.accumulation_steps

    @property
    def flops(self) -> float:
        """FLOPs of the model in a real step, over all devices (PaLM's count, without what remat computes again)."""
        return flops_per_token(self.model) * self.tokens


def plan_step(config: ConfigDict, vocab_size: int, eot: int | None, mesh: Mesh, memory: float = math.inf) -> Planned:
    """The config's step for a mesh of devices of `memory` bytes; the dtype is the config's own, which names one."""
    key, model = jax.random.key(config.seed), config_lib.model_config_of(config, vocab_size, eot)
    if config.micro_batch:
        config = config_lib.in_largest_parts(config, model, mesh, key, memory)
    settings, spikes = config_lib.optimizer_config(config), (config.spike_sigmas, config.skip_spikes)
    step = make_step(settings, model, config.max_steps or 1000, key, mesh, *spikes)
    program = compiled(step, config.batch_size, config.context_len, mesh)
    return Planned(
        mesh=mesh,
        config=config,
        model=model,
        memory=held_bytes(settings, model, config.batch_size, step.state, mesh),
        compiled_bytes=program_bytes(program) or 0,
        traffic=collectives(program.as_text(), mesh.size),
    )


def report(planned: Planned, hardware: str, mfu: float, budget: float, console: Console) -> None:
    """Print the plan, and for each figure where it comes from."""
    config, mesh, n = planned.config, planned.mesh, planned.mesh.size
    shape = ", ".join(f"{axis}={size}" for axis, size in mesh.shape.items() if size > 1) or "one device"
    parameters = sum(parameter_counts(planned.model).values())
    row = lambda name, text, source: console.line(f"{name:<14}{text:<52}  {source}")
    row("model", f"{human(parameters)} parameters, {config.dtype}", "exact")
    row("mesh", f"{n:,} x {hardware}: {shape}", "")
    row("step", f"{human(planned.tokens)} tokens, {human(planned.flops)} FLOPs in the model", "counted")
    row("micro-batch", f"{config.batch_size:,} sequences, {config.accumulation_steps:,} a step", "")
    console.line("")
    console.line("memory on each device")
    for name, size in planned.memory.items():
        row(f"  {name}", f"{size / 1e6:12,.3f} MB", "exact" if name in ("parameters", "optimizer") else "rule")
    total = sum(planned.memory.values())
    memory = MEMORY[hardware]
    verdict = "fits" if total < 0.9 * memory else "does NOT fit"
    row("  together", f"{total / 1e6:12,.3f} MB of {memory / 1e6:,.0f}: {verdict}", "rule; data sheet")
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
    peak = peak_flops(hardware)
    assert peak is not None
    step = planned.flops / (mfu * n * peak)
    tokens = budget or config.max_steps * planned.tokens
    console.line(f"time at an MFU of {mfu:.0%}")
    row("  step", f"{step * 1000:12,.2f} ms, {human(planned.tokens / step)} tokens/s", "assumed")
    if tokens:
        row("  run", f"{human(tokens)} tokens in {duration(tokens / planned.tokens * step)}", "assumed")
    console.line("")
    for line in textwrap.wrap(SOURCES, 100):
        console.line(line)
