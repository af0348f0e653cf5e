"""Programs that are known to the last byte, compiled for a TPU that is not there and read back from the text."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from unclip_jax import compiled_program, instruction_costs, roofline, topologies, tpu_compiler
from unclip_jax.flops import Product
from unclip_jax.instruction_costs import Collective

TOPOLOGY = topologies.find("v5e-8")
SIDE, ROWS, LAYERS, CHIPS = 1024, 128, 6, 8


@functools.cache
def mesh():
    devices = topologies.compile_only_devices(TOPOLOGY)
    return jax.make_mesh((CHIPS,), ("data",), devices=devices, axis_types=(AxisType.Auto,))


def abstract(shape, *spec, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh(), PartitionSpec(*spec)))


def compiled(fn, *arguments, **options):
    return tpu_compiler.compile_lowered(jax.jit(fn, **options).lower(*arguments))


def exchanges(module):
    return [
        (one, times)
        for computation, instruction, times in compiled_program.visit(module)
        for one in instruction_costs.cost(module, computation, instruction).collectives
    ]


def products(module):
    return [
        (one, times)
        for computation, instruction, times in compiled_program.visit(module)
        for one in instruction_costs.cost(module, computation, instruction).products
    ]


@functools.cache
def every_exchange():
    """One of each kind, of sizes that nobody could mistake."""

    def local(weights, x):
        whole = jax.lax.all_gather(weights, "data", tiled=True)  # [128, 512] -> [1024, 512]
        summed = jax.lax.psum(x @ whole, "data")  # [128, 512]
        part = jax.lax.psum_scatter(summed * 2, "data", tiled=True)  # [16, 512]
        turned = jax.lax.all_to_all(part, "data", 1, 0, tiled=True)  # [128, 64]
        return jax.lax.ppermute(turned, "data", [(i, (i + 1) % CHIPS) for i in range(CHIPS)])

    specs = {"in_specs": (PartitionSpec("data"), PartitionSpec()), "out_specs": PartitionSpec("data")}
    fn = jax.shard_map(local, mesh=mesh(), check_vma=False, **specs)
    return compiled(fn, abstract((SIDE, 512), "data"), abstract((ROWS, SIDE)))


def test_exchanges_have_the_bytes_that_were_written_down():
    found = exchanges(every_exchange().module)
    sizes = {one.kind: (one.bytes, one.sent, len(one.group), times) for one, times in found}
    rest = (CHIPS - 1) / CHIPS
    of = {  # elements of the array that is gathered, summed, …, two bytes each
        "all-gather": 2 * SIDE * 512,
        "all-reduce": 2 * ROWS * 512,
        "reduce-scatter": 2 * ROWS * 512,
        "all-to-all": 2 * ROWS * 64,
        "collective-permute": 2 * ROWS * 64,
    }
    rounds = {"all-reduce": 2 * rest, "collective-permute": 1.0}
    expected = {kind: (size, size * rounds.get(kind, rest)) for kind, size in of.items()}
    assert {kind: size[:2] for kind, size in sizes.items()} == expected
    assert {size[3] for size in sizes.values()} == {1} and len(found) == len(of)
    assert all(size[2] == CHIPS for kind, size in sizes.items() if kind != "collective-permute")


def test_an_exchange_is_named_after_what_it_serves():
    names = {one.kind: one.op_name for one, _ in exchanges(every_exchange().module)}
    assert names["all-gather"].endswith("shard_map/all_gather") and names["all-reduce"].endswith("shard_map/psum")


@functools.cache
def scanned():
    """A gradient through a scan over layers whose weights are sharded, recomputed backward."""

    def loss(weights, x):
        def body(h, one):
            with jax.named_scope("layer"):
                return jax.nn.relu(h @ one), None

        h, _ = jax.lax.scan(jax.checkpoint(body), x, weights)
        return jnp.mean(h.astype(jnp.float32) ** 2)

    def step(weights, x):
        return weights - 0.1 * jax.grad(loss)(weights, x)

    arguments = abstract((LAYERS, SIDE, SIDE), None, "data"), abstract((CHIPS * ROWS, SIDE), "data")
    return compiled(step, *arguments, donate_argnums=0, out_shardings=arguments[0].sharding)


def test_what_a_loop_holds_counts_as_often_as_it_runs():
    found = products(scanned().module)
    # Forward, recomputed, and two products backward, each of a chip's rows with a whole layer.
    assert sum(times for _, times in found) == 4 * LAYERS
    assert sum(one.flops * times for one, times in found) == 4 * LAYERS * 2 * ROWS * SIDE * SIDE
    gathered = [(one.bytes, times) for one, times in exchanges(scanned().module) if one.kind == "all-gather"]
    assert gathered == [(2 * SIDE * SIDE, LAYERS)] * 2  # for the forward and for the backward pass
    scattered = [(one.bytes, times) for one, times in exchanges(scanned().module) if one.kind == "reduce-scatter"]
    assert scattered == [(2 * SIDE * SIDE, LAYERS)]


def test_a_programs_arguments_take_their_bytes():
    made = scanned()
    weights, x = 2 * LAYERS * SIDE * SIDE // CHIPS, 2 * ROWS * SIDE
    assert made.fits and made.arguments == weights + x
    assert made.outputs < 4096  # new weights take the place of the old ones


def test_a_convolution_counts_as_its_definition():
    side, features, batch = 32, 128, 8

    def fn(x, kernel):
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    made = compiled(fn, abstract((batch, side, side, features)), abstract((3, 3, features, features)))
    positions = batch * (side - 2) ** 2
    assert sum(one.flops * times for one, times in products(made.module)) == 2 * positions * 9 * features**2


def test_a_program_that_is_too_large_is_an_answer_and_names_its_largest_buffer():
    rows = 4_000_000

    def fn(x, weights):
        with jax.named_scope("expansion"):
            wide = jnp.tanh(x @ weights)  # [rows, 2048]: 16.4 GB
        return wide @ weights.T + wide.sum()

    made = compiled(fn, abstract((rows, 128)), abstract((128, 2048)))
    assert not made.fits and made.module is not None
    assert made.available == topologies.CHIPS["v5e"].hbm_bytes
    assert made.bytes > made.available
    largest = made.buffers[0]
    assert largest.bytes >= 2 * rows * 2048 and "expansion" in largest.op_name and largest.shape == "bf16[4000000,2048]"


# As the TPU's compiler writes an all-gather that goes on while a product is computed, shortened.
CHAIN = """HloModule chain, is_scheduled=true, num_partitions=8

