"""The sharding of every array: one table from logical axes to mesh axes, applied strictly.

A dimension that does not divide, or a mesh axis used twice in one array, is an error, never a silent replica.
"""

import math

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from easylm_mling.config import LoraConfig, MeshConfig, ModelConfig, RunConfig
from easylm_mling.errors import ConfigError
from easylm_mling.model.layer_kinds import layer_kinds
from easylm_mling.model.params import Parameter, adapter_table, parameter_table, to_nested

MESH_AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")
# Of the tiles that a TPU keeps bfloat16 arrays in.
_TILE_ROWS, _TILE_COLUMNS = 16, 128

RULES = {
    "batch": BATCH_AXES,
    "vocab": "tensor",
    "embed": "fsdp",
    "mlp": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "global_kv_heads": "tensor",  # where global layers have another number of them
    "per_layer": None,
    "scalar": None,
    "head_dim": None,
    "rank": None,
    # The long sides of adapters, cut over fsdp, too: they are gathered with the kernel that they stand beside.
    "adapter_head_dim": "fsdp",
    "adapter_mlp": ("tensor", "fsdp"),
    "layers": None,
    # Activations keep their feature and position axes whole; only parameters are cut along `embed`.
    "activation_embed": None,
    "position": None,
}


def make_mesh(config: MeshConfig, devices=None) -> Mesh:
    """Make a mesh of all `devices` (default: every device of every process) with the axes data, fsdp and tensor.

    The devices that share the positions of a row (model/sequence_shares.py) are neighbours on the axis fsdp, which is
    `config.sequence` times as long as `config.fsdp`: parameters are cut over all of them.

    Raises ConfigError when the sizes of the axes do not multiply to the number of devices.
    """
    if devices is None:
        # The devices of a process stand side by side, so that its rows of a batch follow one another.
        devices = sorted(jax.devices(), key=lambda d: (d.process_index, d.id))
    sizes = [config.data, config.fsdp, config.tensor]
    written = dict(zip(MESH_AXES, sizes, strict=True))
    names = "mesh.data, mesh.fsdp or mesh.tensor"
    if config.sequence > 1:
        written, names = written | {"sequence": config.sequence}, "mesh.data, mesh.fsdp, mesh.tensor or mesh.sequence"
    known = config.sequence * math.prod(s for s in sizes if s != -1)
    if -1 in sizes and len(devices) % known == 0:
        sizes[sizes.index(-1)] = len(devices) // known
    sizes[1] *= config.sequence
    if math.prod(sizes) != len(devices):
        raise ConfigError(f"mesh {written} does not multiply to the {len(devices)} devices here; change {names}")
    return Mesh(np.asarray(devices).reshape(sizes), MESH_AXES, axis_types=(AxisType.Auto,) * 3)


