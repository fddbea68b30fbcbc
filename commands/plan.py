"""What a config takes on a mesh of devices that need not be here: memory and traffic. Nothing is trained.

The step is compiled, from shapes alone: for simulated CPU devices, or with `--compile_for` by the compiler of TPUs or
GPUs that are not here. The time of a run follows from `--mfu`, which is assumed.
"""

import math
import textwrap
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags
from jax.sharding import Mesh, SingleDeviceSharding
from ml_collections import ConfigDict

import config_lib
import run_lib
from commands.flags import parse_flags
from corpus.load_text import new_tokenizer
from runtime import devices
from runtime.errors import UserError
from runtime.files import data_folder, write_json
from runtime.screen.console import Console
from runtime.screen.text import duration, human
from training.compilers import GPUS, devices_of, facts_of
from training.cost import flops_per_token, held_bytes, parameter_counts, peak_flops
from training.evaluate import Evaluator
from training.micro_batch import traced
from training.step import Step
from training.traffic import Collective, axes_of_group
from transformer import sampling
from transformer.config import TransformerConfig
from transformer.kernels.choose import choose, obstacle
from transformer.sharding import DATA, FSDP, is_data_parallel, parse_mesh
from transformer.xla import aimed_at, random_key, target_of

MEMORY = {**{name: gpu[5] for name, gpu in GPUS.items()}, "B200": 180e9}  # bytes of a device, by the data sheet
FREE = 0.75  # share of a GPU's memory that JAX takes, unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise
MOST_TRIES = 8  # of --fit
MOST_BLOCKS = 1000  # each is compiled; no published model has more
SOURCES = (
    "exact: from shapes. counted: PaLM's convention. rule: training/cost.py, within -13 % and +19 % of compiled "
    "steps. compiled: for {}; for CPUs, what is bfloat16 may travel as float32 and attention is chunked. assumed: the "
    "share of the peak FLOP/s of the data sheet that the model's arithmetic reaches (MFU)."
)
HELPS = "what helps (--fit tries it): smaller micro-batches, remat, loss_chunk, fsdp in the mesh"
HELPS_SAMPLES = "one device writes samples, with whole parameters: only a smaller model helps, or more memory"
VOCABULARIES = {  # size and end-of-text token, so that no file has to be downloaded
    "byte": (256, None),
    "gpt2": (50_257, 50_256),
    "cl100k_base": (100_277, 100_257),
    "o200k_base": (200_019, 199_999),
}


def _define(values: flags.FlagValues) -> None:
    flags.DEFINE_enum("hardware", None, [*MEMORY], "The devices; default H100.", values)
    where = "Compile for these: v5e:4x4 (a TPU slice), v5e:4x4*2 (two), H100:8, cpu:8."
    flags.DEFINE_string("compile_for", "", where, values)
    flags.DEFINE_bool("fit", False, "If it does not fit, find changes with which it does.", values)
    flags.DEFINE_string("out", "", "Write the plan to this file too, as JSON.", values)
    flags.DEFINE_integer("devices", 0, "How many, where config.mesh leaves it open; 0: one.", flag_values=values)
    flags.DEFINE_float("mfu", 0.4, "Share of the devices' peak FLOP/s to assume, for the days.", flag_values=values)
    flags.DEFINE_float("tokens", 0.0, "Budget, for the days; 0: the config's max_steps.", flag_values=values)


