"""A training step on a CPU: here, and of the same model in PyTorch.

    python -m benchmarks.step
    python -m benchmarks.step --against=50f8da0 --shapes "4 x 128" "6 x 384"      # and an earlier build, in float32

All sides in GPT-2's exact settings, without sinks, with AdamW and gradients clipped at 1: this project; transformers'
GPT2LMHeadModel; the same under torch.compile; and each of them in half precision, here `dtype=bfloat16_matmul`, there
under bfloat16 autocast. Then our own recipe's step, with Muon and sinks, in rows of its own. Each side runs in a
process of its own, set up as its users do, and they take turns, a block of steps at a time, while the others sleep. The
machine's rate, that of a 1024³ float32 product, is measured in the same rounds; FLOPs are those of
`training.cost.flops_per_token`, whoever computes them. Every side gets memory in large pages where Linux gives them on
demand, as a run of `main.py` does; `GLIBC_TUNABLES= python -m benchmarks.step` compares without.
"""

import argparse
import statistics
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from benchmarks.harness import (
    RESULTS,
    TrainerStep,
    about,
    answer,
    build_of,
    matrix_rate,
    report,
    seconds_of_one,
    spread,
    wake_devices,
    workers,
)
from config_lib import model_config_of
from configs import nanogpt_char_cpu, shakespeare
from runtime.malloc import restart_with_large_pages
from training.cost import flops_per_token, parameter_counts

SHAPES = {  # blocks, width, heads, hidden width of the MLP, context, batch, vocabulary
    "4 x 128": (4, 128, 4, 512, 64, 12, 65),
    "6 x 384": (6, 384, 6, 1536, 256, 8, 65),
    "6 x 512": (6, 512, 8, 1024, 1024, 1, 50257),  # the PyTorch original's
}
KEYS = ("num_blocks", "embedding_dim", "num_heads", "mlp_dim", "context_len", "batch_size")
HALF = ", half precision"
SIDES = tuple(side + precision for precision in ("", HALF) for side in ("here", "torch eager", "torch compiled"))
EARLIER = "the earlier build"
RECIPE = "shakespeare.py"


def sizes_of(shape: str) -> tuple[int, ...]:
    """A name of SHAPES, or its seven numbers."""
    return SHAPES[shape] if shape in SHAPES else tuple(map(int, shape.split(",")))


def config_of(shape: str) -> tuple[ConfigDict, int]:
    """The config of a row, and the size of its vocabulary."""
    if shape == RECIPE:
        return shakespeare.get_config(), 65
    config, (*sizes, vocab_size) = nanogpt_char_cpu.get_config(), sizes_of(shape)
    config.update(dict(zip(KEYS, sizes, strict=True)))
    config.mlp = "gelu_tanh"
    config.norm_bias = config.qkv_bias = config.attention_out_bias = config.mlp_bias = True
    return config, vocab_size


def here(shape: str, half: bool) -> tuple[Callable[[int], None], int]:
    """A call that makes so many steps on a batch that stays, and the number of parameters."""
    config, vocab_size = config_of(shape)
    config.dtype = "bfloat16_matmul" if half else "float32"
    wake_devices(config)
    step = TrainerStep(config, vocab_size)
    batch = step.random_batch()
    return lambda steps: step.several([batch] * steps), sum(parameter_counts(step.model_config).values())


