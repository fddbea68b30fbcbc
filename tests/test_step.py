"""The training step: accumulation, the gate for bad numbers, several devices, and that it trains."""

import dataclasses
import os
import pickle
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.extend.backend
import jax.numpy as jnp
import numpy as np
import pytest
from xla_flags import SOONER

from training import muon, step
from training.dispatch import several_steps
from training.optimizer import OptimizerConfig, labels_of, make_optimizer, schedule_shape
from transformer.config import TransformerConfig
from transformer.sharding import batch_sharded, make_mesh, replicated
from transformer.xla import Target, compiler_options

ROWS, T, V = 24, 5, 13
POISON = V - 1  # a token that ordinary batches do not have; the row of its embedding can be made bad
MODEL = TransformerConfig(
    vocab_size=V,
    context_len=T,
    num_blocks=1,
    num_heads=4,
    num_kv_heads=2,
    head_dim=2,
    embedding_dim=12,
    mlp_dim=14,
    mlp="relu2",
    position="rope",
    norm="rmsnorm",
    tie_embeddings=False,
)
AT_ONCE = OptimizerConfig(
    lr=0.02, muon_lr=0.05, weight_decay=0.1, newton_schulz_steps=3, schedule="linear", muon_momentum_warmup_steps=4
)
IN_THREE = dataclasses.replace(AT_ONCE, accumulation_steps=3)
TOTAL_STEPS = 150