def main(argv: list[str]) -> None:
    values = parse_flags("plan", __doc__, argv, _define, config=True)
    config, console = values.config, Console()
    config_lib.check(config)
    asked = config.micro_batch
    config = config_lib.in_parts(config, config.batch_size if asked == "auto" and values.fit else None)
    if not 0 < values.mfu <= 1:
        raise UserError("--mfu: must be above 0 and at most 1")
    if values.tokens < 0 or values.devices < 0:
        raise UserError("--tokens, --devices: must not be negative")
    if config.num_blocks > MOST_BLOCKS:
        raise UserError(f"config.num_blocks: {config.num_blocks} would take hours to plan; use at most {MOST_BLOCKS}")
    out = Path(values.out)
    if values.out and (out.is_dir() or not out.parent.is_dir()):  # before minutes of compiling
        raise UserError(f"--out={out}: no file can be made there; name one in a directory that exists")
    if values.fit and not values.compile_for:
        raise UserError("--fit: needs --compile_for, whose compiler says what fits")
    if values.compile_for:
        if values.devices or values.hardware:
            raise UserError("--devices, --hardware: --compile_for names the devices; leave them out")
        there, memory = devices_of(values.compile_for)
        hardware = values.compile_for.partition(":")[0]
    else:
        named = math.prod(size for size in parse_mesh(config.mesh).values() if size > 0)  # what it leaves open is 1
        devices.simulate_cpu_devices(values.devices or named)
        there, hardware = devices.start_jax(), values.hardware or "H100"
        memory = MEMORY[hardware]
        config.dtype = "bfloat16" if config.dtype == "auto" else config.dtype
        if config.attention_kernel in ("splash", "cudnn"):
            console.line(f"attention_kernel={config.attention_kernel}: not on simulated devices, planned with auto")
            config.attention_kernel = "auto"
    memory *= FREE if hardware in MEMORY else 1  # all of them GPUs
    with aimed_at(target_of(there)), warnings.catch_warnings(action="ignore"):  # the report says why
        config_lib.check_devices(config, len(there))
        tokens = vocabulary(config, console)
        planned = _planned(config, tokens, there, memory, bool(values.compile_for), console)
        changes: dict[str, Any] = {}
        if values.fit and not fits(planned, memory):
            planned, changes = fitted(planned, tokens, there, memory, console)
        if asked and values.fit and (asked == "auto" or "batch_size" in changes):  # in words that one config may hold
            parts = {key: planned.config[key] for key in ("batch_size", "accumulation_steps")}
            changes = {"micro_batch": "", **changes, **parts}
        report(planned, hardware, memory, values.compile_for, values.mfu, values.tokens, console)
        if values.fit:
            found = "it fits with" if fits(planned, memory) else "it does not fit; the last that was tried:"
            console.line(f"{found} {_as_flags(changes) or 'no change'}")
        if values.out:
            compile_for = values.compile_for or f"cpu:{len(there)}"
            write_json(out, as_json(planned, compile_for, hardware, memory, changes))


def vocabulary(config: ConfigDict, console: Console) -> tuple[int, int | None]:
    """The vocabulary's size and end-of-text token; from the data if the tokenizer's name does not determine them."""
    if config.init_from and (Path(config.init_from).is_dir() or config.tokenizer not in VOCABULARIES):
        tokenizer = run_lib.load_tokenizer(Path(config.init_from))
    elif config.tokenizer in VOCABULARIES:
        return VOCABULARIES[config.tokenizer]
    elif config.tokenizer != "char":
        tokenizer = new_tokenizer(config.tokenizer, data_folder(config.data_dir), console.line)
    else:
        tokenizer = run_lib.load_data(config, console.line).tokenizer
    return tokenizer.vocab_size, tokenizer.eot


@dataclass(frozen=True)
class Planned:
    """A training step for a mesh, compiled and not run. Sizes are bytes on each device."""

    mesh: Mesh
    config: ConfigDict
    model: TransformerConfig
    memory: dict[str, int]  # parameters and optimizer exact, the rest by `training.cost.held_bytes`
    state_arrays: int  # of the training state, all of which should be donated
    matrices: int  # bytes of all of them in float32
    own_compiler: bool  # whether the programs, and those that evaluate and sample, are compiled for these very devices
    programs: dict[str, dict[str, Any]]  # what `facts_of` says of the step, and of the others if asked for

    @property
    def traffic(self) -> list[Collective]:
        """What a step sends."""
        return [Collective(**c | {"group": tuple(c["group"])}) for c in self.programs["step"].get("collectives", [])]

    @property
    def needed(self) -> int | None:
        """The most memory that a device needs, by its compiler, or without that by the rule."""
        if not self.own_compiler:
            return sum(self.memory.values())
        sizes = {name: p.get("peak_bytes") or p.get("needed_bytes") for name, p in self.programs.items()}
        return max((size + self.beside(name) for name, size in sizes.items() if size), default=None)

    def beside(self, program: str) -> int:
        """What a run holds besides while this program runs: the optimizer's state, and for samples the parameters.

        The first device alone writes samples, with whole parameters: where they are split, its parts of them stay. In
        half precision, decode reads rounded copies, and the float32 matrices stay beside them.
        """
        parts = 0 if is_data_parallel(self.mesh) else self.memory["parameters"]
        if program == "decode" and self.model.operand_dtype != "float32":
            parts += self.matrices
        return {"step": 0, "evaluation": self.memory["optimizer"]}.get(program, self.memory["optimizer"] + parts)

    @property
    def refused(self) -> str:
        """Why the compiler refuses a program, in its words, or ""."""
        return next((p["refused"] for p in self.programs.values() if "refused" in p), "")

    @property
    def tokens(self) -> int:
        """Tokens of a real step."""
        return self.config.batch_size * self.config.context_len * self.config.accumulation_steps

    @property
    def flops(self) -> float:
        """FLOPs of the model in a real step, over all devices (PaLM's count, without what remat computes again)."""
        return flops_per_token(self.model) * self.tokens


