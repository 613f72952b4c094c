"""The planner: what it reads out of compiled programs, and what it says of them."""

import dataclasses
import importlib.metadata
import importlib.util
import io
import json
import subprocess
import sys

import numpy as np
import pytest
from rich.console import Console

import easylm_mling.plan.compilation
from easylm_mling.cli.main import main
from easylm_mling.config import (
    REMAT_NAMES,
    DataConfig,
    MeshConfig,
    ModelConfig,
    ProductsConfig,
    RunConfig,
    SourceConfig,
    TrainConfig,
    from_tree,
    load,
    to_tree,
    to_yaml,
)
from easylm_mling.errors import ConfigError, UnknownFormat
from easylm_mling.hardware import CHIPS, GiB
from easylm_mling.model.flops import model_flops
from easylm_mling.model.splash_attention import _kernel
from easylm_mling.monitoring.plan_comparison import compare_with_plan
from easylm_mling.plan.buffers import largest_live
from easylm_mling.plan.calibrate import calibrate
from easylm_mling.plan.command import PlanOptions, plan, remedies
from easylm_mling.plan.hlo import flops, parse, trip_count
from easylm_mling.plan.measure import measure
from easylm_mling.plan.measurements import MeasurementCache, fits
from easylm_mling.plan.predict import predict
from easylm_mling.plan.remat import choose_remat, with_remat
from easylm_mling.plan.schedule import walk
from easylm_mling.plan.search import laid_out, search
from easylm_mling.plan.slices import SLICES, find_slice
from easylm_mling.plan.text import heading, sections
from easylm_mling.run.directory import RunDirectory
from easylm_mling.storage.object_store import write_run_format

V4 = find_slice("v4-64")
GATHERED = 4 * 1024 * 1024 * 31  # bytes that a chip takes in: 31 others' f32[1024,1024]


def program(entry: str, *computations: str) -> str:
    return (
        "HloModule step, is_scheduled=true\n\n"
        + "\n\n".join((*computations, f"ENTRY %main (x: f32[8]) -> f32[8] {{\n{entry}\n}}"))
        + "\n"
    )


def fusion(name: str, cycles: int, calls: str = "elementwise", operands: str = "%x") -> str:
    config = f'{{"flag_configs":[],"window_config":{{"estimated_cycles":"{cycles}","iteration_bounds":["1"]}}}}'
    return f"  %{name} = f32[8]{{0:T(256)}} fusion({operands}), kind=kLoop, calls=%{calls}, backend_config={config}"


ELEMENTWISE = "%elementwise (p: f32[8]) -> f32[8] {\n  %p = f32[8]{0} parameter(0)\n  ROOT %n = f32[8]{0} negate(%p)\n}"
PRODUCT = (
    "%product (a: bf16[64,32], b: bf16[32,16]) -> bf16[64,16] {\n"
    "  %a = bf16[64,32]{1,0:T(8,128)(2,1)} parameter(0)\n  %b = bf16[32,16]{1,0:T(8,128)(2,1)S(1)} parameter(1)\n"
    "  ROOT %c = bf16[64,16]{1,0:T(8,128)(2,1)} convolution(%a, %b), dim_labels=bf_io->bf\n}"
)
X = "  %x = f32[8]{0} parameter(0)"


def loop(body: str, attributes: str = "", limit: int = 7) -> tuple[str, str, str]:
    """A while loop's line, its body and its condition."""
    line = f"  %w = (s32[], f32[8]) while(%t), condition=%until, body=%body{attributes}"
    inside = f"%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {{\n  %x = f32[8]{{0}} parameter(0)\n{body}\n}}"
    until = (
        "%until (p: (s32[], f32[8])) -> pred[] {\n  %p = (s32[], f32[8]{0}) parameter(0)\n"
        f"  %n = s32[] constant({limit})\n  ROOT %c = pred[] compare(%p, %n), direction=LT\n}}"
    )
    return line, inside, until


def test_cycles_of_a_loop_count_once_for_each_trip_whoever_knows_the_number():
    for attributes, trips in ((', backend_config={"known_trip_count":{"n":"28"}}', 28), ("", 7)):
        line, body, until = loop(fusion("f", 1050) + "\n" + fusion("g", 2100, "product"), attributes)
        module = parse(program(f"{X}\n{line}\n{fusion('h', 105)}", ELEMENTWISE, PRODUCT, body, until))
        assert trip_count(module, module.computations["main"].by_name["w"]) == trips
        times = walk(module, V4)
        assert times.matrix == pytest.approx(trips * 2e-6) and times.other == pytest.approx(trips * 1e-6 + 1e-7)
        assert times.product_flops == trips * 2 * 64 * 32 * 16
        assert times.waiting == 0 and times.paid == times.hidden


def test_a_conditional_takes_its_slowest_branch():
    branches = [f"%{n} (p: f32[8]) -> f32[8] {{\n{X}\n{fusion('f', c)}\n}}" for n, c in (("a", 1050), ("b", 4200))]
    entry = f"{X}\n  %c = f32[8]{{0}} conditional(%x, %x, %x), branch_computations={{%a, %b}}"
    assert walk(parse(program(entry, ELEMENTWISE, *branches)), V4).hidden == pytest.approx(4e-6)


SHARD = "  %s = f32[1024,1024]{1,0:T(8,128)} parameter(1)"
GATHER = "f32[32768,1024]{1,0:T(8,128)}"


def test_a_synchronous_collective_is_waited_for_and_an_asynchronous_one_only_beyond_the_compute_over_it():
    groups = "replica_groups=mesh['axis_0'=32] {'axis_0'}, dimensions={0}"
    seconds = GATHERED / 90e9
    sync = f"{X}\n{SHARD}\n  %g = {GATHER} all-gather(%s), {groups}\n{fusion('f', 1050)}"
    times = walk(parse(program(sync, ELEMENTWISE)), V4)
    assert times.waiting == pytest.approx(seconds) and times.paid == pytest.approx(seconds + 1e-6)

    def behind(cycles):
        start = f"  %g = (f32[1024,1024], {GATHER}) all-gather-start(%s), {groups}"
        done = f"  %d = {GATHER} all-gather-done(%g)"
        return walk(parse(program(f"{X}\n{SHARD}\n{start}\n{fusion('f', cycles)}\n{done}", ELEMENTWISE)), V4)

    assert behind(1_050_000).waiting == pytest.approx(seconds - 1e-3)
    assert behind(1_050_000_000).waiting == 0