%start (p: bf16[128,512]) -> (bf16[128,512], bf16[1024,512]) {
  %p = bf16[128,512]{1,0} parameter(0)
  %g = bf16[1024,512]{1,0} all-gather(%p), replica_groups={{0,1,2,3,4,5,6,7}}, frontend_attributes={chain_id="3"}
  ROOT %c = (bf16[128,512]{1,0}, bf16[1024,512]{1,0}) custom-call(%g), custom_call_target="AsyncCollectiveStart"
}

%middle (a: bf16[128,512], b: bf16[1024,512], x: bf16[4096,256], w: bf16[256,256]) -> (bf16[4096,256], bf16[1024,512]) {
  %a = bf16[128,512]{1,0} parameter(0)
  %b = bf16[1024,512]{1,0} parameter(1)
  %x = bf16[4096,256]{1,0} parameter(2)
  %w = bf16[256,256]{1,0} parameter(3)
  %h = bf16[1024,512]{1,0} all-gather(%a), replica_groups={{0,1,2,3,4,5,6,7}}, frontend_attributes={chain_id="3"}
  %d = bf16[4096,256]{1,0} convolution(%x, %w), dim_labels=bf_io->bf
  ROOT %t = (bf16[4096,256]{1,0}, bf16[1024,512]{1,0}) tuple(%d, %b)
}