def plan_step(
    config: ConfigDict, vocab_size: int, eot: int | None, mesh: Mesh, memory: float = math.inf, others: bool = False
) -> Planned:
    """The config's step for a mesh of devices of `memory` bytes. `others`: also what evaluates and samples."""
    with aimed_at(target_of(mesh.devices.flat)):
        if config.micro_batch:
            model = config_lib.model_config_of(config, vocab_size, eot)
            config = run_lib.in_largest_parts(config, model, mesh, random_key(config.seed), memory)
        model, step, held = _built(config, vocab_size, eot, mesh)
        programs = {"step": facts_of(traced(step, config.batch_size, config.context_len, mesh), mesh.devices)}
        if others and "refused" not in programs["step"]:
            evaluation = Evaluator(model, mesh, config.batch_size).traced(step.state.params)
            first = mesh.devices.ravel()[:1]
            programs["evaluation"] = facts_of(evaluation, mesh.devices)
            for name, program in sampling.traced(model, step.state.params, SingleDeviceSharding(first[0])).items():
                programs[name] = facts_of(program, first)
        matrices = sum(4 * value.size for name, value in step.state.params.items() if name.endswith(".kernel"))
        return Planned(mesh, config, model, held, len(jax.tree.leaves(step.state)), matrices, others, programs)


def _built(
    config: ConfigDict, vocab_size: int, eot: int | None, mesh: Mesh
) -> tuple[TransformerConfig, Step, dict[str, int]]:
    model = config_lib.model_config_of(config, vocab_size, eot)
    settings = config_lib.optimizer_config(config)
    step = run_lib.step_to_compile(config, settings, model, mesh, random_key(config.seed))
    return model, step, held_bytes(settings, model, config.batch_size, step.state, mesh)