def test_a_collective_on_the_sparse_cores_hides_behind_compute():
    offloaded = (
        "%offloaded (p: f32[1024,1024]) -> f32[32768,1024] {\n  %p = f32[1024,1024] parameter(0)\n"
        f"  ROOT %a = {GATHER} all-gather(%p), replica_groups=mesh['axis_0'=32] {{'axis_0'}}, dimensions={{0}}\n}}\n\n"
        "%wrapped (p: f32[1024,1024]) -> f32[32768,1024] {\n  %p = f32[1024,1024] parameter(0)\n"
        f'  ROOT %c = {GATHER} custom-call(%p), custom_call_target="x", called_computations={{%offloaded}}\n'
        '}, execution_thread="sparsecore"'
    )

    def behind(cycles):
        start = '  %g = ((), (), s32[8]) async-start(), async_execution_thread="sparsecore", calls=%wrapped'
        update = f"  %u = ((f32[1024,1024]), {GATHER}, s32[8]) async-update(%g, %s)"
        main = f"{X}\n{SHARD}\n{start}\n{update}\n{fusion('f', cycles)}\n  %d = {GATHER} async-done(%u)"
        return walk(parse(program(main, f"{ELEMENTWISE}\n\n{offloaded}")), V4)

    seconds = GATHERED / 90e9
    assert behind(1_050_000).waiting == pytest.approx(seconds - 1e-3)
    assert behind(1_050_000_000).waiting == 0
    assert [c.kind for c in behind(0).collectives] == ["all-gather"]


def chain_part(name: str, target: str) -> str:
    call = (
        f'  ROOT %r = f32[8] custom-call(%g), custom_call_target="AsyncCollective{target}"'
        if target
        else "  ROOT %r = f32[8] negate(%g)"
    )
    gather = (
        f"  %g = {GATHER} all-gather(%s), replica_groups=mesh['a'=32] {{'a'}}, frontend_attributes={{chain_id=\"7\"}}"
    )
    return f"%{name} (s: f32[1024,1024]) -> f32[8] {{\n{SHARD.replace('(1)', '(0)')}\n{gather}\n{call}\n}}"


def test_a_collective_carried_through_fusions_counts_once_and_hides_behind_its_steps():
    parts = [chain_part("begin", "Start"), chain_part("middle", ""), chain_part("end", "Done")]
    lines = [f"  %{name} = f32[8] fusion(%s), kind=kCustom, calls=%{name}" for name in ("begin", "end")]
    entry = "\n".join([X, SHARD, lines[0], fusion("work", 1_050_000, "middle"), lines[1]])
    times = walk(parse(program(entry, ELEMENTWISE, *parts)), V4)
    assert sum(times.collectives.values()) == 1 and times.other == pytest.approx(1e-3)
    assert times.waiting == pytest.approx(GATHERED / 90e9 - 1e-3)


def test_two_collectives_under_way_share_one_link():
    start = (
        "  %{0} = (f32[1024,1024], f32[32768,1024]) all-gather-start(%s), replica_groups=[1,32]<=[32], dimensions={{0}}"
    )
    done = "  %{0}d = f32[32768,1024] all-gather-done(%{0})"
    lines = [start.format("a"), start.format("b"), done.format("a"), done.format("b")]
    times = walk(parse(program("\n".join([X, SHARD, *lines]), ELEMENTWISE)), V4)
    assert times.waiting == pytest.approx(2 * GATHERED / 90e9)


def test_bytes_of_each_kind_of_collective():
    size = 4 * 1024 * 1024
    reduce = "  %r = f32[1024,1024] all-reduce(%s), replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%elementwise"
    scatter = (
        "  %r = f32[256,1024] reduce-scatter(%s), replica_groups=[8,4]<=[32], dimensions={0}, to_apply=%elementwise"
    )
    fused = "  %r = f32[256,1024] fusion(%s), kind=kCustom, calls=%all-reduce-scatter.1"
    inside = (
        "%all-reduce-scatter.1 (s: f32[1024,1024]) -> f32[256,1024] {\n"
        + SHARD.replace("(1)", "(0)")
        + "\n"
        + reduce
        + "\n}"
    )
    permute = "  %r = f32[1024,1024] collective-permute(%s), source_target_pairs={{0,1},{1,0}}"
    for line, kind, expected in (
        (reduce, "all-reduce", 2 * size * 3 / 4),
        (scatter, "reduce-scatter", size * 3 / 4),
        (fused, "reduce-scatter", size * 3 / 4),
        (permute, "collective-permute", size),
    ):
        (collective,) = walk(parse(program(f"{X}\n{SHARD}\n{line}", ELEMENTWISE, inside)), V4).collectives
        assert (collective.kind, collective.bytes) == (kind, expected)


def test_a_group_that_reaches_into_another_slice_uses_the_network_between_them():
    two = find_slice("2xv4-64")
    line = "  %r = f32[1024,1024] all-reduce(%s), replica_groups={groups}, to_apply=%elementwise"
    for groups, between in (
        ("mesh['a'=2,'b'=32] {'a'}", True),
        ("mesh['a'=2,'b'=32] {'b'}", False),
        ("[32,2]<=[2,32]T(1,0)", True),
    ):
        (collective,) = walk(
            parse(program(f"{X}\n{SHARD}\n{line.replace('{groups}', groups)}", ELEMENTWISE)), two
        ).collectives
        assert collective.link == ("slices" if between else "chips")
        assert collective.seconds(two) == pytest.approx(collective.bytes / (3.1e9 if between else 90e9))