class Trainer:
    """A compiled step and the state to begin with. Counts the runs of Newton-Schulz."""

    def __init__(self, params, optimizer_config, mesh=None, **gate):
        self.params = jax.tree.map(np.array, params)  # on the host: the step eats what is on the device
        self.mesh = mesh or make_mesh(devices=jax.devices()[:1])
        self.orthogonalized = 0
        labels = labels_of(params, optimizer_config)
        opt = make_optimizer(optimizer_config, params, TOTAL_STEPS, self.mesh)
        schedule, k = schedule_shape(optimizer_config, TOTAL_STEPS), optimizer_config.accumulation_steps
        self.step = step.make_train_step(MODEL, opt, schedule, labels, k, jax.random.key(0), self.mesh, **gate)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(step, "init_params", lambda config, key: params)
            init = jax.jit(partial(step.init_state, MODEL, opt, labels), out_shardings=replicated(self.mesh))
            self.start = jax.tree.map(np.array, init(jax.random.key(0)))
            patch.setattr(muon, "orthogonalize", self._counted(muon.orthogonalize))
            self.run([batch(rows=ROWS // k)])  # compiles, with the count in it

    def _counted(self, orthogonalize):
        def count():
            self.orthogonalized += 1

        def counting(*arguments):
            jax.debug.callback(count)
            return orthogonalize(*arguments)

        return counting

    def run(self, batches, **changes):
        """From the start, with changed parameters: the (state, metrics) after each batch, on the host."""
        self.orthogonalized, history = 0, []
        state = jax.device_put(self.start._replace(params=self.params | changes), replicated(self.mesh))
        for one in batches:
            state, metrics = self.step(state, jax.device_put(one, batch_sharded(self.mesh)))
            history.append(jax.tree.map(np.array, (state, metrics)))
        jax.effects_barrier()
        return history


@pytest.fixture(scope="module")
def at_once(random_params):
    """All rows in one batch a step."""
    return Trainer(random_params(MODEL), AT_ONCE)


@pytest.fixture(scope="module")
def in_three(random_params):
    """A third of the rows in each of three micro-batches a step."""
    return Trainer(random_params(MODEL), IN_THREE)


def batch(seed=0, rows=ROWS):
    return np.random.default_rng(seed).integers(0, POISON, (rows, T + 1)).astype(np.int32)


def with_masked_end(batch_BT1):
    """As the split's last window: its last targets are missing."""
    masked = batch_BT1.copy()
    masked[-1, 3:] = -1
    return masked


def micro_batches(count, masked=False):
    batches = [batch(seed, ROWS // 3) for seed in range(count)]
    return list(map(with_masked_end, batches)) if masked else batches


def evaluate(params, mesh):
    """Loss and targets of a batch with a masked end: one entry a device."""
    return jax.tree.map(np.array, step.make_eval_step(MODEL, mesh)(params, with_masked_end(batch())))


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


# --- Accumulation -------------------------------------------------------------------------------------------------


def test_accumulation_equals_the_large_batch(at_once, in_three):
    large = [with_masked_end(batch(seed)) for seed in (1, 2, 3)]
    want = at_once.run(large)
    have = in_three.run([part for whole in large for part in np.split(whole, 3)])
    for i, (state, metrics) in enumerate(have):
        assert state.micro_step == i + 1
        if (i + 1) % 3:  # in mid-accumulation nothing moves, and the metrics are the last real step's
            before = have[i - 1][0] if i else in_three.start
            assert_same((state.params, metrics), (before.params, before.metrics))
            continue
        want_state, want_metrics = want[i // 3]
        for name, value in metrics.items():
            np.testing.assert_allclose(value, want_metrics[name], rtol=1e-5, err_msg=name)
        for name, value in state.params.items():
            np.testing.assert_allclose(value, want_state.params[name], atol=3e-6, err_msg=f"{name} at {i}")
        assert state.window_tokens == 0


def test_newton_schulz_runs_once_a_real_step(at_once, in_three):
    at_once.run([batch()])
    once = at_once.orthogonalized
    assert once > 0
    for count, real_steps in enumerate([0, 0, 1, 1, 1, 2], start=1):
        in_three.run(micro_batches(count))
        assert in_three.orthogonalized == once * real_steps


# --- Bad numbers --------------------------------------------------------------------------------------------------


def poisoned(trainer):
    """Parameters under which a batch with the token POISON, and no other, has no finite loss."""
    table_VD = trainer.params["embedding.embedding"].copy()
    table_VD[POISON] = np.nan
    return {"embedding.embedding": table_VD}


def with_poison(batch_BT1):
    bad = batch_BT1.copy()
    bad[1, 2] = POISON
    return bad


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_bad_micro_batch_counts_as_one_without_tokens(in_three, place):
    dropped, empty = micro_batches(6), micro_batches(6)
    dropped[3 + place] = with_poison(dropped[3 + place])
    empty[3 + place] = np.full_like(empty[0], -1)
    (have, metrics), (want, want_metrics) = (in_three.run(b, **poisoned(in_three))[-1] for b in (dropped, empty))
    assert (metrics["bad_batches"], want_metrics["bad_batches"]) == (1, 0)
    counted = {name: metrics[name] for name in ("bad_batches", "bad_leaf")}
    want, want_metrics = want._replace(metrics=want.metrics | counted), want_metrics | counted
    want = want._replace(health=want.health._replace(**counted))
    assert_same((have, metrics), (want, want_metrics))
    assert np.isfinite(metrics["loss"]) and metrics["bad_steps"] == 0 and have.micro_step == 6
    ill = {name for name, p in have.params.items() if not np.isfinite(p).all()}
    assert ill == {"embedding.embedding"} and np.isfinite(have.params["embedding.embedding"][:POISON]).all()


@pytest.mark.parametrize("trainer", ["at_once", "in_three"])
def test_a_step_with_nothing_good_changes_nothing_but_the_counters(request, trainer):
    k = {"at_once": 1, "in_three": 3}[trainer]
    trainer = request.getfixturevalue(trainer)
    good = [batch(seed, ROWS // k) for seed in range(k)]
    bad = list(map(with_poison, good))
    history = trainer.run([*good, *bad, *bad, *good], **poisoned(trainer))
    (before, _), (first, once), (second, twice), (after, well) = history[k - 1 :: k]
    inner = lambda state: (state.opt_state if k == 1 else state.opt_state.inner_opt_state).inner_state
    for state in (first, second):
        assert_same((state.params, inner(state)), (before.params, inner(before)))
    assert after.micro_step == 4 * k
    assert [m["bad_steps"] for m in (once, twice, well)] == [1, 2, 0]
    assert np.isnan(once["loss"]) and np.isnan(once["grad_norm"]) and np.isfinite(well["loss"])
    assert once["update_rms_muon"] == 0 and well["update_rms_muon"] > 0
    assert well["lr_factor"] == pytest.approx(1 - 3 / TOTAL_STEPS)  # the schedule went on


def test_a_finite_loss_does_not_excuse_a_gradient_that_is_not(monkeypatch):
    def gradient_is_infinite_where_the_batch_is(config, mesh):
        return lambda params, batch_BT1, key: (
            jnp.float32(3),
            jnp.int32(7),
            {"head.kernel": params["head.kernel"] / batch_BT1[0, 0]},
        )

    monkeypatch.setattr(step, "make_loss_and_grads", gradient_is_infinite_where_the_batch_is)
    trainer = Trainer({"head.kernel": jnp.ones((2, 3))}, AT_ONCE)
    (bad, bad_metrics), (good, good_metrics) = trainer.run([np.zeros_like(batch()), np.ones_like(batch())])
    assert_same(bad.params, trainer.params)
    assert (good.params["head.kernel"] < 1).all() and np.isfinite(good.params["head.kernel"]).all()
    assert (bad_metrics["bad_steps"], good_metrics["bad_steps"]) == (1, 0)


# --- Several devices ----------------------------------------------------------------------------------------------

ON_SEVERAL_DEVICES = """
import jax, pickle, sys
from test_step import IN_THREE, Trainer, evaluate, make_mesh, micro_batches
params, results = pickle.load(sys.stdin.buffer), {}
for n in (2, 8):
    mesh = make_mesh(devices=jax.devices()[:n])
    state, metrics = Trainer(params, IN_THREE, mesh).run(micro_batches(9, masked=True))[-1]
    results[n] = state.params | metrics, evaluate(params, mesh)
pickle.dump(results, sys.stdout.buffer)
"""


def test_two_and_eight_devices_do_what_one_does(in_three):
    """In a process of its own, as JAX must know the number of simulated devices before it starts."""
    here = Path(__file__).parent
    flags = f"--xla_force_host_platform_device_count=8 {SOONER}"
    env = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": f"{here}{os.pathsep}{here.parent}"}
    command = [sys.executable, "-c", ON_SEVERAL_DEVICES]
    params = pickle.dumps(in_three.params)
    done = subprocess.run(command, input=params, env=env, capture_output=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr.decode()
    state, metrics = in_three.run(micro_batches(9, masked=True))[-1]
    [want_loss], [want_count] = evaluate(in_three.params, make_mesh(devices=jax.devices()[:1]))
    for devices, (trained, (losses, counts)) in pickle.loads(done.stdout).items():
        for name, want in (state.params | metrics).items():
            np.testing.assert_allclose(trained[name], want, rtol=1e-5, atol=1e-5, err_msg=f"{name}, {devices} devices")
        assert len(losses) == len(counts) == devices and counts.sum() == want_count
        assert losses.sum() == pytest.approx(want_loss, rel=1e-6)


# --- Training -----------------------------------------------------------------------------------------------------


def test_one_batch_is_learned_by_heart(at_once):
    rows = batch(rows=6)
    rows[:, 0] = np.arange(6)  # so that the past tells what comes
    losses = [float(metrics["loss"]) for _, metrics in at_once.run([np.tile(rows, (4, 1))] * TOTAL_STEPS)]
    assert losses[0] > 2 and losses[-1] < 0.02


def test_metrics_are_those_of_the_step(at_once):
    state, metrics = at_once.run([with_masked_end(batch())])[0]
    [loss], [tokens] = evaluate(at_once.params, at_once.mesh)
    assert tokens == ROWS * T - 3
    assert metrics["loss"] == pytest.approx(loss / tokens, rel=1e-6)
    assert metrics["lr_factor"] == 1
    rms = lambda leaves: np.sqrt(np.mean(np.concatenate([np.ravel(leaf) for leaf in leaves]) ** 2))
    for group in ("muon", "adamw"):
        names = [name for name, label in labels_of(at_once.params, AT_ONCE).items() if label == group]
        moved = [state.params[name] - at_once.params[name] for name in names]
        assert metrics[f"param_rms_{group}"] == pytest.approx(rms([state.params[name] for name in names]), rel=1e-5)
        assert metrics[f"update_rms_{group}"] == pytest.approx(rms(moved), rel=1e-4)


def test_each_micro_batch_draws_its_own_random_numbers(monkeypatch, random_params):
    with_dropout = dataclasses.replace(MODEL, dropout=0.5)
    draws = lambda config: (
        "random_bits"
        in str(
            jax.make_jaxpr(step.make_loss_and_grads(config, make_mesh(devices=jax.devices()[:1])))(
                random_params(config), jnp.asarray(batch()), jax.random.key(0)
            )
        )
    )
    assert draws(with_dropout) and not draws(MODEL)

    def loss_is_a_draw(config, mesh):
        return lambda params, batch_BT1, key: (jax.random.uniform(key), 1, jax.tree.map(jnp.zeros_like, params))

    monkeypatch.setattr(step, "make_loss_and_grads", loss_is_a_draw)
    trainer = Trainer({"head.kernel": jnp.ones((2, 3))}, AT_ONCE)
    losses, again = ([float(metrics["loss"]) for _, metrics in trainer.run([batch()] * 3)] for _ in range(2))
    assert len(set(losses)) == 3 and losses == again


@pytest.mark.parametrize(
    ("target", "attention"),
    [(Target("cpu"), "none"), (Target("tpu"), "pallas_call"), (Target("cuda", "9.0"), "dot_product_attention_fwd")],
)
def test_a_step_is_traced_for_the_devices_of_its_mesh_wherever_it_is_traced(monkeypatch, target, attention):
    """The mesh stands for devices that are not here; nothing may ask for those that are."""
    config = dataclasses.replace(MODEL, context_len=128, head_dim=8, dtype="bfloat16")
    mesh, key = make_mesh(devices=jax.devices()[:1]), jax.random.key(0)
    compiler_options()  # compiles a program on a CPU, once
    monkeypatch.setattr("jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(step, "target_of", lambda devices: target)
    monkeypatch.setattr(jax.extend.backend, "get_backend", pytest.fail)
    for name in ("default_backend", "devices", "local_devices"):
        monkeypatch.setattr(jax, name, pytest.fail)
    made = step.make_step(AT_ONCE, config, TOTAL_STEPS, key, mesh)
    batch_BT1 = jax.ShapeDtypeStruct((2, 129), jnp.int32)
    for traced in (
        made.run.trace(made.state, batch_BT1),
        step.make_eval_step(config, mesh).trace(made.state.params, batch_BT1),
    ):
        program = str(traced.jaxpr)
        kernels = {name for name in ("pallas_call", "dot_product_attention_fwd") if name in program}
        assert kernels == {attention} - {"none"}
        assert ("optimization_barrier" in program) == (target.platform == "cpu")


def test_a_step_of_more_parameters_than_an_int32_counts():
    config = TransformerConfig(65536, 64, 4, 16, 0, 8192, 0, 32768)
    made = step.make_step(AT_ONCE, config, TOTAL_STEPS, jax.random.key(0), make_mesh(devices=jax.devices()[:1]))
    assert sum(p.size for n, p in made.state.params.items() if made.labels[n] == "muon") > 2**31
    assert {"param_rms_muon", "update_rms_muon"} <= made.state.metrics.keys()


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_step_holds_no_array_of_a_device(dropout):
    """To trace one that does would fetch it, which the trainer forbids, and on a CPU nobody would notice."""
    config, key = dataclasses.replace(MODEL, dropout=dropout), jax.random.key(0)
    made = step.make_step(AT_ONCE, config, TOTAL_STEPS, key, make_mesh(devices=jax.devices()[:1]), 6.0, True)
    batch_BT1 = jax.ShapeDtypeStruct((2, config.context_len + 1), jnp.int32)
    for run, batch in (
        (made.run, batch_BT1),
        (several_steps(made.run, made.state), (jax.ShapeDtypeStruct((2, *batch_BT1.shape), jnp.int32), 2)),
    ):
        held = run.trace(made.state, batch).jaxpr.consts
        assert [x for x in held if isinstance(x, jax.Array)] == []
