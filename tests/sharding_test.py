"""Meshes and the table of axes, on eight virtual devices."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from unclip_jax import sharding
from unclip_jax.errors import InputError
from unclip_jax.models import layers

RULES = (("embed", "fsdp"), ("mlp", "model"), ("heads", "model"))


@pytest.fixture(scope="module")
def mesh():
    return sharding.make_mesh({"data": 2, "fsdp": 2, "model": 2})


@pytest.mark.parametrize(
    ("sizes", "shape"),
    [
        ({"data": -1, "fsdp": 1, "model": 1}, (8, 1, 1)),
        ({"data": 1, "fsdp": -1, "model": 2}, (1, 4, 2)),
        ({"data": 2, "fsdp": 2, "model": 2}, (2, 2, 2)),
        ({"model": -1}, (1, 1, 8)),
    ],
)
def test_one_size_is_what_the_others_leave(sizes, shape):
    mesh = sharding.make_mesh(sizes)
    assert tuple(mesh.shape[axis] for axis in ("data", "fsdp", "model")) == shape
    assert set(mesh.devices.flat) == set(jax.devices())


@pytest.mark.parametrize(
    ("sizes", "says"),
    [
        ({"data": 3}, "data=3 x fsdp=1 x model=1, which does not divide over the 8 devices"),
        ({"data": -1, "fsdp": 3}, "8 devices"),
        ({"data": 16}, "8 devices"),
        ({"data": -1, "fsdp": -1}, "one size"),
    ],
)
def test_meshes_that_do_not_fit_are_refused(sizes, says):
    with pytest.raises(InputError, match=says):
        sharding.make_mesh(sizes)


def test_a_mesh_may_use_some_devices_only():
    mesh = sharding.make_mesh({"data": -1}, jax.devices()[:3])
    assert list(mesh.devices.flat) == jax.devices()[:3]


def test_names_become_mesh_axes(mesh):
    assert sharding.partition_spec(("embed", "mlp"), (4, 6), RULES, mesh) == PartitionSpec("fsdp", "model")
    assert sharding.partition_spec((None, "other", "heads"), (4, 4, 4), RULES, mesh) == PartitionSpec(
        None, None, "model"
    )
    assert sharding.partition_spec((), (), RULES, mesh) == PartitionSpec()
    assert sharding.partition_spec(("embed",), (4,), (("embed", None),), mesh) == PartitionSpec(None)


def test_a_dimension_that_does_not_divide_is_replicated_and_that_is_logged(mesh, caplog):
    with caplog.at_level("INFO", logger="unclip_jax.sharding"):
        spec = sharding.partition_spec(("embed", "mlp"), (5, 6), RULES, mesh, where="params/kernel")
    assert spec == PartitionSpec(None, "model")
    (message,) = caplog.messages
    assert "params/kernel" in message and "embed of 5 " in message


def test_two_dimensions_on_one_mesh_axis_are_refused(mesh):
    with pytest.raises(InputError, match=r"two dimensions of params/out to mesh axis 'model'"):
        sharding.partition_spec(("mlp", "heads"), (4, 4), RULES, mesh, where="params/out")


def test_an_axis_that_the_mesh_lacks_is_refused(mesh):
    with pytest.raises(InputError, match=r"'embed' to mesh axis 'tensor'; the mesh has \('slice', 'data', 'fsdp', "):
        sharding.partition_spec(("embed",), (4,), (("embed", "tensor"),), mesh)


def test_trees_are_split_by_their_boxes_and_arrays_land_in_pieces(mesh):
    values = {"kernel": jnp.arange(24.0).reshape(4, 6), "step": jnp.zeros(())}
    boxed = {"kernel": nn.Partitioned(values["kernel"], ("embed", "mlp")), "step": values["step"]}
    split = sharding.shardings(boxed, RULES, mesh)
    assert split["kernel"].spec == PartitionSpec("fsdp", "model")
    assert split["step"].is_fully_replicated
    placed = jax.device_put(values, split)
    np.testing.assert_array_equal(placed["kernel"], values["kernel"])
    assert {shard.data.shape for shard in placed["kernel"].addressable_shards} == {(2, 3)}


def test_a_batch_is_split_over_replicas_whole_over_model(mesh):
    batch = sharding.put_batch({"id": np.arange(8, dtype=np.uint32)}, sharding.batch_sharding(mesh))
    np.testing.assert_array_equal(batch["id"], np.arange(8))
    pieces = [tuple(np.asarray(shard.data)) for shard in batch["id"].addressable_shards]
    assert sorted(pieces) == sorted(2 * [(0, 1), (2, 3), (4, 5), (6, 7)])


@pytest.mark.parametrize(
    ("size", "accumulation", "nearest"), [(8, 1, None), (4, 1, None), (6, 1, 4), (12, 2, 8), (3, 1, 4), (16, 4, None)]
)
def test_batches_divide_over_replicas_and_accumulation(mesh, size, accumulation, nearest):
    if nearest is None:
        sharding.check_batch(size, mesh, accumulation=accumulation)
    else:
        with pytest.raises(InputError, match=rf"batch_size={size} does not divide .* is {nearest}$"):
            sharding.check_batch(size, mesh, accumulation=accumulation)


def test_slices_are_the_outermost_axis_and_inferred_where_devices_do_not_say():
    mesh = sharding.make_mesh({"slice": 2, "data": -1, "fsdp": 2})
    assert mesh.shape == {"slice": 2, "data": 2, "fsdp": 2, "model": 1}
    assert list(mesh.devices[0].flat) == jax.devices()[:4]
    assert sharding.make_mesh({"slice": -1, "data": -1}).shape["slice"] == 1


def _dense_on(mesh, rules):
    """A step's worth of one layer: (jitted gradient of a loss, its arguments placed as `rules` say)."""
    module = layers.dense(8, dtype=jnp.float32)
    x = jax.random.normal(jax.random.key(0), (16, 4))
    boxed = module.init(jax.random.key(1), x)
    placed = jax.device_put(nn.meta.unbox(boxed), sharding.shardings(boxed, rules, mesh))
    x = jax.device_put(x, sharding.batch_sharding(mesh))

    def loss(params, x):
        with sharding.on(mesh, rules):
            return jnp.square(module.apply(params, x)).mean()

    return jax.jit(jax.grad(loss), out_shardings=sharding.shardings(boxed, rules, mesh)), placed, x


