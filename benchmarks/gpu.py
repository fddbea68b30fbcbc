"""All that matters on a GPU, in one call of under nine minutes.

    python -m benchmarks.gpu --out=FOLDER

Runs on a bare machine that has jax, flax, optax, orbax and this tree: what else is imported can lie in a folder of
wheels (--wheels). Each part is a process of its own with a limit of time, its table printed and kept at once, so that
what fails or hangs takes nothing else with it. The first part compares the fast attention's output and gradients with
their definition in float32; where they differ, nothing is timed.

`--tiny` walks through the same parts with small sizes, on any device.
"""

import argparse
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
LIMITS = {
    "gradients": 60,
    "step": 150,
    "char": 100,
    "decode": 60,
    "enwik8": 150,
}  # seconds; together under nine minutes
ENWIK8_START = 45  # of these seconds: what start, compilation and evaluation take at most
BFLOAT16 = 2.0**-8  # the unit of its rounding
# Output, probabilities, the scores' gradient and the result are each rounded once, by half a unit at most; a factor of
# two is left for sums in another order.
ALLOWED = 4 * BFLOAT16


def attention_cases(tiny: bool) -> list[dict[str, Any]]:
    """Sizes at which the fast attention is compared: the models timed below, grouped heads, a window, an odd length."""
    if tiny:
        return [{"B": 2, "T": 300, "N": 6, "K": 3, "H": 8, "window": window} for window in (0, 70)]
    return [
        {"B": 2, "T": 1024, "N": 12, "K": 12, "H": 64, "window": 0},
        {"B": 3, "T": 256, "N": 6, "K": 6, "H": 64, "window": 0},
        {"B": 2, "T": 512, "N": 6, "K": 2, "H": 128, "window": 100},
    ]


def gradients(tiny: bool) -> tuple[str, list[dict[str, Any]], str]:
    """The fast attention in bfloat16 against its definition in float32, on the same numbers.

    Raises:
      SystemExit: a tensor differs by more than ALLOWED.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np

    from transformer.attention import attend, visible
    from transformer.kernels.choose import causal_attention, choose

    def definition(q_BTNH, k_BTKH, v_BTKH, sink_N, window):
        position_T = jnp.arange(q_BTNH.shape[1])
        return attend(q_BTNH, k_BTKH, v_BTKH, visible(position_T[None], position_T, window), sink_N)

    rows, wrong = [], []
    for case in attention_cases(tiny):
        B, T, N, K, H, window = case.values()
        rng = np.random.default_rng(T)
        qkv = [jnp.asarray(rng.normal(size=(B, T, heads, H)), jnp.bfloat16) for heads in (N, K, K)]
        dout = jnp.asarray(rng.normal(size=(B, T, N, H)), jnp.bfloat16)
        for sinks in (jnp.float32(np.linspace(-3, 3, N)), None):

            def run(form: Callable, dtype: str, sinks=sinks, qkv=qkv, dout=dout, window=window):
                out, pull_back = jax.vjp(lambda *x: form(*x, window), *(x.astype(dtype) for x in qkv), sinks)
                return out, *pull_back(dout.astype(dtype))

            have = jax.jit(partial(run, causal_attention, "bfloat16"))()
            with jax.default_matmul_precision("highest"):
                want = jax.jit(partial(run, definition, "float32"))()
            far = {
                name: float(jnp.linalg.norm(x.astype(jnp.float32) - y) / jnp.linalg.norm(y))
                for name, x, y in zip(("output", "dq", "dk", "dv", "dsink"), have, want, strict=True)
                if y is not None
            }
            wrong += [f"{name} {value:.2g}" for name, value in far.items() if not value <= ALLOWED]
            kernel = choose("auto", T, N, K, H, jnp.bfloat16)
            rows.append({**case, "sinks": sinks is not None, "kernel": kernel, "dsink": "", **far})
    if wrong:
        raise SystemExit(f"the fast attention is wrong (allowed {ALLOWED:.2g}): {', '.join(wrong)}; nothing is timed")
    return "Fast attention in bfloat16 against its definition, relative L2", rows, f"Allowed: {ALLOWED:.2g}."


def gpt2_124m(tiny: bool, **changes: Any):
    """GPT-2 124M's config, without sinks; and the vocabulary's size, made divisible by 128."""
    from configs import default

    config = default.get_config()
    wide = {"num_blocks": 2, "num_heads": 3, "embedding_dim": 48, "mlp_dim": 192, "context_len": 32, "batch_size": 4}
    full = {"num_blocks": 12, "num_heads": 12, "embedding_dim": 768, "mlp_dim": 3072, "context_len": 1024}
    config.update(wide if tiny else full | {"batch_size": 32, "loss_chunk": 8192})
    config.mlp, config.qkv_bias, config.attention_out_bias = "gelu_tanh", True, True
    config.attention_sink, config.use_muon, config.dtype, config.max_steps = False, False, "bfloat16", 1000
    config.update(changes)
    return config, 384 if tiny else 50304


def step(tiny: bool) -> tuple[str, list[dict[str, Any]], str]:
    """GPT-2 124M at context 1024: with and without sinks, and with Muon, in turns; and a matrix product's rate."""
    import jax

    from benchmarks.harness import TrainerStep, interleaved, matrix_rate, spread
    from training.cost import flops_per_token, peak_flops

    variants = {
        "no sinks": {},
        "sinks": {"attention_sink": True},
        "sinks, Muon": {"attention_sink": True, "use_muon": True},
    }
    rounds, steps = (2, 2) if tiny else (10, 5)
    made = {name: TrainerStep(*gpt2_124m(tiny, **changes)) for name, changes in variants.items()}
    batches = {name: one.random_batch() for name, one in made.items()}
    calls = {name: partial(one.several, [batches[name]] * steps) for name, one in made.items()}
    seconds = interleaved(calls, rounds, warmup=2)
    rate, peak = matrix_rate(256 if tiny else 8192, "bfloat16", rounds=10), peak_flops(jax.devices()[0].device_kind)
    rows = []
    for name, one in made.items():
        ms = spread([1000 * value / steps for value in seconds[name]])
        tokens_per_second = 1000 * one.tokens / ms["median"]
        flops = flops_per_token(one.model_config) * tokens_per_second / jax.device_count()
        longer = [a / b - 1 for a, b in zip(seconds[name], seconds["no sinks"], strict=True)]
        rows.append(
            {
                "GPT-2 124M": name,
                "ms a step": ms["median"],
                "quartiles": f"{ms['low']:.4g} - {ms['high']:.4g}",
                "tokens/s": tokens_per_second,
                "MFU of the peak": "unknown peak" if peak is None else f"{flops / peak:.1%}",
                "of an 8192³ product's rate": f"{flops * jax.device_count() / rate:.1%}",
                "longer than without sinks": f"{statistics.median(longer):+.1%}",
            }
        )
    config = made["sinks"].config
    note = f"Batch {config.batch_size} of {config.context_len}. The product's rate: {rate / 1e12:.4g} TFLOP/s."
    return "A training step in bfloat16", rows, note