def test_what_slices_send_to_each_other_is_an_asynchronous_collective_on_a_link_of_its_own():
    two, meet = (
        find_slice("2xv4-64"),
        'frontend_attributes={_xla_host_transfer_rendezvous="r.1",_xla_megascale_transfer_type="ALL_REDUCE"}',
    )
    send = f"  %send.1 = (f32[1024,1024], u32[], token[]) send(%s, %t), {meet}"
    receive = f"  %recv.1 = (f32[1024,1024], u32[], token[]) recv(%t), {meet}"
    done = "  %recv-done.1 = (f32[1024,1024], token[]) recv-done(%recv.1)"
    gather = f"  %g = {GATHER} all-gather(%s), replica_groups=[2,32]<=[64], dimensions={{0}}"
    inside = GATHERED / 90e9
    for cycles in (0, 1_050_000):
        lines = [X, SHARD, "  %t = token[] after-all()", send, gather, fusion("f", cycles), receive, done]
        times = walk(parse(program("\n".join(lines), ELEMENTWISE)), two)
        # Both slices' halves go over: 2 x size x 1/2.
        assert times.waiting == pytest.approx(inside + max(0, 4 * 1024**2 / 3.1e9 - inside - cycles / 1.05e9))
        assert {(c.kind, c.link) for c in times.collectives} == {("all-gather", "chips"), ("all-reduce", "slices")}


def test_what_goes_to_the_host_and_back_hides_behind_compute_on_a_link_of_its_own():
    far, near, indices = "bf16[128,1024,1024]{2,1,0:S(5)}", "bf16[64,1024,1024]{2,1,0}", "s32[]"
    gather = f"  %g = {GATHER} all-gather(%s), replica_groups=[1,32]<=[32], dimensions={{0}}"
    moved = 2 * 64 * 1024**2 / 15e9
    for start, done in (
        (f"(({far}, {near}, {indices}), {far}, u32[]) dynamic-update-slice-start(%x)", "dynamic-update-slice-done"),
        (f"(({far}, {indices}), {near}, u32[]) dynamic-slice-start(%x)", "dynamic-slice-done"),
        (f"({near}, {near.replace('}', ':S(5)}')}, u32[]) copy-start(%x)", "copy-done"),
    ):
        lines = [X, SHARD, f"  %m = {start}", gather, fusion("f", 10_500), f"  %d = {far} {done}(%m)"]
        times = walk(parse(program("\n".join(lines), ELEMENTWISE)), V4)
        assert {(c.kind, c.link) for c in times.collectives} == {("all-gather", "chips"), ("transfer", "host")}
        assert times.waiting == pytest.approx(moved - 1e-5) and moved > GATHERED / 90e9


def test_flops_of_a_batched_product_written_as_a_convolution():
    """XLA's form of a product with a batch of 4: one tap of the window lies on the input, the others on its dilation."""
    lines = (
        "  %a = bf16[4,64,32]{2,1,0} parameter(0)\n  %b = bf16[4,32,16]{2,1,0} parameter(1)\n"
        "  ROOT %c = bf16[4,64,16]{2,1,0} convolution(%a, %b), window={size=4 stride=3 lhs_dilate=4}, dim_labels=0bf_0io->0bf"
    )
    main = parse(program(lines)).computations["main"]
    assert flops(main, main.by_name["c"]) == 2 * 4 * 64 * 32 * 16


KERNEL = (
    '  %splash_mha_{kind}.1 = bf16[16,8192,256]{{2,1,0}} custom-call(%m, %q, %q, %q), custom_call_target="tpu_custom_call", '
    "frontend_attributes={{kernel_metadata={{\n"
    '"xprof_metadata":"{{\\"block_q{suffix}\\": {block}, \\"block_kv{suffix}\\": {block}}}"\n'
    '}}}}, metadata={{op_name="jit(f)/splash_mha_{kind}/pallas_call"}}'
)


def attention_times(kind: str, block: int, heads: int = 16, suffix: str = "", table: tuple = (), target=V4):
    """`table`: the shape of the kernel's table of blocks; by default it has all of them."""
    q = f"  %q = bf16[{heads},8192,256]{{2,1,0}} parameter(1)"
    n = 8192 // block
    mask = f"  %m = s8[{','.join(map(str, table or (1, n, n)))}]{{2,1,0}} parameter(2)"
    return walk(parse(program("\n".join([X, q, mask, KERNEL.format(kind=kind, block=block, suffix=suffix)]))), target)


def test_splash_kernels_take_what_their_bundles_take_scaled_by_heads():
    assert attention_times("fwd", 512).attention == pytest.approx(4.37e-3)
    assert attention_times("dq", 1024, suffix="_dq").attention == pytest.approx(7.76e-3)
    assert attention_times("dkv", 1024, heads=8, suffix="_dkv").attention == pytest.approx(10.13e-3 / 2)
    times = attention_times("fwd", 512)
    assert times.kernel_flops == pytest.approx(4 * 16 * 8192**2 * 256 * 17 / 32)
    assert times.hidden == times.attention


@pytest.mark.parametrize("name", ["v4-64", "v5p-64", "v5e-64", "v6e-64", "tpu7x-64"])
def test_no_kernel_is_faster_than_the_matrix_unit(name):
    """A bundle is not a cycle: on v5e and v5p the backward kernels' bundles are fewer than the cycles of their products."""
    target, floors = find_slice(name), 0
    for kind, suffix in (("fwd", ""), ("dq", "_dq"), ("dkv", "_dkv")):
        for lead in ("16,", "16,1,"):
            lines = f"  %q = bf16[{lead}8192,256] parameter(1)\n  %m = s8[1,8,8]{{2,1,0}} parameter(2)\n"
            text = program(f"{X}\n{lines}{KERNEL.format(kind=kind, block=1024, suffix=suffix)}")
            times = walk(parse(text), target)
            one_core = kind != "fwd" and target.chip.core_config == "megacore" and lead == "16,"
            floor = times.kernel_flops / target.chip.peak_flops * (2 if one_core else 1)
            assert times.attention >= floor
            floors += times.attention == pytest.approx(floor, rel=1e-9)
    # dkv and dq, alone and mapped.
    assert floors == (4 if name in ("v5e-64", "v5p-64") else 0)


@pytest.mark.parametrize("kind, table", [("fwd", "fwd_mask_info"), ("dq", "dq_mask_info"), ("dkv", "dkv_mask_info")])
def test_every_kernel_of_a_local_layer_visits_its_window_only(kind, table):
    """By the tables that JAX's kernel makes: dkv has the queries of each block of keys along another axis."""
    suffix = "" if kind == "fwd" else f"_{kind}"
    for window, visited in ((None, 36), (1024, 15), (2000, 21), (4096, 30)):  # of 64 blocks
        info = getattr(_kernel(8192, 1, window, None, 1024, False), table)
        assert np.count_nonzero(info.block_mask) == visited  # a kernel skips the others
        times = attention_times(kind, 1024, suffix=suffix, table=info.data_next.shape)
        products = {"fwd": 2, "dq": 3, "dkv": 4}[kind]
        assert times.kernel_flops == pytest.approx(2 * products * 16 * 8192**2 * 256 * visited / 64)