def axis_sizes(mesh: Mesh, sequence: int) -> dict[str, int]:
    """Return the size of each axis as a config names them, `sequence` only where it divides rows."""
    sizes = {str(axis): size for axis, size in mesh.shape.items()}
    return sizes if sequence == 1 else sizes | {"fsdp": sizes["fsdp"] // sequence, "sequence": sequence}


def rules_for(model: ModelConfig, mesh: Mesh) -> dict:
    """Return RULES for this model. Key/value heads that are fewer than the tensor shards lie whole on each.

    So does a side of an adapter that the fsdp shards do not divide: it is small.
    """
    heads = {
        "kv_heads": model.num_key_value_heads,
        "global_kv_heads": model.num_global_key_value_heads or model.num_key_value_heads,
    }
    kinds, fsdp, tensor = layer_kinds(model), mesh.shape["fsdp"], mesh.shape["tensor"]
    whole: dict = {axis: None for axis, count in heads.items() if count < tensor}
    if any(kind.head_dim % fsdp for kind in kinds):
        whole["adapter_head_dim"] = None
    if any(kind.mlp_width % (tensor * fsdp) for kind in kinds):
        whole["adapter_mlp"] = "tensor"
    return RULES | whole


def partition_spec(axes: tuple, shape: tuple, mesh: Mesh, rules: dict, name: str) -> PartitionSpec:
    """Return the PartitionSpec of the array `name` by the logical axes of its dimensions.

    Raises ConfigError for a dimension that does not divide and for a mesh axis on two dimensions.
    """
    assert len(axes) == len(shape), (name, axes, shape)
    entries = [rules[a] for a in axes]
    used = [m for e in entries if e for m in ((e,) if isinstance(e, str) else e)]
    if len(used) != len(set(used)):
        raise ConfigError(f"{name}: the axes {axes} put one mesh axis on two dimensions ({entries})")
    for axis, size, entry in zip(axes, shape, entries, strict=True):
        shards = math.prod(mesh.shape[m] for m in ((entry,) if isinstance(entry, str) else entry or ()))
        if size % shards:
            raise ConfigError(
                f"{name}: {axis} of size {size} does not divide over the {shards} shards of mesh axis {entry}"
            )
    return PartitionSpec(*entries)


def parameter_shardings(model: ModelConfig, mesh: Mesh) -> dict:
    """Return a nested dict with the NamedSharding of each parameter; raises ConfigError as `partition_spec`."""
    return _placed(parameter_table(model), model, mesh)


def adapter_shardings(model: ModelConfig, lora: LoraConfig, mesh: Mesh) -> dict:
    """Return a nested dict with the NamedSharding of each factor of an adapter, as `parameter_shardings`."""
    return _placed(adapter_table(model, lora), model, mesh)


def _placed(table: list[Parameter], model: ModelConfig, mesh: Mesh) -> dict:
    rules = rules_for(model, mesh)
    return to_nested({p.path: NamedSharding(mesh, partition_spec(p.axes, p.shape, mesh, rules, p.path)) for p in table})


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Return the sharding of a batch: its rows along the data and fsdp axes together."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def own_rows(mesh: Mesh, rows: int, sequence: int = 1) -> range:
    """Return the range of a batch's `rows` that this process needs.

    They lie on its devices, under `batch_sharding`. Of rows in `sequence` shares it may have some shares only, and another
    process the others.
    """
    places, count = own_places(mesh), mesh.shape["data"] * mesh.shape["fsdp"] // sequence
    return range(places.start // sequence * rows // count, -(-places.stop // sequence) * rows // count)


def own_places(mesh: Mesh) -> range:
    """Return the range of this process's devices among those that a batch is cut over, data by fsdp."""
    count = mesh.shape["data"] * mesh.shape["fsdp"]
    indices = batch_sharding(mesh).addressable_devices_indices_map((count,)).values()
    held = [index[0].indices(count) for index in indices if index]
    own = range(min(start for start, _, _ in held), max(stop for _, stop, _ in held))
    assert len(own) == sum(stop - start for start, stop, _ in set(held)), f"rows of one process lie apart: {held}"
    return own


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the sharding of an array that lies whole on every device."""
    return NamedSharding(mesh, PartitionSpec())


def check_run(config: RunConfig, mesh: Mesh):
    """Raise ConfigError if the batch or a parameter does not divide over the mesh, before any memory is allocated."""
    shares, T = config.mesh.sequence, config.data.sequence_length
    shards = mesh.shape["data"] * mesh.shape["fsdp"] // shares
    rows = config.train.batch_size // config.train.accumulation_steps
    if rows % shards:
        raise ConfigError(
            f"train.batch_size / train.accumulation_steps = {rows} rows do not divide over the {shards} shards of mesh.data "
            f"x mesh.fsdp; use a multiple of {shards * config.train.accumulation_steps} for train.batch_size"
        )
    if shares > 1 and T % (2 * shares):
        raise ConfigError(
            f"data.sequence_length={T} does not divide into the {2 * shares} chunks of mesh.sequence={shares}; use a "
            f"multiple of {2 * shares}, or another mesh.sequence"
        )
    if shares > 1 and config.lora and config.lora.dropout:
        raise ConfigError(
            f"lora.dropout={config.lora.dropout} is drawn for whole rows, which mesh.sequence={shares} divides; set one of "
            "the two to 0 and 1"
        )
    parameter_shardings(config.model, mesh)
    if config.lora:
        adapter_shardings(config.model, config.lora, mesh)


def fits_tiles(embed: int) -> tuple[bool, bool]:
    """Return whether the parts of `embed` elements that are scattered fill the rows of whole tiles, and the columns of pairs.

    The TPU compiler lays parts of 128, and of odd multiples, along a tile's columns where it may, and scatters sums only by
    pairs of those. Parts of other sizes lie along rows, 16 a tile. Found by compiling for v5e (libtpu 0.0.52). True where
    fsdp cuts nothing.
    """
    mesh = jax.sharding.get_abstract_mesh()
    shards = 1 if mesh.empty else mesh.shape["fsdp"]
    part = embed // (shards // 2 if fsdp_is_all() else shards)
    return shards == 1 or part % _TILE_ROWS == 0, shards == 1 or part % (2 * _TILE_COLUMNS) != _TILE_COLUMNS


def fsdp_is_all() -> bool:
    """Return whether the devices of fsdp are all there are, and more than two: sums over them take `in_two_sums`."""
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and mesh.shape["fsdp"] == mesh.size and mesh.size % 2 == 0 and mesh.size > 2


def in_two_sums(gradient: Float[Array, "*shape"], embed_axis: int) -> Float[Array, "*shape"]:
    """Have a kernel's gradient summed over the devices of fsdp in two steps, where those are all devices and TPUs.

    Each second device, and then pairs of neighbours. On some slices the TPU compiler sends a sum over all devices to each of
    them whole, for twice the bytes, and scatters one over a part of them. Found by compiling with libtpu 0.0.52: so for a
    v4-32, -64, -128 and a v5e-64, but a v5e-32 and -128 scatter both.
    """
    if not fsdp_is_all():
        return gradient
    half = jax.sharding.get_abstract_mesh().size // 2
    mesh = AbstractMesh((half, 2), ("far", "near"), axis_types=(AxisType.Auto,) * 2)
    parts = NamedSharding(mesh, PartitionSpec(*[None] * embed_axis, "far"))
    return jax.lax.platform_dependent(
        gradient, tpu=lambda x: jax.lax.with_sharding_constraint(x, parts), default=lambda x: x
    )


def constrain(x: Float[Array, "*shape"], *axes: str) -> Float[Array, "*shape"]:
    """Pin the sharding of an activation by its logical `axes`, inside a jitted function. Without a mesh: the identity."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    assert len(axes) == x.ndim, (axes, x.shape)
    tensor = mesh.shape["tensor"]
    entries = [None if a == "kv_heads" and x.shape[i] < tensor else RULES[a] for i, a in enumerate(axes)]
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*entries))