def test_a_layer_gathers_its_weight_and_leaves_the_activations_where_they_are():
    mesh = sharding.make_mesh({"data": 2, "fsdp": 4})
    gradient, params, x = _dense_on(mesh, (("embed", "fsdp"),))
    text = gradient.lower(params, x).compile().as_text()
    assert "all-gather" in text and "all-to-all" not in text
    alone, same_params, same_x = _dense_on(sharding.make_mesh({"data": 1}, jax.devices()[:1]), ())
    found, wanted = gradient(params, x), alone(same_params, same_x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found, wanted)
    kernel = found["params"]["kernel"]
    assert kernel.sharding.spec == PartitionSpec("fsdp", None)
    assert kernel.addressable_shards[0].data.shape == (1, 8)


def _convolved(x, kernel):
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


@pytest.mark.parametrize(
    ("fn", "names", "shape"),
    [
        (jnp.matmul, ("embed", None), (64, 6)),  # pieces as wide as a TPU's tile
        (jnp.matmul, (None, "embed"), (64, 4)),
        (_convolved, (None, None, "embed", None), (3, 3, 8, 5)),
        (_convolved, (None, None, None, "embed"), (3, 3, 5, 8)),
    ],
    ids=["matrix", "narrow pieces", "by input channels", "by output channels"],
)
def test_a_scattered_gradient_is_that_of_one_device(fn, names, shape):
    """Of small integers, whose sums are exact in any order."""
    mesh, rng = sharding.make_mesh({"data": 2, "fsdp": 4}), np.random.RandomState(0)
    x = rng.randint(-3, 4, (8, 4, 4, shape[-2])).astype(np.float32)
    kernel = rng.randint(-3, 4, shape).astype(np.float32)
    towards = rng.randint(-3, 4, (8, 4, 4, shape[-1])).astype(np.float32)

    def loss(kernel, x):
        return (sharding.product(fn, x, kernel, names) * towards).sum()

    wanted = jax.grad(loss)(jnp.asarray(kernel), jnp.asarray(x))
    spec = sharding.partition_spec(names, shape, RULES, mesh)
    stored = jax.device_put(kernel, NamedSharding(mesh, spec))
    with sharding.on(mesh, RULES):
        gradient = jax.jit(jax.grad(loss), out_shardings=NamedSharding(mesh, spec))
        found = gradient(stored, jax.device_put(x, sharding.batch_sharding(mesh)))
    np.testing.assert_array_equal(found, wanted)


def test_what_model_splits_is_not_gathered():
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "model": 2})
    seen = []

    def look(kernel):
        with sharding.on(mesh, RULES):
            used = sharding.whole(kernel, ("embed", "mlp"))
        jax.debug.inspect_array_sharding(used, callback=seen.append)
        return used

    jax.jit(look)(jax.device_put(jnp.ones((4, 6)), NamedSharding(mesh, PartitionSpec("fsdp", "model"))))
    assert seen[0].is_equivalent_to(NamedSharding(mesh, PartitionSpec(None, "model")), 2)


def test_elsewhere_nothing_is_placed():
    x = jnp.ones((4, 6))
    assert sharding.whole(x, ("embed", "mlp")) is x
    assert sharding.laid(x) is x
    assert sharding.each_part(lambda x: 2 * x, x, names=("batch", None)).sum() == 48
    assert sharding.mesh() is None
