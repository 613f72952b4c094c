"""One scan over the periods of a run of layers; what differs inside a period is written out.

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
    nested: bool,
) -> tuple[Any, tuple]:
    """Run the layers of `run` on the `carry`; returns it and, for each layer of a period, the caches.

    `part` and `inputs` are what `cut` and `cut_by_layer` made. `wrap(body, beside_backward=...)`, of model/remat.py, makes
    the function of a layer save what its policy says. The caches of each layer of a period have a leading axis of periods.

    With `nested`, layers of one kind that follow one another in a period are a scan inside the scan: they are compiled once.
    """
    groups = run.groups if nested else [(kind, 1) for kind in run.kinds]
    sizes = {stack: [size for kind, size in groups if kind.stack == stack] for stack in run.per_period}

    def period(carry, scanned):
        part, inputs, caches = scanned
        layers = {stack: iter(_grouped(part[stack], sizes[stack])) for stack in sizes}
        made: list = []
        for kind, size in groups:
            first, layer = len(made), next(layers[kind.stack])
            own = None if inputs is None else inputs[first] if size == 1 else inputs[first : first + size]
            # A loop of one trip is none: its backward pass stands beside the forward pass, and may not be merged with it.
            body = wrap(partial(one_layer, kind), beside_backward=run.count * size == 1)
            if size == 1:
                carry, new = body(carry, layer, caches[first], own)
                made.append(new)
            else:
                each = lambda carry, one, body=body: body(carry, one[0], None, one[1])  # noqa: E731
                carry, new = jax.lax.scan(each, carry, (layer, own))
                made += [jax.tree.map(lambda a, i=i: a[i], new) for i in range(size)]
        return carry, tuple(made)

    return jax.lax.scan(period, carry, (part, inputs, caches or (None,) * len(run.kinds)))


def _grouped(tree: Any, sizes: list[int]) -> list[Any]:
    """Cut the layers that one period has of a stack into groups of these sizes; one of 1 has no axis of layers."""
    if sizes == [1]:
        return [tree]
    leaves, form = jax.tree.flatten(tree)
    pieces = [
        [jnp.squeeze(piece, 0) if size == 1 else piece for piece, size in zip(split, sizes, strict=True)]
        for split in ([leaf] if len(sizes) == 1 else jax.lax.split(leaf, sizes) for leaf in leaves)
    ]
    return [form.unflatten(group) for group in zip(*pieces, strict=True)]