@pytest.mark.parametrize("kind, table", [("fwd", "fwd_mask_info"), ("dq", "dq_mask_info"), ("dkv", "dkv_mask_info")])
def test_a_kernel_of_a_share_of_the_queries_does_its_share_of_the_work(kind, table):
    """Of a row of 32,768 over four devices: 8192 queries of each, and all keys."""
    suffix = "" if kind == "fwd" else f"_{kind}"
    shapes = getattr(_kernel(32768, 1, None, None, 1024, False, shares=4), table).data_next.shape
    of_share = (1, shapes[1] // 4, shapes[2])
    lines = "  %q = bf16[16,8192,256]{2,1,0} parameter(1)\n  %k = bf16[32768,256]{1,0} parameter(3)\n"
    lines += f"  %m = s8[{','.join(map(str, of_share))}]{{2,1,0}} parameter(2)\n"
    call = KERNEL.format(kind=kind, block=1024, suffix=suffix).replace("%q, %q, %q", "%q, %k, %k")
    products = {"fwd": 2, "dq": 3, "dkv": 4}[kind]
    flops = walk(parse(program(f"{X}\n{lines}{call}")), V4).kernel_flops
    assert flops == pytest.approx(2 * products * 16 * 32768**2 * 256 * (33 / 64) / 4)


def test_a_backward_kernel_mapped_over_heads_runs_on_both_cores_of_a_v4():
    lines = "  %q = bf16[16,1,8192,256]{3,2,1,0} parameter(1)\n  %m = s8[1,8,8]{2,1,0} parameter(2)\n"
    for name, factor in (("v4-64", 0.5), ("v6e-64", 1.0)):
        alone, mapped = (
            walk(
                parse(program(f"{X}\n{q}{KERNEL.format(kind='dq', block=1024, suffix='_dq')}")), find_slice(name)
            ).attention
            for q in (lines.replace("16,1,", "16,").replace("{3,2,1,0} p", "{2,1,0} p"), lines)
        )
        assert mapped == pytest.approx(factor * alone)


def test_the_largest_buffers_are_those_alive_at_the_peak():
    report = (
        "HloLiveRange (max 3):\n  BufferLiveRange:\n    early{}:0-1\n  Live ranges at 2 (peak):\n"
        "    f{}: 32 bytes (cumulative: 32 bytes)\n    x{}: 64 bytes (cumulative: 96 bytes)\n  Stack trace breakdown\n    y{}: 999 bytes\n"
    )
    module = parse(program(f"{X}, metadata={{op_name=\"state.params[\\'norm\\']\"}}\n{fusion('f', 1)}", ELEMENTWISE))
    buffers = largest_live(report, module)
    assert [(b.name, b.bytes, b.shape, b.what) for b in buffers] == [
        ("x", 64, "f32[8]", "state.params['norm']"),
        ("f", 32, "f32[8]", ""),
    ]


def test_model_flops_of_gemma_7b():
    seven = ModelConfig(256000, 3072, 24576, 28, 16, 16, 256)
    assert model_flops(seven, 8192) == pytest.approx(465.8e12, rel=1e-4)


def test_an_embedding_that_is_only_looked_up_is_no_work():
    shape = (1000, 64, 128, 2, 4, 4, 16)
    tied, untied = (ModelConfig(*shape, model_type="llama", tie_word_embeddings=tied) for tied in (True, False))
    assert model_flops(untied, 512) == model_flops(tied, 512)


def test_attention_of_a_window_counts_only_what_it_shows():
    shape = (1000, 64, 128, 2, 4, 4, 16)
    whole = model_flops(ModelConfig(*shape), 512)
    local = model_flops(ModelConfig(*shape, model_type="gemma2", sliding_window=128, sliding_window_pattern=2), 512)
    norms = 6 * 512 * 2 * 2 * 64  # Gemma 2 has two norms more a layer
    assert whole + norms - local == pytest.approx(12 * 64 * (512**2 / 2 - (512 * 128 - 128**2 / 2)))


def test_slices_have_the_chips_that_their_names_say():
    for name, s in SLICES.items():
        number = int(name.split("-")[1])
        cores = 2 if s.chip.name in ("v4", "v5p", "tpu7x") else 1
        assert s.chips == number // cores and s.devices == (number if s.chip.name == "tpu7x" else s.chips)
        assert s.chips % s.hosts == 0
    assert find_slice("2xv5e-256").chips == 512 and find_slice("v5litepod-8").name == "v5litepod-8"


@pytest.mark.parametrize("name", ["", "v4-65", "v9-8", "0xv4-64", "v4"])
def test_an_unknown_slice_is_refused_with_the_known_ones(name):
    with pytest.raises(ConfigError, match="v4-64.*v6e-256") as error:
        find_slice(name)
    assert "\n" not in str(error.value)


def make_config(slice_name="v4-64", rows=128, run_dir="runs/x", **train) -> RunConfig:
    return RunConfig(
        run_dir=str(run_dir),
        model=ModelConfig(256000, 3072, 24576, 28, 16, 16, 256),
        data=DataConfig("tokenizer.model", {"a": SourceConfig(("x",), 1.0)}, sequence_length=8192),
        train=TrainConfig(budget_tokens=100_000_000_000, batch_size=rows, accumulation_steps=4, **train),
        mesh=MeshConfig(1, 32, 1, slice=slice_name),
    )


def measured(matrix=8.0, waiting=2.0, peak=20 * GiB) -> dict:
    return {
        "memory": {"peak": peak, "arguments": 1, "temporaries": 1, "host": 0},
        "buffers": [{"name": "f", "bytes": GiB, "shape": "f32[8]", "what": "jit(train_step)/while/body/transpose(jvp())/add"}],
        "times": {
            "matrix": matrix, "other": 1.0, "attention": 1.0, "waiting": waiting, "product_flops": 2e15, "kernel_flops": 5e14,
        },
        "collectives": [],
        "kernels": [],
    }  # fmt: skip


def test_a_prediction_adds_up():
    one = predict(make_config(), measured(), price=2.0)
    assert one["step"]["seconds"] == 12.0 and one["step"]["hidden"] == 10.0
    assert one["tokens_per_second"] == pytest.approx(128 * 8192 / 12)
    assert one["days"] == pytest.approx(12 * make_config().total_steps / 86400)
    assert one["cost"] == pytest.approx(2.0 * 32 * 24 * one["days"])
    assert one["mfu"] == pytest.approx(465.82e12 * 4 / 12 / 275e12, rel=1e-4)
    assert one["seconds_a_sequence"]["paid"] == 3.0
    assert one["hardware_flops_per_model_flop"] == pytest.approx(2.5e15 / (465.82e12 * 4), rel=1e-4)
    assert one["checkpoint"]["bytes"] == 12 * 8_537_680_896
    slower = predict(make_config(), measured(), factor=1.5)
    assert slower["step"]["seconds"] == 18.0 and any("1.500" in line for line in slower["assumptions"])


def test_a_chip_of_two_devices_is_planned_by_devices_and_paid_by_chips():
    """32 chips of Ironwood are 64 devices, each with half of a chip's peak and memory."""
    config = dataclasses.replace(make_config("tpu7x-64"), mesh=MeshConfig(1, -1, 1, slice="tpu7x-64"))
    one = predict(config, measured(), price=2.0)
    assert (one["chips"], one["devices"], one["hosts"], one["sequences_a_chip"]) == (32, 64, 8, 4)
    assert one["mfu"] == pytest.approx(465.82e12 * 128 / 12 / 32 / 2307e12, rel=1e-4)
    assert one["cost"] == pytest.approx(2.0 * 32 * 24 * one["days"])
    assert one["memory"]["available"] < 96 * GiB
    assert heading(config, one).startswith("tpu7x-64: 32 chips of 2 devices on 8 hosts; data 1 x fsdp 64 x tensor 1")
    assert "of 94.8 GiB a device" in sections(config, one)["fits"][0]
    assert any("instruction bundles for a v6e" in line for line in one["assumptions"])
    assert laid_out(config, 1, 1, 1).mesh.fsdp == 64
    line = "  %r = f32[1024,1024] all-reduce(%s), replica_groups={}, to_apply=%elementwise"
    (every,) = walk(parse(program(f"{X}\n{SHARD}\n{line}", ELEMENTWISE)), find_slice("tpu7x-64")).collectives
    assert every.group == 64 and every.link == "chips"


def test_a_plan_with_products_of_8_bits_says_what_its_peaks_are():
    def planned(**products):
        config = make_config("v6e-64", products=ProductsConfig(**products) if products else None)
        one = predict(config, measured())
        return one, heading(config, one)

    (plain, without), (both, text) = planned(), planned(forward="int8", backward="int8")
    # Of the bf16 peak in either case, so that it compares step times.
    assert both["mfu"] == plain["mfu"] == pytest.approx(465.82e12 * 128 / 64 / 12 / 918e12, rel=1e-4)
    assert "918 TFLOP/s in bf16, 1836 in int8" in both["assumptions"][0] and "int8" not in plain["assumptions"][0]
    assert any("MFU is of the bf16 peak" in line for line in both["assumptions"])
    assert not any("MFU" in line for line in plain["assumptions"])
    assert "; int8 products forward, int8 backward; 128 sequences" in text and "products" not in without


def test_chips_with_faster_products_of_8_bits():
    fast = {(name, kind) for name, c in CHIPS.items() for kind in ("int8", "fp8") if c.peak_in(kind)}
    assert fast == {("v5p", "int8"), ("v5e", "int8"), ("v6e", "int8"), ("tpu7x", "fp8")}
    assert all(CHIPS[n].peak_in(k) == pytest.approx(2 * CHIPS[n].peak_flops, rel=1e-3) for n, k in fast)


def test_a_plan_that_leaves_memory_idle_says_who_would_use_it():
    def fits(peak, **train):
        config = make_config(**train)
        return sections(config, predict(config, measured(peak=peak)))["fits"]

    assert "train.remat=auto" in fits(20 * GiB)[-1]
    assert "train.remat=auto" not in fits(28 * GiB)[-1] and "train.remat=auto" not in fits(20 * GiB, remat="none")[-1]


class FakeCompiler:
    """In place of `Measuring`: fsdp alone waits longest, tensor is slow, and what layers keep costs memory and saves time."""

    started: list[RunConfig] = []

    def __init__(self, config: RunConfig):
        self.config = config
        FakeCompiler.started.append(config)

    def result(self, wait=0):
        m, t, layers = self.config.mesh, self.config.train, self.config.model.num_hidden_layers
        rows, first = 128 // t.accumulation_steps / 32, t.remat_first_layers / layers
        kept = REMAT_NAMES.index(t.remat) * (1 - first) + REMAT_NAMES.index(t.remat_first) * first
        # Two portions hold a little more than their mean: what was interpolated has to be corrected.
        peak = int((8 + 4 * rows + 6 * kept + m.data + (1.5 if first else 0)) * GiB)
        if peak > 30 * GiB:
            return {"does_not_fit": {"needed": peak, "available": 30 * GiB, "buffers": []}}
        return measured(matrix=8.0 + 3 * m.tensor - kept, waiting=2.0 / m.data / rows, peak=peak)

    def close(self):
        pass


@pytest.fixture
def fake_compiler(monkeypatch):
    FakeCompiler.started = []
    monkeypatch.setattr("easylm_mling.plan.measurements.Measuring", FakeCompiler)
    # The real one asks for the version of libtpu, which need not be installed for this.
    monkeypatch.setattr("easylm_mling.plan.measurements.code_fingerprint", lambda: "code")
    return FakeCompiler.started


def test_a_search_finds_the_fastest_that_fits_and_goes_on_where_it_was_stopped(tmp_path, fake_compiler, capsys):
    config = make_config(run_dir=tmp_path / "run")
    options = PlanOptions(search=str(tmp_path / "plans"), keep=True)
    assert plan({"": config}, options, Console(width=120)) == 0
    tried = list(fake_compiler)
    assert {128 // 32 // c.train.accumulation_steps for c in tried if c.mesh.tensor == 1} == {1, 2, 4}
    assert all(c.train.batch_size == 128 for c in tried) and len({to_yaml(c) for c in tried}) == len(tried)

    best = load([str(tmp_path / "plans/best.yaml")])
    again = search(config, str(tmp_path / "plans"), Console(file=io.StringIO()))
    seconds = {to_yaml(c): predict(c, m)["step"]["seconds"] for c, m in again if fits(c, m)}
    assert seconds[to_yaml(best)] == min(seconds.values())
    assert best.mesh.tensor == 1 and best.train.remat_first_layers > 0
    assert json.loads((tmp_path / "run/plan.json").read_text())["step"]["seconds"] == min(seconds.values())
    assert len(fake_compiler) == len(tried)  # the second search measured nothing

    with open(tmp_path / "plans/measured.jsonl", "rb+") as file:
        file.truncate(file.seek(0, io.SEEK_END) - 10)  # killed while it wrote the last line
    search(config, str(tmp_path / "plans"), Console(file=io.StringIO()))
    assert len(fake_compiler) == len(tried) + 1
    assert "do not fit 92% of" in capsys.readouterr().out


def test_auto_remat_fills_the_memory_and_beats_every_uniform_policy(fake_compiler, capsys):
    config = make_config(remat="auto")
    chosen = choose_remat(config, MeasurementCache(), Console(width=120))
    seconds = {}
    for tried in {to_yaml(c): c for c in fake_compiler}.values():
        result = FakeCompiler(tried).result()
        if "times" in result and result["memory"]["peak"] <= 0.92 * 30.75 * GiB:
            seconds[to_yaml(tried)] = sum(result["times"][k] for k in ("matrix", "waiting"))
    assert seconds[to_yaml(chosen)] == min(seconds.values())
    assert min(seconds.values()) < min(seconds.get(to_yaml(with_remat(config, p)), 99) for p in REMAT_NAMES)
    # One layer more would not fit.
    richer = with_remat(chosen, chosen.train.remat, chosen.train.remat_first, chosen.train.remat_first_layers + 1)
    result = FakeCompiler(richer).result()
    assert "does_not_fit" in result or result["memory"]["peak"] > 0.92 * 30.75 * GiB
    assert f"train.remat={chosen.train.remat} train.remat_first=" in capsys.readouterr().out
    assert choose_remat(chosen, MeasurementCache(), Console()) is chosen


def test_auto_remat_leaves_what_goes_to_the_host_alone(fake_compiler):
    chosen = choose_remat(make_config(remat="auto", offload=("gate",)), MeasurementCache(), Console(file=io.StringIO()))
    assert chosen.train.offload == ("gate",) and "none" not in {c.train.remat for c in FakeCompiler.started}


def test_auto_remat_where_nothing_fits_says_what_would_need_less(fake_compiler):
    with pytest.raises(ConfigError, match="nothing fits a chip of v5e-64.*accumulation"):
        choose_remat(
            dataclasses.replace(make_config(remat="auto"), mesh=MeshConfig(17, 1, 1, slice="v5e-64")),
            MeasurementCache(),
            Console(),
        )


def test_a_batch_that_no_mesh_divides_is_refused_before_anything_is_compiled(tmp_path, fake_compiler):
    with pytest.raises(ConfigError, match="train.batch_size=20.*multiple of 32"):
        search(make_config(rows=20), str(tmp_path), Console(file=io.StringIO()))
    assert not fake_compiler


def test_what_does_not_fit_says_by_how_much_and_what_would(fake_compiler):
    out = io.StringIO()
    config = make_config(remat="none")
    assert plan({"": config}, PlanOptions(), Console(file=out, width=200)) == 1
    needed = 13 + 6 * REMAT_NAMES.index("none")
    assert f"does not fit by {needed - 30:.1f} GiB: {needed:.1f} of 30.0" in out.getvalue()
    assert "what would fit: v4-64 with data 1 x fsdp 32 x tensor 1; remat full" in out.getvalue()
    assert remedies(make_config(rows=256))[0].train.accumulation_steps == 8  # full remat is what it has
    assert {c.mesh.slice for c in remedies(make_config(rows=256))} >= {"v4-64", "v4-128", "v4-256"}


def test_two_configs_side_by_side(tmp_path, fake_compiler, capsys):
    for name, config in (("a", make_config()), ("b", make_config(remat="save_attention"))):
        (tmp_path / f"{name}.yaml").write_text(to_yaml(config))
    files = [str(tmp_path / f"{name}.yaml") for name in "ab"]
    assert main(["plan", "mesh.slice=v4-64", "--compare", *files]) == 0
    assert "save_attention" in capsys.readouterr().out
    assert main(["plan", "--json", "--compare", *files]) == 0
    plans = json.loads(capsys.readouterr().out)
    assert plans[files[0]]["step"]["seconds"] == plans[files[1]]["step"]["seconds"] + 1.0


def write_run(path, seconds: float, steps: int = 30):
    path.mkdir()
    (path / "config.yaml").write_text(to_yaml(make_config(run_dir=path)))
    write_run_format(path)
    lines = [{"kind": "train", "step": n, "time": 1000 + n * seconds + (60 if n > 20 else 0)} for n in range(1, steps)]
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_a_run_corrects_the_next_plan(tmp_path, fake_compiler, capsys):
    """The fake predicts 15 s, 13 of them compute; an evaluation of a minute in between does not count."""
    for seconds, word in ((30.0, "slower"), (14.0, "more of the collectives is hidden"), (10.0, "too many")):
        run = tmp_path / str(seconds)
        write_run(run, seconds)
        assert main(["plan", "--calibrate", str(run)]) == 0
        assert json.loads((run / "calibration.json").read_text())["factor"] == pytest.approx(seconds / 15)
        assert word in capsys.readouterr().out
    write_run(tmp_path / "short", 1.0, steps=4)
    with pytest.raises(ConfigError, match="fewer than 5 steps"):
        calibrate(str(tmp_path / "short"), lambda config: {})


def test_train_puts_what_it_measures_beside_the_plan(tmp_path):
    run = tmp_path / "run"
    write_run(run, 13.0)
    config = make_config(run_dir=run)
    bare = compare_with_plan(run, config, "TPU v4", 32, 21 * GiB)
    assert bare == "13.000 s a step, MFU 52.1%, peak memory 21.0 GiB"
    (run / "plan.json").write_text(json.dumps({"format": 1, **predict(config, measured())}))
    line = compare_with_plan(run, config, "TPU v4", 32, 21 * GiB)
    assert line == "13.000 s a step (12.000 planned), MFU 52.1% (56.5% planned), peak memory 21.0 GiB (20.0 planned)"
    assert compare_with_plan(tmp_path / "no", config, "TPU v4", 32, None) is None


def test_a_plan_of_another_format_is_refused_by_name_and_ends_no_run(tmp_path):
    run = tmp_path / "run"
    write_run(run, 13.0)
    for number, stored in ((None, "no format number"), (2, "format 2")):
        (run / "plan.json").write_text(json.dumps({"format": number} if number else predict(make_config(), measured())))
        with pytest.raises(UnknownFormat, match=f"plan.json: this plan has {stored}.*plan --keep"):
            calibrate(str(run), lambda config: {})
        assert stored in (compare_with_plan(run, make_config(), "TPU v4", 32, None) or "")


def test_a_run_may_begin_in_a_directory_that_holds_only_its_plan(tmp_path):
    (tmp_path / "plan.json").write_text("{}")
    RunDirectory(make_config(run_dir=tmp_path))
    (tmp_path / "other").write_text("")
    with pytest.raises(ConfigError, match="not empty"):
        RunDirectory(make_config(run_dir=tmp_path))


def test_plan_without_the_compiler_says_how_to_get_it(monkeypatch, tmp_path, capsys):
    def version(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    (tmp_path / "a.yaml").write_text(to_yaml(make_config()))
    assert main(["plan", str(tmp_path / "a.yaml")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "easylm-mling[tpu]" in line


needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
needs_qwix = pytest.mark.skipif(importlib.util.find_spec("qwix") is None, reason="train.products needs qwix")


@needs_libtpu
@pytest.mark.tpu_compiler
@pytest.mark.parametrize(
    "change, message",
    [
        ({"mesh": MeshConfig(1, 16, 1, slice="v4-64")}, "does not multiply to the 32 devices"),
        ({"train": TrainConfig(budget_tokens=1, batch_size=20)}, "do not divide over the 32 shards"),
    ],
)
def test_what_cannot_be_cut_is_refused_in_one_line(change, message):
    config = dataclasses.replace(make_config(), **change)
    error = measure(config)["error"]
    assert message in error and "\n" not in error


@needs_libtpu
@pytest.mark.tpu_compiler
@pytest.mark.parametrize("flag", ["xla_no_such_flag", "xla_jf_xlu_optimizer"])
def test_a_flag_that_the_compiler_refuses_is_told_in_one_line(flag):
    mesh = MeshConfig(1, 4, 1, slice="v5e-4")
    train = TrainConfig(budget_tokens=1, batch_size=4, compiler_flags={flag: "neither"})
    config = dataclasses.replace(make_config(), mesh=mesh, train=train, model=ModelConfig(256, 128, 256, 1, 1, 1, 128))
    error = measure(config)["error"]
    assert f"train.compiler_flags.{flag}" in error and "\n" not in error


def test_flags_may_be_written_as_they_are_meant(tmp_path):
    (tmp_path / "a.yaml").write_text(to_yaml(make_config()))
    flags = ["train.compiler_flags.xla_a=true", "train.compiler_flags.xla_b=32", "train.compiler_flags.xla_c=x"]
    config = load([str(tmp_path / "a.yaml")], flags)
    assert config.train.compiler_flags == {"xla_a": "true", "xla_b": "32", "xla_c": "x"}
    assert load([str(tmp_path / "a.yaml")], flags) == from_tree(RunConfig, to_tree(config))


@needs_libtpu
@pytest.mark.slow
@pytest.mark.tpu_compiler
@pytest.mark.long
def test_a_step_compiled_in_short_is_planned_as_the_whole(monkeypatch):
    # Of Gemma 7B's width: operations that are compiled twice are the large ones.
    config = make_config("v6e-8", rows=8, remat="save_dots")
    config = dataclasses.replace(config, mesh=MeshConfig(1, 8, 1, slice="v6e-8"))
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, accumulation_steps=1))
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, num_hidden_layers=2))
    options, compiled = [], easylm_mling.plan.compilation._compile

    def seen(lowered, chosen):
        options.append(chosen)
        return compiled(lowered, chosen)

    monkeypatch.setattr(easylm_mling.plan.compilation, "_compile", seen)
    short = measure(config)
    monkeypatch.setattr(easylm_mling.plan.compilation, "_ESTIMATES_ONLY", {})
    whole = measure(config)
    assert len(options) == 2 and options[0] and not options[1]
    assert short == whole


@needs_libtpu
@pytest.mark.slow
@pytest.mark.tpu_compiler
def test_gemma_7b_on_a_v4_64_keeps_its_memory_and_its_work():
    result = measure(make_config())
    times, wanted = result["times"], model_flops(make_config().model, 8192) * 4
    assert result["memory"]["peak"] < 12.5 * GiB and len(result["buffers"]) == 5
    # Full remat: a second forward pass, but for the last product of each layer; the logits are computed once.
    assert 1.25 < (times["product_flops"] + times["kernel_flops"]) / wanted < 1.32
    assert all(k["known"] for k in result["kernels"])
    # What is done cannot be faster than the matrix units.
    assert times["product_flops"] / times["matrix"] < find_slice("v4-64").chip.peak_flops
    assert times["kernel_flops"] / max(times["attention"], 1e-9) < find_slice("v4-64").chip.peak_flops


# In a process of its own, as the compiler wants its environment before JAX is asked for devices.
_GRADIENTS = """
import os, sys
from easylm_mling.plan import compilation
os.environ.update(compilation.ENVIRONMENT)
import jax, jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec as P
from easylm_mling.config import MeshConfig
from easylm_mling.model.projection import project
from easylm_mling.model.sharding import make_mesh
from easylm_mling.plan.hlo import parse
from easylm_mling.plan.slices import find_slice
from easylm_mling.training.xla_flags import compiler_flags

devices = compilation.slice_devices(find_slice(sys.argv[1]))
mesh = make_mesh(MeshConfig(int(sys.argv[2]), -1, 1), devices)
batch = P(("data", "fsdp"))

def gradients(q, o, x, context, by_q, by_o):
    of_q = jax.vjp(lambda w: project("btd,nhd->btnh", x, w), q)[1](by_q)[0]
    return of_q, jax.vjp(lambda w: project("btnh,dnh->btd", context, w), o)[1](by_o)[0]

def array(shape, spec):
    return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, spec))

D, heads = int(sys.argv[3]), (16, 256)
kernels = array((*heads, D), P(None, None, "fsdp")), array((D, *heads), P("fsdp"))
wide, narrow = (array((len(devices), 256, *tail), batch) for tail in (heads, (D,)))
with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    step = jax.jit(gradients, out_shardings=tuple(k.sharding for k in kernels))
    compiled = step.lower(*kernels, narrow, wide, wide, narrow).compile(compiler_flags(devices[0].device_kind, {}))
sums = [c.name for c in parse(compiled.as_text()).computations.values() for i in c.instructions if i.opcode == "all-reduce"]
# The compiler's reduce-scatter is an all-reduce in a computation of this name.
print(len(sums), sum("all-reduce-scatter" in name for name in sums))
"""


@needs_libtpu
@pytest.mark.tpu_compiler
@pytest.mark.parametrize(
    "name, data, width", [("v5e-64", 2, 3840), ("v5e-64", 2, 4096), ("v5e-64", 1, 5120), ("v4-64", 1, 3072)]
)
def test_the_compiler_scatters_the_gradients_of_every_width(name, data, width):
    """Of Gemma 3 12B and Llama 3, whose parts over 32 are 120 and 128 wide; and over all devices, which takes two sums."""
    run = [sys.executable, "-c", _GRADIENTS, name, str(data), str(width)]
    printed = subprocess.run(run, capture_output=True, text=True, check=True).stdout
    # One of each of the two kernels, and what is left of both in one: over `data` whole, or the second step.
    assert printed.split() == ["3", "2" if data == 2 else "3"]


_EIGHT_BITS = """
import os
from easylm_mling.plan import compilation
os.environ.update(compilation.ENVIRONMENT)
import jax, jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec as P
from easylm_mling.config import MeshConfig, ProductsConfig
from easylm_mling.model.projection import project
from easylm_mling.model.sharding import make_mesh
from easylm_mling.plan.hlo import parse
from easylm_mling.plan.slices import find_slice
from easylm_mling.training.xla_flags import compiler_flags

mesh = make_mesh(MeshConfig(1, 8, 1), compilation.slice_devices(find_slice("v5e-8")))
products = ProductsConfig("int8", "int8")

def step(w, x, by_out):
    out, back = jax.vjp(lambda x, w: project("btd,fd->btf", x, w, products), x, w)
    return out, back(by_out)

def array(shape, *spec):
    return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, P(*spec)))

arrays = array((2048, 1024), None, "fsdp"), array((8, 512, 1024), "fsdp"), array((8, 512, 2048), "fsdp")
with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    compiled = jax.jit(step).lower(*arrays).compile(compiler_flags("TPU v5 lite", {}))
module = parse(compiled.as_text())
for c in module.computations.values():
    for i in c.instructions:
        if i.opcode == "convolution":
            print(*(o.arrays[0].dtype for o in c.operands(i)))
        elif i.opcode.removesuffix("-start") == "all-gather" and any(a.bytes > 2**16 for a in i.arrays):
            print("gather", c.operands(i)[0].arrays[0].dtype)
"""


@needs_libtpu
@needs_qwix
@pytest.mark.tpu_compiler
def test_the_compiler_multiplies_and_gathers_in_8_bits():
    printed = subprocess.run([sys.executable, "-c", _EIGHT_BITS], capture_output=True, text=True, check=True).stdout
    assert sorted(set(printed.splitlines())) == ["bf16 bf16", "gather s8", "s8 s8"]
    assert printed.count("s8 s8") == 2 and printed.count("bf16 bf16") == 1


_ATTENTION = """
import math, os
from easylm_mling.plan import compilation
os.environ.update(compilation.ENVIRONMENT)
import jax, jax.numpy as jnp
from flax import nnx
from easylm_mling.config import ModelConfig
from easylm_mling.model.layer import Attention
from easylm_mling.model.layer_kinds import layer_kinds
from easylm_mling.model.rotary import rotary_frequencies
from easylm_mling.model.splash_attention import splash_attention
from easylm_mling.plan.hlo import parse
from easylm_mling.plan.slices import find_slice

# The widths of Gemma 3 12B.
m = ModelConfig(262144, 3840, 15360, 6, 16, 8, 256, model_type="gemma3_text", sliding_window=1024,
                sliding_window_pattern=6)
[device, *_] = compilation.slice_devices(find_slice("v5e-4"))
one = jax.sharding.SingleDeviceSharding(device)
array = lambda shape, dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=one)
graph, params = nnx.split(nnx.eval_shape(lambda: Attention(m, layer_kinds(m)[0], jax.random.key(0))))
params = jax.tree.map(lambda a: array(a.shape, jnp.bfloat16 if a.ndim > 1 else jnp.float32), params)

def loss(params, x, positions, segments):
    attend = lambda q, k, v: (splash_attention(q, k, v, segments, 1024, None, 1024), None, (k, v))
    block = lambda p, x: nnx.merge(graph, p)(x, positions, rotary_frequencies(1e4, 256), attend, None)[0]
    return jnp.sum(jnp.sin(jax.checkpoint(block)(params, x).astype(jnp.float32)))

ids = array((1, 8192), jnp.int32)
lowered = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(params, array((1, 8192, 3840), jnp.bfloat16), ids, ids)
for computation in parse(lowered.compile().as_text()).computations.values():
    for i in computation.instructions:
        if i.opcode in ("copy", "copy-start") and math.prod(i.arrays[0].dims) >= 8192 * 16 * 256:
            print(i.arrays[0])
print("compiled")
"""


@needs_libtpu
@pytest.mark.slow
@pytest.mark.tpu_compiler
def test_the_compiler_copies_no_normed_queries():
    printed = subprocess.run([sys.executable, "-c", _ATTENTION], capture_output=True, text=True, check=True).stdout
    assert printed == "compiled\n"