def smaller(config: ConfigDict, mesh: Mesh) -> Iterator[dict[str, Any]]:
    """Changes that lower the memory and not what is computed, each with those before it; the cheapest first."""
    changes: dict[str, Any] = {}
    if not 0 < config.loss_chunk <= 2048:
        yield (changes := changes | {"loss_chunk": 2048})
    if config.remat == "none":
        yield (changes := changes | {"remat": "dots"})
    rows, rounds, parts = config.batch_size, config.accumulation_steps, mesh.shape[DATA] * mesh.shape[FSDP]
    apart = len({getattr(device, "slice_index", 0) for device in mesh.devices.flat})
    for i in range(64):
        if i == 2 and config.remat != "block":
            yield (changes := changes | {"remat": "block"})
        # Between slices the network is slow: only data goes across.
        if i == 3 and mesh.shape[DATA] > apart:
            sizes = {**mesh.shape, DATA: apart, FSDP: parts // apart}
            yield (changes := changes | {"mesh": ",".join(f"{axis}={n}" for axis, n in sizes.items() if n > 1)})
        each = rows // parts
        if least := next((n for n in range(2, each + 1) if each % n == 0), 0):
            rows, rounds = rows // least, least * rounds
            yield (changes := changes | {"batch_size": rows, "accumulation_steps": rounds})


def _planned(
    config: ConfigDict, tokens: tuple[int, int | None], there: list, memory: float, whole: bool, console: Console
) -> Planned:
    with console.busy("compiling the step" + ", the evaluation, prefill and decode" * whole):
        return plan_step(config, *tokens, config_lib.mesh_of(config, there), memory, whole)


def fits(planned: Planned, memory: float) -> bool:
    """Whether it fits into the memory that JAX takes. A GPU's compiler refuses nothing."""
    return not planned.refused and (planned.needed or 0) <= memory


def fitted(
    first: Planned, tokens: tuple[int, int | None], there: list, memory: float, console: Console
) -> tuple[Planned, dict[str, Any]]:
    """The first of at most MOST_TRIES smaller plans that fits, or the last one tried, and its changes."""
    start, tries, planned, changes = time.monotonic(), 0, first, {}
    if any("refused" in first.programs.get(name, {}) for name in ("prefill", "decode")):
        return first, {}  # on one device, with whole parameters: none of the changes makes these smaller
    longest = sum(program["compile_seconds"] for program in first.programs.values())
    for candidate in smaller(first.config, first.mesh):
        config = first.config.copy_and_resolve_references()
        config.update(candidate)
        by_rule = _built(config, *tokens, config_lib.mesh_of(config, there))[2]
        share = sum(by_rule.values()) / sum(first.memory.values())
        if first.needed and share * first.needed > 1.5 * memory:
            continue  # hopeless, even if the rule is far off
        tries, began = tries + 1, time.monotonic()
        spent, left = duration(began - start), duration(longest * (MOST_TRIES - tries + 1))
        console.line(f"try {tries} of at most {MOST_TRIES}: {_as_flags(candidate)}; {spent} so far, about {left} left")
        try:
            planned, changes = _planned(config, tokens, there, memory, True, console), candidate
        except UserError as error:  # its compiler fails at this one
            console.line(f"  {error}")
        longest = max(longest, time.monotonic() - began)
        if fits(planned, memory) or tries == MOST_TRIES:
            break
    return planned, changes


def _as_flags(changes: dict[str, Any]) -> str:
    return " ".join(f"--config.{key}={value}" for key, value in changes.items())


def report(
    planned: Planned, hardware: str, memory: float, compile_for: str, mfu: float, budget: float, console: Console
) -> None:
    """Print the plan, and for each figure where it comes from. `compile_for` is "" for simulated devices."""
    config, mesh, n, step = planned.config, planned.mesh, planned.mesh.size, planned.programs["step"]
    shape = ", ".join(f"{axis}={size}" for axis, size in mesh.shape.items() if size > 1) or "one device"
    parameters = sum(parameter_counts(planned.model).values())
    row = lambda name, text, source="": console.line(f"{name:<14}{text:<52}  {source}".rstrip())
    row("model", f"{human(parameters)} parameters, {planned.model.dtype}", "exact")
    row("mesh", f"{n:,} x {hardware}: {shape}")
    row("step", f"{human(planned.tokens)} tokens, {human(planned.flops)} FLOPs in the model", "counted")
    row("micro-batch", f"{config.batch_size:,} sequences, {config.accumulation_steps:,} a step")
    console.line("\nmemory on each device")
    megabytes = lambda size: f"{size / 1e6:12,.3f} MB"
    for name, size in planned.memory.items():
        row(f"  {name}", megabytes(size), "exact" if name in ("parameters", "optimizer") else "rule")
    total = sum(planned.memory.values())
    if not compile_for:
        verdict = "fits" if fits(planned, memory) else "does NOT fit"
        source = f"rule; {FREE:.0%} of the data sheet"
        row("  together", f"{megabytes(total)} of {memory / 1e6:,.0f}: {verdict}", source)
        row("  compiler", megabytes(step["argument_bytes"] + step["temp_bytes"]), "compiled, for a CPU")
    else:
        row("  together", megabytes(total), "rule")
        _compiled_rows(planned, memory, row)
    console.line("\nsent by each device, a step")
    for c in planned.traffic:
        where = axes_of_group(c.group, dict(mesh.shape))
        times = 1 if c.in_branch else config.accumulation_steps
        among = f"among {len(c.group)} {'slices ' * c.between_slices}({where})"
        source = "compiled" + ", a loop counted once" * c.in_open_loop
        row(f"  {c.op}", f"{megabytes(c.sent * times)} in {c.count * times:,} {among}", source)
    if not planned.traffic:
        row("  nothing" if not planned.refused else "  unknown", "", "compiled")
    console.line("")
    kind = mesh.devices.flat[0].device_kind if compile_for else hardware
    if peak := peak_flops(kind):  # of a CPU none is known
        seconds = planned.flops / (mfu * n * peak)
        tokens = budget or config.max_steps * planned.tokens
        console.line(f"time at an MFU of {mfu:.0%}")
        row("  step", f"{seconds * 1000:12,.2f} ms, {human(planned.tokens / seconds)} tokens/s", "assumed")
        if tokens:
            row("  run", f"{human(tokens)} tokens in {duration(tokens / planned.tokens * seconds)}", "assumed")
        console.line("")
    console.line(textwrap.fill(SOURCES.format(compile_for or "simulated CPU devices"), 100))


def _compiled_rows(planned: Planned, memory: float, row: Callable) -> None:
    """What the compiler says, program by program."""
    for name, program in planned.programs.items():
        if "refused" in program:
            row(f"  {name}", f"does NOT fit: {program['refused']}")
            row("", HELPS if name in ("step", "evaluation") else HELPS_SAMPLES)
            continue
        need = program["peak_bytes"] + planned.beside(name)
        verdict = "fits" if need <= memory else "does NOT fit"
        if memory < need <= 0.95 / FREE * memory and planned.mesh.devices.flat[0].platform == "gpu":
            verdict = "fits with XLA_PYTHON_CLIENT_MEM_FRACTION=0.95"
        limit = f" of {memory / 1e6:,.0f}: {verdict}" if math.isfinite(memory) else ""
        source = "compiled" + "; with the state beside it" * (name != "step")
        row(f"  {name}", f"{need / 1e6:12,.3f} MB{limit}", source)
        sizes = ", ".join(f"{what} {program[f'{what}_bytes'] / 1e6:,.1f}" for what in ("argument", "output", "temp"))
        took = duration(program["compile_seconds"]) + ", at an earlier call" * program["kept"]
        row("", f"             {sizes} MB", f"compiled in {took}")
        if program["flops"]:
            own = f"{human(program['flops'])} FLOPs of a device" + ", of a micro-batch" * (name == "step")
            row("", f"             {own}", "compiled; a loop counted once")
        if program["cycles"] and name == "step":
            rounds = planned.config.accumulation_steps
            own = human(rounds * program["cycles"]["each"] + program["cycles"]["in_branch"])
            row("", f"             {own} cycles of a real step", "compiled; without kernels and what is sent")
        if name == "step":
            row("  donated", f"{program['donated']:,} of the state's {planned.state_arrays:,} arrays", "compiled")
    if (kernels := planned.programs["step"].get("kernels")) is not None:
        row("  kernels", ", ".join(f"{name} {count}" for name, count in kernels.items()) or "none", "compiled")
    row("  attention", _attention(planned))


def _attention(planned: Planned) -> str:
    """Which kernel attention uses, and why not the one made for these devices."""
    model = planned.model
    sizes = model.context_len, model.num_heads, model.num_kv_heads, model.head_dim, jnp.dtype(model.operand_dtype)
    documents = model.document_start >= 0
    chosen = choose(model.attention_kernel, *sizes, documents)
    best = {"tpu": "splash", "cuda": "cudnn"}.get(target_of(planned.mesh.devices.flat).platform, chosen)
    auto = model.attention_kernel == "auto"
    asked = f"auto takes {best} for bfloat16 alone" if auto else "config.attention_kernel asks for it"
    why = obstacle(best, *sizes, documents).rpartition(";")[0] or asked
    return chosen if chosen == best else f"{chosen}: {why}"


def as_json(
    planned: Planned, compile_for: str, hardware: str, memory: float, changes: dict[str, Any]
) -> dict[str, Any]:
    """The plan as plain values; sizes are bytes on each device, `memory_bytes` what JAX takes of it.

    `programs` are those of a micro-step; what stands `in_branch` is sent once in a real step.
    """
    return {
        "compile_for": compile_for,
        "hardware": hardware,
        "device_kind": planned.mesh.devices.flat[0].device_kind,
        "mesh": dict(planned.mesh.shape),
        "memory_bytes": memory if math.isfinite(memory) else None,
        "fits": fits(planned, memory),
        "changes": changes,
        "config": config_lib.to_dict(planned.config),
        "parameters": sum(parameter_counts(planned.model).values()),
        "tokens": planned.tokens,
        "flops": planned.flops,
        "by_rule": planned.memory,
        "attention": _attention(planned),
        "state_arrays": planned.state_arrays,
        "programs": planned.programs,
    }
