"""One scan over the periods of a run of layers, the layers of a period written out.

Parameters stay in their stacks. A scan takes a run's part of each stack, and cuts it into periods by a reshape.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from easylm_mling.model.layer_kinds import LayerKind, Run

# (kind, carry, parameters, cache, own input) of one layer -> (the carry behind it, its cache)
OneLayer = Callable[[LayerKind, Any, Any, Any, Any], tuple[Any, Any]]


def cut(layers: dict[str, Any], runs: list[Run]) -> list[dict[str, Any]]:
    """Cut stacks of layers, pytrees by name, into the parts that each of the consecutive `runs` scans.

    The arrays of a part have axes [periods, layers of the stack in a period, ...], without the second where it is 1.
    """
    parts: list[dict[str, Any]] = [{} for _ in runs]
    for stack, tree in layers.items():
        with_layers = [i for i, run in enumerate(runs) if stack in run.per_period]
        leaves, form = jax.tree.flatten(tree)
        sizes = [runs[i].count * runs[i].per_period[stack] for i in with_layers]
        # One operation, whose gradient is one concatenation.
        pieces = [jax.lax.split(leaf, sizes) if len(sizes) > 1 else [leaf] for leaf in leaves]
        for n, i in enumerate(with_layers):
            parts[i][stack] = form.unflatten([_by_period(piece[n], runs[i], stack) for piece in pieces])
    return parts


def cut_by_layer(inputs: jax.Array, runs: list[Run]) -> list[jax.Array]:
    """Cut [layers, ...], the layers in order, into the [periods, layers of a period, ...] of each run."""
    sizes = [run.count * len(run.kinds) for run in runs]
    pieces = jax.lax.split(inputs, sizes)
    return [p.reshape(run.count, len(run.kinds), *p.shape[1:]) for p, run in zip(pieces, runs, strict=True)]


def _by_period(stacked: jax.Array, run: Run, stack: str) -> jax.Array:
    many = run.per_period[stack]
    return stacked if many == 1 else stacked.reshape(run.count, many, *stacked.shape[1:])


def scan_periods(
    run: Run,
    one_layer: OneLayer,
    wrap: Callable,
    carry: Any,
    part: dict[str, Any],
    inputs: jax.Array | None,
    caches: tuple | None,
) -> tuple[Any, tuple]:
    """Run the layers of `run` on the `carry`; returns it and, for each layer of a period, the caches.

    `part` and `inputs` are what `cut` and `cut_by_layer` made. `wrap` makes the function of a layer save what its remat
    policy says. The caches of each layer of a period have a leading axis of periods.
    """

    def period(carry, scanned):
        part, inputs, caches = scanned
        layers = {stack: iter(_single(part[stack], many)) for stack, many in run.per_period.items()}
        made = []
        for i, (kind, cache) in enumerate(zip(run.kinds, caches, strict=True)):
            own = None if inputs is None else inputs[i]
            carry, new = wrap(partial(one_layer, kind))(carry, next(layers[kind.stack]), cache, own)
            made.append(new)
        return carry, tuple(made)

    return jax.lax.scan(period, carry, (part, inputs, caches or (None,) * len(run.kinds)))


def _single(tree: Any, many: int) -> list[Any]:
    """Return each of the `many` layers that one period has of a stack."""
    if many == 1:
        return [tree]
    leaves, form = jax.tree.flatten(tree)
    pieces = [[jnp.squeeze(piece, 0) for piece in jax.lax.split(leaf, (1,) * many)] for leaf in leaves]
    return [form.unflatten(layer) for layer in zip(*pieces, strict=True)]