def in_torch(shape: str, compiled: bool, half: bool) -> tuple[Callable[[int], None], int]:
    """The same in PyTorch, as fast as it goes there: fused attention, fused AdamW (which beats foreach on a CPU)."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    c, vocab_size = config_of(shape)
    theirs = GPT2Config(
        **{"n_layer": c.num_blocks, "n_embd": c.embedding_dim, "n_head": c.num_heads, "n_inner": c.mlp_dim},
        **{"n_positions": c.context_len, "vocab_size": vocab_size, "bos_token_id": 0, "eos_token_id": 0},
        **{"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "use_cache": False},
        activation_function="gelu_pytorch_tanh",  # the function of "gelu_new" in one kernel
        attn_implementation="sdpa",
    )
    model = GPT2LMHeadModel(theirs).train()
    matrices, vectors = ([p for p in model.parameters() if (p.ndim == 2) is is_matrix] for is_matrix in (True, False))
    groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, c.lr, c.betas, c.eps, c.weight_decay, fused=True)
    batch = torch.randint(0, vocab_size, (c.batch_size, c.context_len + 1))

    def loss_of(batch: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            logits = model(batch[:, :-1]).logits
            return torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())

    loss_of = torch.compile(loss_of) if compiled else loss_of

    def several(steps: int) -> None:
        for _ in range(steps):
            optimizer.zero_grad(set_to_none=True)
            loss_of(batch).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), c.grad_clip)
            optimizer.step()

    return several, sum(p.numel() for p in model.parameters())


def work(side: str, shape: str) -> None:
    """The process of one side: asked for so many seconds of steps, it says how many one step took."""
    half = side.endswith(HALF)
    several, parameters = here(shape, half) if side.startswith("here") else in_torch(shape, "compiled" in side, half)
    several(3)
    answer(parameters, lambda block: seconds_of_one(several, float(block), least=2))


def measure(
    shape: str, sides: list[str], rounds: int, block: float, earlier: Path | None = None
) -> tuple[dict[str, list[float]], float]:
    """Seconds a step in each round by side (none where it did not start), and the machine's FLOP/s in these rounds.

    With the source of an `earlier` build its own benchmark's step is the side EARLIER.

    Raises:
      SystemExit: the sides differ in their number of parameters.
    """
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    rates = []
    commands = {side: ("benchmarks.step", f"--work={side}", "--shapes", shape) for side in sides}
    if earlier:
        commands[EARLIER], seconds[EARLIER] = ("benchmarks.step", "--work=here", "--shapes", shape), []
    with workers(commands, earlier and {EARLIER: earlier}) as made:
        started = {side: worker for side, worker in made.items() if worker.ready}
        if len(parameters := {worker.ready for worker in started.values()}) > 1:
            raise SystemExit(f"{shape}: the sides have {' and '.join(parameters)} parameters")
        for _ in range(rounds):
            rates.append(matrix_rate(rounds=5))
            for side, worker in started.items():
                seconds[side].append(float(worker.ask(block)))
    return seconds, statistics.median(rates)


def rows_of(shape: str, seconds: dict[str, list[float]], rate: float) -> list[dict[str, Any]]:
    config, vocab_size = config_of(shape)
    tokens = config.batch_size * config.context_len
    flops = flops_per_token(model_config_of(config, vocab_size)) * tokens
    theirs = [statistics.median(values) for side, values in seconds.items() if side.startswith("torch") and values]
    rows = []
    for side, values in seconds.items():
        row = {"model": about(config) + (f", {RECIPE}" if shape == RECIPE else ""), "side": side}
        cells = ("ms a step", "quartiles", "tokens/s", "of the matrix rate", "times as fast as the best torch")
        cells += (f"as {EARLIER}",) * (EARLIER in seconds)
        if not values:
            rows.append(row | dict.fromkeys(cells, "") | {"ms a step": "did not start"})
            continue
        ms = spread([1000 * value for value in values])
        second = ms["median"] / 1000
        ratio = f"{min(theirs) / second:.2f}" if side.startswith("here") and theirs else ""
        quartiles = f"{ms['low']:.3g} - {ms['high']:.3g}"
        measured = [ms["median"], quartiles, tokens / second, f"{flops / second / rate:.0%}", ratio]
        if EARLIER in seconds:
            before = seconds[EARLIER]
            measured.append(f"{statistics.median(before) / second:.2f}" if side.startswith("here") and before else "")
        rows.append(row | dict(zip(cells, measured, strict=True)))
    return rows


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=[*SHAPES, RECIPE], help="names, or seven numbers with commas")
    parser.add_argument("--sides", nargs="+", default=SIDES, choices=SIDES)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--block", type=float, default=0.5, help="seconds of steps of a side in a round")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--against", metavar="REVISION", help="an earlier build to measure beside, as git names it")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    flags = parser.parse_args(argv)
    jax.config.update("jax_platforms", "cpu")  # PyTorch stays there too
    if flags.work:
        return work(flags.work, flags.shapes[0])
    wake_devices(shakespeare.get_config())
    rows, rates = [], []
    with build_of(flags.against) if flags.against else nullcontext() as earlier:
        for shape in flags.shapes:
            sides = [side for side in flags.sides if side.startswith("here") or shape != RECIPE]
            seconds, rate = measure(shape, sides, flags.rounds, flags.block, earlier)
            rows += rows_of(shape, seconds, rate)
            rates.append(rate / 1e9)
    earlier = f"The earlier build is {flags.against}. " if flags.against else ""
    note = f"Matrix rate: {', '.join(f'{rate:.0f}' for rate in rates)} GFLOP/s beside the models in turn. "
    report("step", "A training step", rows, note + earlier + f"Medians of {flags.rounds} rounds.", flags.out)


if __name__ == "__main__":
    restart_with_large_pages()
    main()
