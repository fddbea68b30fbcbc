"""Attention's sinks and masks, the cache, and rotary positions."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from transformer.attention import Cache, LayerCache, attend, visible, visible_slots, write
from transformer.rotary import Yarn, rope_frequencies, rotate, rotation

B, T, N, K, H = 2, 5, 6, 3, 4


def normal(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).normal(size=shape)


def qkv():
    return tuple(map(jnp.float32, (normal(B, T, N, H), normal(B, T, K, H, seed=1), normal(B, T, K, H, seed=2))))


def causal():
    return visible(jnp.arange(T)[None], jnp.arange(T), 0)


# --- Sinks and masks; that the numbers are the definition's is shown in parity/test_attention_forms.py --------------


def test_a_head_with_a_huge_sink_attends_to_nothing():
    q_BTNH, k_BSKH, v_BSKH = qkv()

    def total(q_BTNH, sink_N):
        output = attend(q_BTNH, k_BSKH, v_BSKH, causal(), sink_N)
        return output.sum(), output

    sink_N = jnp.float32(np.where(np.arange(N) == 4, 1e4, 0.0))
    (dq, dsink), output = jax.jit(jax.grad(total, (0, 1), has_aux=True))(q_BTNH, sink_N)
    assert [n for n in range(N) if not output[:, :, n].any()] == [4]
    assert [n for n in range(N) if not dq[:, :, n].any()] == [4]
    assert [n for n in range(N) if dsink[n] == 0] == [4]


def test_each_row_has_its_own_mask_and_a_hidden_key_is_as_if_it_were_not_there():
    q_BTNH, k_BSKH, v_BSKH = jnp.float32(normal(B, 1, N, H)), *qkv()[1:]
    mask_BTS = np.array([[[True, False, True, True, False]], [[False, True, False, False, False]]])
    have = attend(q_BTNH, k_BSKH, v_BSKH, mask_BTS)
    for b in range(B):
        row, seen_S = slice(b, b + 1), mask_BTS[b, 0]
        alone = attend(q_BTNH[row], k_BSKH[row, seen_S], v_BSKH[row, seen_S], mask_BTS[row, :, seen_S])
        np.testing.assert_allclose(have[row], alone, rtol=1e-6, atol=1e-7)  # another order of the sums
    np.testing.assert_allclose(have[1, 0, :2], np.repeat(v_BSKH[1, 1, :1], 2, axis=0), rtol=1e-6)  # the only one seen


def test_visible():
    table = lambda query, window: np.array(visible(jnp.array(query), jnp.arange(6), window)).astype(int).tolist()
    assert table([[0, 2]], 0) == [[[1, 0, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0]]]
    assert table([[4], [1]], 3) == [[[0, 0, 1, 1, 1, 0]], [[1, 1, 0, 0, 0, 0]]]
    assert table([[3]], 1) == [[[0, 0, 0, 1, 0, 0]]]
    assert table([[5]], 99) == table([[5]], 0)


def test_write_puts_all_texts_into_the_same_slots():
    cache = LayerCache(jnp.full((B, K, 7, H), -1.0), jnp.full((B, K, 7, H), -2.0))
    k, v = jnp.float32(normal(B, 3, K, H)), jnp.float32(normal(B, 3, K, H, seed=1))
    after = jax.jit(write)(cache, k, v, 4)
    for new, written, blank in ((after.k_BKSH, k, -1), (after.v_BKSH, v, -2)):
        want = np.full((B, K, 7, H), blank, np.float32)
        want[:, :, 4:] = written.swapaxes(1, 2)
        np.testing.assert_array_equal(new, want)


def test_padding_and_the_future_are_not_visible():
    empty = jnp.zeros((2, 1, 6, 1))
    cache = Cache([LayerCache(empty, empty)], start_B=jnp.array([0, 3]), length=jnp.int32(3))
    table = lambda window: np.array(visible_slots(cache, 2, window)).astype(int).tolist()
    first, second = [1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 0]
    assert table(0) == [[first, second], [[0, 0, 0, 1, 0, 0], [0, 0, 0, 1, 1, 0]]]
    assert table(2) == [[[0, 0, 1, 1, 0, 0], [0, 0, 0, 1, 1, 0]], [[0, 0, 0, 1, 0, 0], [0, 0, 0, 1, 1, 0]]]


# --- Rotary positions ---------------------------------------------------------------------------------------------


def rotated(x_TH, position_T):
    """Vectors of one head, H = 8, at the given positions; theta is 100."""
    frequency, scale = rope_frequencies(8, 100.0)
    x_BTNH = np.float32(x_TH)[None, :, None]
    return np.array(jax.jit(rotate)(x_BTNH, rotation(np.array([position_T]), frequency, scale)))[0, :, 0]


def test_rotate_turns_each_plane_as_a_complex_number():
    x_TH, position_T = normal(3, 8), np.array([0, 7, 1000])
    z = (x_TH[:, :4] + 1j * x_TH[:, 4:]) * np.exp(1j * position_T[:, None] * 100.0 ** (-np.arange(4) / 4))
    have = rotated(x_TH, position_T)
    # 1000 radians in float32 are known to 3e-5.
    np.testing.assert_allclose(have, np.concatenate([z.real, z.imag], axis=-1), atol=1e-4)
    np.testing.assert_allclose(have[:2], np.concatenate([z.real, z.imag], axis=-1)[:2], atol=2e-6)
    np.testing.assert_array_equal(have[0], np.float32(x_TH[0]))


def test_products_of_rotated_vectors_depend_on_the_distance_alone_and_norms_not_at_all():
    q_H, k_H = normal(8), normal(8, seed=1)
    products = [float(np.dot(*rotated([q_H, k_H], [m, m + distance]))) for distance in (0, 3) for m in (0, 5, 61)]
    np.testing.assert_allclose(products[:3], np.dot(q_H, k_H), rtol=1e-5)
    np.testing.assert_allclose(products[3:], products[3], rtol=1e-4)
    assert abs(products[0] - products[3]) > 0.1
    norms = np.linalg.norm(rotated([q_H] * 3, [0, 5, 61]), axis=-1)
    np.testing.assert_allclose(norms, np.linalg.norm(q_H), rtol=1e-6)


def test_rotate_scales_and_keeps_the_dtype():
    x = jnp.asarray(normal(1, 3, 2, 8), jnp.bfloat16)
    frequency, _ = rope_frequencies(8, 100.0)
    turned = rotate(x, rotation(jnp.arange(3)[None], frequency, 1.5))
    assert turned.dtype == jnp.bfloat16
    norm = lambda y: np.linalg.norm(np.asarray(y, np.float32), axis=-1)
    np.testing.assert_allclose(norm(turned), 1.5 * norm(x), rtol=2**-7)


def yarn_by_the_paper(head_dim, theta, factor, context, fast, slow, truncate):
    """Section 3.2: theta' = (1 - gamma) theta / s + gamma theta, where gamma is 1 for wavelengths that fit `fast` times
    into the context and 0 for those that fit fewer than `slow` times.

    Between them the paper's code lets gamma fall evenly from plane to plane: evenly in ln(turns), as the turns fall
    geometrically.
    """
    plane = np.arange(head_dim // 2)
    frequency = theta ** (-2 * plane / head_dim)
    turns = context * frequency / (2 * np.pi)
    place = lambda t: np.log(turns[0] / t) / np.log(turns[0] / turns[1])  # the plane with so many turns
    first, last = place(fast), place(slow)
    if truncate:
        first, last = np.floor(first), np.ceil(last)
    gamma = 1 - np.interp(plane, [first, last], [0, 1])
    return (1 - gamma) * frequency / factor + gamma * frequency


@pytest.mark.parametrize("truncate", [True, False])
@pytest.mark.parametrize(
    ("head_dim", "theta", "factor", "context", "fast", "slow"),
    [(64, 150_000.0, 32.0, 4096, 32.0, 1.0), (128, 10_000.0, 4.0, 2048, 32.0, 1.0), (32, 500.0, 8.0, 512, 9.0, 2.5)],
    ids=["gpt-oss", "yarn-llama", "small"],
)
def test_yarn_frequencies_equal_the_papers(head_dim, theta, factor, context, fast, slow, truncate):
    have, scale = rope_frequencies(head_dim, theta, Yarn(factor, context, fast, slow, truncate))
    want = yarn_by_the_paper(head_dim, theta, factor, context, fast, slow, truncate)
    np.testing.assert_allclose(have, want, rtol=1e-6)
    plain, _ = rope_frequencies(head_dim, theta)
    np.testing.assert_allclose(have[[0, -1]], plain[[0, -1]] / [1, factor], rtol=1e-6)
    assert np.any((have < 0.99 * plain) & (have > 1.01 * plain / factor))  # some lie on the ramp
    assert scale == pytest.approx(0.1 * math.log(factor) + 1)


def test_yarn_by_a_factor_of_one_changes_nothing_and_its_scale_can_be_set():
    plain, one = rope_frequencies(16, 1e4)
    stretched, scale = rope_frequencies(16, 1e4, Yarn(1.0, 4096))
    np.testing.assert_allclose(stretched, plain, rtol=1e-7)
    assert one == scale == 1.0
    assert rope_frequencies(16, 1e4, Yarn(32.0, 4096, attention_factor=0.7))[1] == 0.7