def char(tiny: bool) -> tuple[str, list[dict[str, Any]], str]:
    """nanoGPT's 10.7M character model from the shell prompt to its validation loss of 1.4697."""
    from benchmarks.time_to_loss import run, summary

    small = {"num_blocks": 1, "embedding_dim": 48, "num_heads": 3, "mlp_dim": 96, "context_len": 32, "max_steps": 4}
    missing = None if tiny else absent("tiny_shakespeare")
    if missing:
        return "nanoGPT's character model to 1.4697", [{"config": "nanogpt_char.py", "outcome": missing}], ""
    keys = {"steps_per_dispatch": 10, "eval_every": 250, **({**small, "eval_tokens": 512} if tiny else {})}
    overrides = [f"--config.{key}={value}" for key, value in keys.items()] + data_dir()
    with tempfile.TemporaryDirectory() as folder:  # this process keeps off the GPU: main.py needs its memory
        result = run("configs/nanogpt_char.py", 0, Path(folder), overrides, LIMITS["char"] - 10)
    row = {"config": "nanogpt_char.py", "compile cache": "cold", **summary(result, 9.0 if tiny else 1.4697)}
    return "nanoGPT's character model to 1.4697", [row], f"Ended after {LIMITS['char'] - 10} s at the latest."


def absent(dataset: str) -> str:
    """Why a data set cannot be trained on: nothing is fetched here. "" when it lies in data/."""
    return "" if any((ROOT / "data").glob(f"{dataset}*")) else f"data/{dataset} is not there: not run"


def data_dir() -> list[str]:
    return [f"--config.data_dir={ROOT / 'data'}"]


def decode(tiny: bool) -> tuple[str, list[dict[str, Any]], str]:
    """Greedy decoding of GPT-2 124M's and the character model's shape, weights at random."""
    import jax
    import numpy as np

    from benchmarks.harness import interleaved, spread
    from config_lib import model_config_of
    from transformer.model import init_params, model_of
    from transformer.sampling import Sampling, generate_tokens

    rows, prompt, new = [], 16, 16 if tiny else 240
    small = {"num_blocks": 6, "num_heads": 6, "embedding_dim": 384, "mlp_dim": 1536}
    shapes: dict[str, tuple[dict[str, int], int]] = {"124M": ({}, 50304), "10.7M": (small, 65)}
    for name, (changes, vocab_size) in shapes.items():
        changes = {} if tiny else {**changes, "context_len": prompt + new}
        model_config = model_config_of(gpt2_124m(tiny, **changes)[0], vocab_size)
        model = model_of(model_config, jax.jit(partial(init_params, model_config))(jax.random.key(0)))
        for batch in (1, 16):
            prompts = list(np.random.default_rng(0).integers(0, model_config.vocab_size, (batch, prompt)))
            write = lambda model=model, prompts=prompts: list(
                generate_tokens(model, prompts, new, Sampling(temperature=0))
            )
            taken = spread(interleaved({"write": write}, rounds=5, warmup=1)["write"])
            rows.append({"model": name, "batch": batch, "new tokens": new, "tokens/s": batch * new / taken["median"]})
    return "Greedy decoding in bfloat16", rows, "Medians of 5 calls."


