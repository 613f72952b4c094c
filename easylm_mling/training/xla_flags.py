"""XLA compiler flags for each kind of chip, the same for `train` and for `plan`.

A flag stands here only with its reason. `train.compiler_flags` of a config goes over it.
"""

# Splits every matrix product after a gather into slices that overlap with the gather. With fsdp the slices are 96 columns
# wide and the matrix unit starves: 10.0 s of compute a step instead of 2.6 for Gemma 7B on a v4-64. A threshold that no
# product reaches switches it off.
_NO_WINDOWED_EINSUM = {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"}

# A layer's parameters are gathered while the layer before is computed. By default the device waits for them: 0.32 of
# 3.8 s a step for Gemma 7B on a v4-64.
_ASYNCHRONOUS = {"xla_enable_async_all_gather": "true", "xla_tpu_enable_latency_hiding_scheduler": "true"}

# v5p and v6e have SparseCores, which can run the collectives while the TensorCores compute: reduce-scatters, too, which
# are synchronous everywhere else. 0.27 of 1.84 s a sequence for Gemma 7B on a v5p-64.
_ON_SPARSE_CORES = {
    "xla_tpu_enable_sparse_core_collective_offload_all_gather": "true",
    "xla_tpu_enable_sparse_core_collective_offload_reduce_scatter": "true",
    "xla_tpu_enable_sparse_core_collective_offload_all_reduce": "true",
    "xla_tpu_enable_all_gather_offload_tracing": "true",
    "xla_tpu_use_tc_device_shape_on_sc": "true",
    "xla_sc_disable_megacore_partitioning": "true",
    # The other way of hiding a gather, which would come first.
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": "false",
}

# By default a fusion or kernel may plan with 16 MiB of the chip's vector memory, and products that compute more than a product
# in their outputs run at three quarters of their speed: 1.41 to 1.19 s a sequence for Gemma 7B's layers on a v5p, 3.26 to
# 3.14 on a v5e (32 MiB; 64 are no faster and compile twice as long), 1.30 at 32 MiB to 1.15 on a v6e. v4 takes no notice.
_VECTOR_MEMORY = "xla_tpu_scoped_vmem_limit_kib"

_FLAGS = {
    "TPU v4": {**_NO_WINDOWED_EINSUM, **_ASYNCHRONOUS},
    "TPU v5": {**_NO_WINDOWED_EINSUM, **_ASYNCHRONOUS, **_ON_SPARSE_CORES, _VECTOR_MEMORY: "49152"},
    "TPU v5 lite": {**_NO_WINDOWED_EINSUM, **_ASYNCHRONOUS, _VECTOR_MEMORY: "32768"},
    "TPU v6 lite": {**_NO_WINDOWED_EINSUM, **_ASYNCHRONOUS, **_ON_SPARSE_CORES, _VECTOR_MEMORY: "98304"},
    # A TensorCore of this chip has half the vector memory of a v6e's.
    "TPU7x": {**_NO_WINDOWED_EINSUM, **_ASYNCHRONOUS, **_ON_SPARSE_CORES, _VECTOR_MEMORY: "49152"},
}


def compiler_flags(device_kind: str, chosen: dict[str, str]) -> dict[str, str]:
    """Options for `jax.jit(compiler_options=)` on this kind of device (`Device.device_kind`), `chosen` last."""
    return {**_FLAGS.get(device_kind, {}), **chosen}
