"""The planner: what it reads out of compiled programs, and what it says of them."""

import pytest

from easylm_mling.config import ConfigError, ModelConfig
from easylm_mling.model_flops import model_flops
from easylm_mling.plan.buffers import largest_live
from easylm_mling.plan.hlo import flops, parse, trip_count
from easylm_mling.plan.schedule import walk
from easylm_mling.plan.slices import SLICES, find_slice

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
        (found,) = walk(parse(program(f"{X}\n{SHARD}\n{line}", ELEMENTWISE, inside)), V4).collectives
        assert (found.kind, found.bytes) == (kind, expected)


def test_a_group_that_reaches_into_another_slice_uses_the_network_between_them():
    two = find_slice("2xv4-64")
    line = "  %r = f32[1024,1024] all-reduce(%s), replica_groups={groups}, to_apply=%elementwise"
    for groups, between in (
        ("mesh['a'=2,'b'=32] {'a'}", True),
        ("mesh['a'=2,'b'=32] {'b'}", False),
        ("[32,2]<=[2,32]T(1,0)", True),
    ):
        (found,) = walk(
            parse(program(f"{X}\n{SHARD}\n{line.replace('{groups}', groups)}", ELEMENTWISE)), two
        ).collectives
        assert found.between_slices == between
        assert found.seconds(two) == pytest.approx(found.bytes / (3.1e9 if between else 90e9))


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


def attention_times(kind: str, block: int, heads: int = 16, suffix: str = ""):
    q = f"  %q = bf16[{heads},8192,256]{{2,1,0}} parameter(1)"
    n = 8192 // block
    mask = f"  %m = s8[1,{n},{n}]{{2,1,0}} parameter(2)"
    return walk(parse(program("\n".join([X, q, mask, KERNEL.format(kind=kind, block=block, suffix=suffix)]))), V4)


def test_splash_kernels_take_what_their_bundles_take_scaled_by_heads():
    assert attention_times("fwd", 512).attention == pytest.approx(4.37e-3)
    assert attention_times("dq", 1024, suffix="_dq").attention == pytest.approx(7.76e-3)
    assert attention_times("dkv", 1024, heads=8, suffix="_dkv").attention == pytest.approx(10.13e-3 / 2)
    times = attention_times("fwd", 512)
    assert times.kernel_flops == pytest.approx(4 * 16 * 8192**2 * 256 * 17 / 32)
    assert times.hidden == times.attention


def test_the_largest_buffers_are_those_alive_at_the_peak():
    report = (
        "HloLiveRange (max 3):\n  BufferLiveRange:\n    early{}:0-1\n  Live ranges at 2 (peak):\n"
        "    f{}: 32 bytes (cumulative: 32 bytes)\n    x{}: 64 bytes (cumulative: 96 bytes)\n  Stack trace breakdown\n    y{}: 999 bytes\n"
    )
    module = parse(program(f"{X}, metadata={{op_name=\"state.params[\\'norm\\']\"}}\n{fusion('f', 1)}", ELEMENTWISE))
    found = largest_live(report, module)
    assert [(b.name, b.bytes, b.shape, b.what) for b in found] == [
        ("x", 64, "f32[8]", "state.params['norm']"),
        ("f", 32, "f32[8]", ""),
    ]


def test_model_flops_of_gemma_7b():
    seven = ModelConfig(256000, 3072, 24576, 28, 16, 16, 256)
    assert model_flops(seven, 8192) == pytest.approx(465.8e12, rel=1e-4)


def test_attention_of_a_window_counts_only_what_it_shows():
    shape = (1000, 64, 128, 2, 4, 4, 16)
    whole = model_flops(ModelConfig(*shape), 512)
    local = model_flops(ModelConfig(*shape, model_type="gemma2", sliding_window=128, sliding_window_pattern=2), 512)
    norms = 6 * 512 * 2 * 2 * 64  # Gemma 2 has two norms more a layer
    assert whole + norms - local == pytest.approx(12 * 64 * (512**2 / 2 - (512 * 128 - 128**2 / 2)))


def test_slices_have_the_chips_that_their_names_say():
    for name, s in SLICES.items():
        number = int(name.split("-")[1])
        assert s.chips == (number // 2 if s.chip.core_config == "megacore" else number)
        assert s.chips % s.hosts == 0
    assert find_slice("2xv5e-256").chips == 512 and find_slice("v5litepod-8").name == "v5litepod-8"


@pytest.mark.parametrize("name", ["", "v4-65", "v9-8", "0xv4-64", "v4"])
def test_an_unknown_slice_is_refused_with_the_known_ones(name):
    with pytest.raises(ConfigError, match="v4-64.*v6e-256") as error:
        find_slice(name)
    assert "\n" not in str(error.value)
