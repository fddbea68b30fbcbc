"""The step as the compilers of TPUs and GPUs make it, which need no such device: pytest -m slow tests/test_compilers.py

pip install -r requirements-tpu-compiler.txt -r requirements-gpu-compiler.txt; without, they are skipped. Minutes on two
cores, and one process for each place, as JAX starts once.
"""

import importlib.util
import json
import os
import subprocess
import sys

import pytest
from helpers import ROOT

from training.cost import parameter_counts
from transformer.config import TransformerConfig

pytestmark = pytest.mark.slow
CONFIG = {
    **{"tokenizer": "byte", "num_blocks": 1, "num_heads": 4, "embedding_dim": 256, "mlp_dim": 512, "context_len": 256},
    **{"batch_size": 24, "mlp": "relu2", "mlp_bias": False, "norm": "rmsnorm", "position": "rope"},
}
MODEL = TransformerConfig(256, 256, 1, 4, 0, 256, 0, 512, mlp="relu2", mlp_bias=False, norm="rmsnorm", position="rope")
PARAMETERS = 4 * sum(parameter_counts(MODEL).values())
STACKS = 4 * 4 * (256 * 256 + 256 * 512 + 512 * 256)  # bytes of the matrices by shape, filled up to four devices
SPLASH = {"splash_mha_fwd_residuals": 1, "splash_mha_dq_no_residuals": 1, "splash_mha_dkv_no_residuals": 1}
CUDNN = {"__cudnn$fmhaSoftmax": 1, "__cudnn$fmhaSoftmaxBackward": 1}
PEAK = {  # MB of a step on each device, as jax 0.10.2, libtpu 0.0.42 and XLA for GPUs gave it
    **{("v5e:2x2", "data=4"): 25.6, ("v5e:2x2", "fsdp=4"): 27.1},
    **{("H100:1", ""): 60.2, ("H100:8", "fsdp=8"): 16.6},
}


REFUSED = """
import sys, json, jax, jax.numpy as jnp, numpy as np
from training.compilers import devices_of, facts_of
devices, memory = devices_of(sys.argv[1])
place = jax.sharding.SingleDeviceSharding(devices[0])
x = jax.ShapeDtypeStruct((10**6, 128), jnp.float32, sharding=place)
print(json.dumps([memory, facts_of(jax.jit(lambda x: x @ x.T).trace(x), np.array(devices[:1]))]))
"""  # a product of 4 TB


def skip_without_compiler(place):
    library, kind = ("jax_cuda12_plugin", "gpu") if place.startswith("H") else ("libtpu", "tpu")
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"its compiler is not installed: pip install -r requirements-{kind}-compiler.txt")


@pytest.mark.parametrize("place", ["v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"])
def test_the_memory_of_a_tpu_is_what_its_compiler_gives_a_program(tmp_path, place):
    skip_without_compiler(place)
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path)}
    command = [sys.executable, "-c", REFUSED, place]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    memory, facts = json.loads(done.stdout.splitlines()[-1])
    assert memory == pytest.approx(facts["available_bytes"], rel=1e-3) and facts["needed_bytes"] > 10 * memory


def plan(tmp_path_factory, place, *flags):
    """What `main.py plan --compile_for` writes, without its cache."""
    skip_without_compiler(place)
    folder = tmp_path_factory.mktemp("plan")
    changes = [f"--config.{key}={value}" for key, value in CONFIG.items()]
    command = [sys.executable, "main.py", "plan", "--config=configs/default.py", *changes, f"--compile_for={place}"]
    environment = os.environ | {"XDG_CACHE_HOME": str(folder)}
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    command += [f"--out={folder / 'plan.json'}", *flags]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "plan.json").read_text())


@pytest.mark.parametrize(
    ("place", "mesh", "kernels"),
    [("v5e:2x2", "data=4", SPLASH), ("v5e:2x2", "fsdp=4", SPLASH), ("H100:1", "", CUDNN), ("H100:8", "fsdp=8", CUDNN)],
)
def test_a_step_for_devices_that_are_not_here(tmp_path_factory, place, mesh, kernels):
    found = plan(tmp_path_factory, place, f"--config.mesh={mesh}")
    step, n = found["programs"]["step"], found["mesh"]["data"] * found["mesh"]["fsdp"]
    assert step["kernels"] == kernels and found["attention"] == ("splash" if kernels is SPLASH else "cudnn")
    assert step["donated"] == found["state_arrays"] and found["fits"]
    sent = {}
    for row in step["collectives"]:
        assert len(row["group"]) == n and not row["in_open_loop"]
        sent[row["op"]] = sent.get(row["op"], 0) + row["sent"]
    if mesh.startswith("data"):
        assert sent == {
            "all-reduce": pytest.approx(2 * (n - 1) / n * (PARAMETERS + 8)),
            "all-gather": pytest.approx((n - 1) / n * STACKS),
        }
    elif mesh:
        assert sent.keys() == {"all-reduce", "all-gather", "reduce-scatter", "all-to-all"}
        assert sent["all-reduce"] < PARAMETERS / 5  # norms, sinks, counters; on TPUs the embedding's gradient too
    else:
        assert sent == {}
    assert step["peak_bytes"] / 1e6 == pytest.approx(PEAK[place, mesh], rel=0.1)


def test_what_two_slices_send_to_each_other(tmp_path_factory):
    found = plan(tmp_path_factory, "v5e:2x2*2", "--config.mesh=data=8")
    between = {row["op"]: row for row in found["programs"]["step"]["collectives"] if row["between_slices"]}
    assert between["all-reduce"]["group"] == [0, 4]
    # The four of a slice sum first; then each exchanges its quarter with its partner in the other.
    assert between["all-reduce"]["sent"] == pytest.approx((PARAMETERS + 8) / 4, rel=0.02)