def enwik8(tiny: bool, seconds: float = LIMITS["enwik8"]) -> tuple[str, list[dict[str, Any]], str]:
    """As many steps of configs/enwik8.py, decayed to the end, as the time allows; the loss over the whole split."""
    from benchmarks.time_to_loss import run

    title = f"enwik8 in {seconds:.0f} seconds"
    missing = None if tiny else absent("enwik8")
    if missing:
        return title, [{"config": "enwik8.py", "outcome": missing}], ""
    keys: dict[str, Any] = {"eval_every": 10**6, "save_every": 10**6}
    if tiny:  # on a small text of its own
        sizes = {
            "num_blocks": 1,
            "embedding_dim": 48,
            "num_heads": 3,
            "mlp_dim": 96,
            "context_len": 32,
            "batch_size": 4,
        }
        keys |= {**sizes, "dataset": str(Path(__file__)), "eval_tokens": 512}
    overrides = lambda steps: [f"--config.{key}={value}" for key, value in (keys | {"max_steps": steps}).items()]
    with tempfile.TemporaryDirectory() as folder:
        start = time.monotonic()
        trial = run("configs/enwik8.py", 0, Path(folder), [*overrides(20 if tiny else 100), *data_dir()])
        one = min(row["step_seconds"] for row in trial["rows"] if row["step_seconds"])
        left = seconds - (time.monotonic() - start) - ENWIK8_START
        steps = 3 if tiny else max(1, round(left / one))
        result = run("configs/enwik8.py", 0, Path(folder), [*overrides(steps), *data_dir()])
    last = result["rows"][-1]
    row = {"config": "enwik8.py", "steps": last["step"], "val_loss": f"{last['val_loss']:.4f}"}
    row |= {"bits per byte": f"{last['bits_per_byte']:.4f}", "whole process (s)": result["seconds"]}
    return title, [row], f"A short trial before it measured {1000 * one:.3g} ms a step."


def run_alone(command: list[str], environment: dict[str, str], seconds: float) -> int:
    """The status of a command, ended after so many seconds with all that it started: those too hold a GPU's memory.

    Raises:
      subprocess.TimeoutExpired: it was ended.
    """
    process = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True)
    try:
        return process.wait(seconds)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


PARTS = {"gradients": gradients, "step": step, "char": char, "decode": decode, "enwik8": enwik8}


def unpack(wheels: Path, folder: Path) -> None:
    """Wheels are zip files of what an installation would copy."""
    for wheel in sorted(wheels.glob("*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="the folder of the JSON")
    parser.add_argument("--wheels", type=Path, help="a folder of wheels to import from")
    parser.add_argument("--tiny", action="store_true", help="small sizes, to see that it runs")
    parser.add_argument("--enwik8_seconds", type=float, default=LIMITS["enwik8"], help="600 for the long form")
    parser.add_argument("--work", choices=PARTS, help=argparse.SUPPRESS)
    flags = parser.parse_args(argv)
    if flags.work:
        from benchmarks.harness import report

        more = {"seconds": flags.enwik8_seconds} if flags.work == "enwik8" else {}
        title, rows, note = PARTS[flags.work](flags.tiny, **more)
        title += " (tiny sizes: no measurement)" if flags.tiny else ""
        report(f"gpu_{flags.work}", title, rows, note, flags.out)
        return 0
    limits = LIMITS | {"enwik8": flags.enwik8_seconds}
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ.copy()
        if flags.wheels:
            unpack(flags.wheels, Path(folder))
            environment["PYTHONPATH"] = os.pathsep.join(filter(None, [folder, os.environ.get("PYTHONPATH", "")]))
        failed = []
        for part in flags.parts:
            command = [sys.executable, "-m", "benchmarks.gpu", f"--work={part}", f"--out={flags.out.absolute()}"]
            command += ["--tiny"] * flags.tiny + [f"--enwik8_seconds={flags.enwik8_seconds}"]
            try:
                status = run_alone(command, environment, limits[part])
            except subprocess.TimeoutExpired:
                status = f"ran past its {limits[part]:.0f} seconds"
            if status:
                failed.append(part)
                print(f"{part}: {status if isinstance(status, str) else f'ended with status {status}'}", flush=True)
                if part == "gradients":
                    break
    print(json.dumps({"failed": failed}))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