%done (a: bf16[128,512], b: bf16[1024,512]) -> bf16[1024,512] {
  %a = bf16[128,512]{1,0} parameter(0)
  %b = bf16[1024,512]{1,0} parameter(1)
  %i = bf16[1024,512]{1,0} all-gather(%a), replica_groups={{0,1,2,3,4,5,6,7}}, frontend_attributes={chain_id="3"}
  ROOT %e = bf16[1024,512]{1,0} custom-call(%a, %b, %i), custom_call_target="AsyncCollectiveDone"
}

ENTRY %main (p: bf16[128,512], x: bf16[4096,256], w: bf16[256,256]) -> bf16[1024,512] {
  %p = bf16[128,512]{1,0} parameter(0)
  %x = bf16[4096,256]{1,0} parameter(1)
  %w = bf16[256,256]{1,0} parameter(2)
  %s = (bf16[128,512]{1,0}, bf16[1024,512]{1,0}) fusion(%p), kind=kCustom, calls=%start
  %s0 = bf16[128,512]{1,0} get-tuple-element(%s), index=0
  %s1 = bf16[1024,512]{1,0} get-tuple-element(%s), index=1
  %m = (bf16[4096,256]{1,0}, bf16[1024,512]{1,0}) fusion(%s0, %s1, %x, %w), kind=kCustom, calls=%middle
  %m1 = bf16[1024,512]{1,0} get-tuple-element(%m), index=1
  ROOT %f = bf16[1024,512]{1,0} fusion(%s0, %m1), kind=kCustom, calls=%done
}
"""


def test_an_exchange_that_goes_on_beside_a_product_counts_once_and_hides_behind_it():
    module = compiled_program.parse(CHAIN)
    gathered = 2 * 1024 * 512
    assert [(one.bytes, times) for one, times in exchanges(module)] == [(gathered, 1)]
    where = [roofline.Place(0, (x, y)) for x in range(2) for y in range(4)]
    found, chip = roofline.estimate(module, TOPOLOGY, where), TOPOLOGY.chip
    product = max(2 * 4096 * 256 * 256 / chip.bf16_flops, 2 * (2 * 4096 * 256 + 256 * 256) / chip.hbm_rate)
    exchange = max(7 / 8 * gathered / chip.ici_rate, (2 * 128 * 512 * 2 + gathered) / chip.hbm_rate)
    assert found.ici_seconds == pytest.approx(7 / 8 * gathered / chip.ici_rate)
    assert found.exposed_seconds == pytest.approx(max(exchange - product, 0.0))
    assert found.step_seconds == pytest.approx(max(exchange, product))


@pytest.mark.parametrize("stride", [1, 2, 3, 7])
@pytest.mark.parametrize("spread", [1, 2, 8])
@pytest.mark.parametrize(("below", "gap"), [(0, 1), (2, 1), (5, 3)])
def test_places_of_a_kernel_that_meet_numbers_are_counted_as_by_trying_all(stride, spread, below, gap):
    size, kernel, outputs = 9, 8, 11
    places = [o * stride + t * gap - below for o in range(outputs) for t in range(kernel)]
    tried = sum(0 <= place <= (size - 1) * spread and place % spread == 0 for place in places)
    counted = instruction_costs.meetings(size, kernel, outputs, stride=stride, below=below, spread=spread, gap=gap)
    assert counted == tried


@pytest.mark.parametrize(
    ("written", "members"),
    [
        ("replica_groups={{0,2},{1,3}}", (0, 2)),
        ("replica_groups=[2,4]<=[8]", (0, 1, 2, 3)),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", (0, 4)),
        ("replica_groups=[2,4]<=[2,2,2]T(1,0,2)", (0, 1, 4, 5)),
        ("replica_groups=mesh['a'=2,'b'=4] {'a'}", (0, 4)),
        ("replica_groups=mesh['a'=2,'b'=4] {'a','b'}", tuple(range(8))),
        ("replica_groups=mesh['a'=2,'b'=4] {'b':(1)2}", (0, 2)),
        ("replica_groups=mesh['a'=2,'b'=4] {'b':(2)2}", (0, 1)),
        ("replica_groups=mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'a'}", (0, 1)),
        ("replica_groups=mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}", (0, 2, 4, 6)),
        ("source_target_pairs={{3,4},{4,5}}", (3, 4)),
    ],
)
def test_groups_of_devices_are_read_in_every_notation(written, members):
    assert instruction_costs.group(f", channel_id=1, {written}, use_global_device_ids=true") == members


def test_arrays_take_the_bytes_of_their_tiles():
    padded, on_chip = compiled_program.arrays("(bf16[3,100]{1,0:T(8,128)(2,1)}, f32[5]{0:T(256)S(1)})")
    assert (padded.bytes, padded.logical_bytes, padded.in_hbm) == (2 * 8 * 128, 2 * 300, True)
    assert (on_chip.bytes, on_chip.in_hbm) == (4 * 256, False)


def test_time_is_bytes_and_operations_over_rates():
    found = roofline.estimate(every_exchange().module, TOPOLOGY, roofline.places(list(mesh().devices.flat)))
    chip = TOPOLOGY.chip
    assert found.compute_seconds == pytest.approx(2 * ROWS * SIDE * 512 / chip.bf16_flops)
    sent = sum(one.sent for one, _ in exchanges(every_exchange().module) if one.kind != "collective-permute")
    assert found.ici_seconds >= sent / chip.ici_rate
    assert found.overlapped_seconds <= found.step_seconds
    assert found.step_seconds >= found.exposed_seconds > 0


def test_between_slices_the_slower_network_carries_a_share():
    two = topologies.find("2xv5e-8")
    where = [roofline.Place(slice, (x, y)) for slice in range(2) for x in range(2) for y in range(4)]
    size = 1_000_000
    whole = Collective("all-reduce", size, 2 * 15 / 16 * size, tuple(range(16)), "", "")
    ici, dcn = roofline.exchange_seconds(whole, two, where)
    assert dcn == pytest.approx(size / 8 / two.chip.dcn_rate)  # an eighth is a chip's, and crosses once each way
    assert ici == pytest.approx(2 * 7 / 8 * size / two.chip.ici_rate)
    column = Collective("all-gather", size, 3 / 4 * size, (0, 1, 2, 3), "", "")
    along, none = roofline.exchange_seconds(column, two, where)
    assert none == 0 and along == pytest.approx(3 / 4 * size / (two.chip.ici_rate / 2))  # one of two dimensions


def test_padding_to_the_matrix_unit_wastes_what_does_not_divide():
    channels = Product(rows=4096, contracted=192, columns=320, times=9)
    assert channels.flops == 2 * 4096 * 192 * 320 * 9
    # 4,096 rows may be what is held: then no column is padded.
    assert channels.padded_flops(128) / channels.flops == pytest.approx(256 / 192)
    odd = Product(rows=130, contracted=128, columns=320)
    assert odd.padded_flops(128) / odd.flops == pytest.approx(384 / 320)  # 130 rows stream, 320 columns are held
    assert Product(3, 128, 128).padded_flops(128) == 2 * 128**3
    assert Product(4096, 512, 512).padded_flops(256) == Product(4096, 512, 512).flops


def test_what_a_kernel_says_of_itself_may_take_several_lines():
    written = """HloModule program, num_partitions=2
%elsewhere (q: f32[4]) -> f32[4] {
  ROOT %q = f32[4]{0} parameter(0)
}, execution_thread="sparsecore"

ENTRY %main (p: f32[4]) -> f32[4] {
  %p = f32[4]{0} parameter(0)
  ROOT %kernel = f32[4]{0} custom-call(%p), custom_call_target="tpu_custom_call", backend_config={"sizes": {
  "block": 4
}}, metadata={op_name="attention/kernel"}
}
"""
    module = compiled_program.parse(written)
    main = module.computations[module.entry]
    assert list(module.computations) == ["elsewhere", "main"]
    assert main.root == "kernel" and list(main.instructions) == ["p", "kernel"]
    assert main.instructions["kernel"].op_name == "attention/kernel"
