"""Products in the forms that a CPU runs well: the same numbers, and each computed once."""

import re
from types import SimpleNamespace as Some

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from transformer.half import half_dot_general
from transformer.xla import Target, compiler_options, dot_general, materialize, random_key, target_of

CONTRACT = (((2,), (0,)), ((), ()))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(("n_in", "n_out"), [(6, 11), (11, 6), (7, 7)])
def test_a_product_and_its_gradients_are_those_of_jax(n_in, n_out, dtype):
    rng = np.random.default_rng(0)
    x, w, dy = (jnp.asarray(rng.normal(size=s), dtype) for s in ((2, 5, n_in), (n_in, n_out), (2, 5, n_out)))
    have, pull_back = jax.vjp(lambda x, w: dot_general(x, w, CONTRACT), x, w)
    want, pull_back_of_jax = jax.vjp(lambda x, w: jax.lax.dot_general(x, w, CONTRACT), x, w)
    rounding = {"rtol": 1e-5, "atol": 1e-5} if dtype == jnp.float32 else {"rtol": 1e-2, "atol": 3e-2}  # other orders
    for mine, theirs in zip((have, *pull_back(dy)), (want, *pull_back_of_jax(dy)), strict=True):
        assert mine.dtype == theirs.dtype
        np.testing.assert_allclose(mine.astype(jnp.float32), theirs.astype(jnp.float32), **rounding)


@pytest.mark.parametrize("rows", [(1,), (3, 1), (2, 37)])
@pytest.mark.parametrize(("n_in", "n_out"), [(48, 65), (65, 48), (7, 1)])
def test_a_product_in_half_precision_rounds_its_operands_and_nothing_else(rows, n_in, n_out):
    """Also where its result, an operand or a gradient is transposed, as with a head that is tied."""
    rng = np.random.default_rng(0)
    x, w, dy = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((*rows, n_in), (n_out, n_in), (*rows, n_out)))
    product = lambda x, w: half_dot_general(x, w.T, CONTRACT)

    def gradients(x, w, dy):
        y, pull_back = jax.vjp(product, x, w)
        return y, *pull_back(dy)

    have = jax.jit(gradients, compiler_options=compiler_options())(x, w, dy)
    x, w, dy = (np.float64(value.astype(jnp.bfloat16)) for value in (x, w, dy))
    want = x @ w.T, dy @ w, dy.reshape(-1, n_out).T @ x.reshape(-1, n_in)
    for mine, right in zip(have, want, strict=True):
        assert mine.dtype == jnp.float32
        np.testing.assert_allclose(mine, right, rtol=1e-5, atol=1e-5)


def test_what_is_settled_is_not_computed_again_for_each_user():
    def sums(depth, x):
        """Each sum is read by the next one and by a transposed copy, like a gradient of the residual stream."""
        products = []
        for _ in range(depth):
            x = materialize(x * x[::-1] + 0.5)
            products.append((x.T + 0.0) @ x)
        return products

    def multiplications(depth, options):
        lowered = jax.jit(lambda x: sums(depth, x), compiler_options=options).lower(jnp.ones((6, 7)))
        return len(re.findall(r" multiply\(", lowered.compile().as_text()))

    if compiler_options() is None:
        pytest.skip("a device that decides for itself")
    settled, not_settled = ([multiplications(depth, how) for depth in (3, 6)] for how in (compiler_options(), None))
    assert settled == [3, 6]
    if jax.__version_info__ < (0, 11):  # later ones store these sums by themselves
        assert not_settled[1] > 2 * not_settled[0]


@pytest.mark.parametrize(
    ("platform", "version", "kind", "expected"),
    [
        ("gpu", "cuda 12080", "Tesla V100-SXM2-16GB", Target("cuda", "9.0")),
        ("gpu", "PJRT C API", "NVIDIA H100 80GB HBM3", Target("cuda", "9.0")),  # one that is not here
        ("gpu", "rocm 60400", "AMD Instinct MI300X", Target("gpu", "9.0")),
        ("tpu", "PJRT C API", "TPU v5 lite", Target("tpu", "9.0")),
    ],
)
def test_the_kind_of_a_device_that_may_be_elsewhere(platform, version, kind, expected):
    client = Some(platform_version=version)
    device = Some(platform=platform, client=client, device_kind=kind, compute_capability="9.0")
    assert target_of([device]) == expected


def test_seeds_that_differ_above_32_bits_have_keys_of_their_own():
    bits = lambda key: tuple(jax.random.key_data(key).tolist())
    for seed in (0, 5, 2**31, 2**32 - 1):
        assert bits(random_key(seed)) == bits(jax.random.key(seed))
    assert len({bits(random_key(7 + high)) for high in (0, 2**32, 2**33, 2**62, 2**63)}) == 5
