"""The stack of blocks in training: unrolled or in a loop that is compiled once, and with or without rematerialisation.

Neither choice changes a value: a block that is run again for the backward pass, or in a loop, draws the same random
numbers.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.tree_util import tree_leaves_with_path, tree_map_with_path

from transformer.sharding import gather_parameter, is_gather, is_part
from transformer.xla import materialize

# What the forward pass saves of a block for the backward pass besides its input; the rest is computed again.
REMAT_POLICIES: dict[str, Callable] = {
    "none": jax.checkpoint_policies.everything_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,  # the products with weights, not attention's
    "block": jax.checkpoint_policies.nothing_saveable,
}


def _name(path: tuple) -> str:
    """The name of a weight of any block, as in the table of parameters."""
    return ".".join(["blocks.0", *(str(part.key) for part in path if hasattr(part, "key"))])


def run_blocks(
    blocks: Sequence[nnx.Module],
    x_BTD: jax.Array,
    info: Any,
    rngs: nnx.Rngs | None,
    remat: str = "none",
    period: int = 0,
) -> jax.Array:
    """All blocks on x [B, T, D], without a cache.

    Args:
      blocks: called as block(x, info, rngs); the first result is the next x.
      rngs: dropout's, advanced as the blocks draw from it; None without dropout.
      remat: a name in REMAT_POLICIES.
      period: 0 unrolls the blocks. Otherwise a `jax.lax.scan` over the stacked weights runs `period` blocks in each
        iteration; blocks i and i + period must then differ only in their weights.
    """
    width, dtype = x_BTD.shape[-1], x_BTD.dtype
    in_parts = any(is_part(_name(path), x, width) for path, x in tree_leaves_with_path(nnx.state(blocks[0])))
    if remat == "none" and not period and not in_parts:
        for block in blocks:
            x_BTD, _ = block(x_BTD, info, rngs)
        return x_BTD
    rngs_graph, draws = nnx.split(rngs)
    policy = lambda *operation, **how: not is_gather(*operation, **how) and REMAT_POLICIES[remat](*operation, **how)
    graphs, weights = zip(*map(nnx.split, blocks), strict=True)

    def apply(graph, weights, x_BTD, draws):
        rngs = nnx.merge(rngs_graph, draws)
        if in_parts:
            weights = tree_map_with_path(lambda path, x: gather_parameter(_name(path), x, width, dtype), weights)
        x_BTD, _ = nnx.merge(graph, weights)(x_BTD, info, rngs)
        return x_BTD, nnx.state(rngs)

    def run(graph, weights, x_BTD, draws):
        function = partial(apply, graph)
        if remat != "none" or in_parts:  # in a loop XLA cannot merge it with the forward pass
            function = jax.checkpoint(function, policy=policy, prevent_cse=not period)
        return function(weights, x_BTD, draws)

    if not period:
        for graph, own in zip(graphs, weights, strict=True):
            x_BTD, draws = run(graph, own, x_BTD, draws)
    else:
        if list(graphs) != list(graphs[:period]) * (len(graphs) // period):
            raise ValueError(f"scan_blocks: the blocks are not alike every {period} blocks")

        def iteration(carry, stacked):
            for graph, own in zip(graphs, stacked, strict=False):  # the first `period` ones
                carry = run(graph, own, *carry)
            return carry, None

        stacks = [jax.tree.map(lambda *leaves: jnp.stack(leaves), *weights[i::period]) for i in range(period)]
        stacks = materialize(stacks)  # otherwise a CPU program copies each weight at each use
        (x_BTD, draws), _ = jax.lax.scan(iteration, (x_BTD, draws), stacks)
    if rngs is not None:
        nnx.update(rngs, draws)
    return x_BTD
