"""CLIP's loss computed by rows against the plain formula, and SAM against two replicas written out by hand."""

import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict
from small_configs import small

from unclip_jax import program, replicas, sharding, sharpness
from unclip_jax.data import fake
from unclip_jax.errors import InputError
from unclip_jax.stages import base, clip

PAIRS, DIMENSIONS = 16, 8
RHO = 0.1  # the paper's
MESHES = [{"data": 1}, {"data": 8}, {"data": 2, "fsdp": 4}, {"data": 2, "fsdp": 2, "model": 2}]
jitted = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def make_mesh(sizes):
    return sharding.make_mesh(sizes, jax.devices()[: int(np.prod(list(sizes.values())))])


def embeddings():
    rng = np.random.default_rng(0)
    z = rng.normal(size=(2, PAIRS, DIMENSIONS))
    return jnp.asarray(z / np.linalg.norm(z, axis=-1, keepdims=True), jnp.float32)


def plain_loss(z_i, z_t, scale):
    """The formula of Radford et al. (2021), figure 3, on the whole square of logits."""
    logits = scale * z_i @ z_t.T
    diagonal = jnp.diag(logits)
    by_row = jax.scipy.special.logsumexp(logits, axis=1) - diagonal
    by_column = jax.scipy.special.logsumexp(logits, axis=0) - diagonal
    return (by_row.mean() + by_column.mean()) / 2


def split_loss(mesh):
    def loss(z_i, z_t, scale):
        with sharding.on(mesh, ()):
            return replicas.by_rows(clip.contrastive_loss, z_i, z_t, whole=scale)

    return loss


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_the_loss_by_rows_is_the_plain_loss_with_its_gradients(sizes):
    mesh = make_mesh(sizes)
    z_i, z_t = (jax.device_put(z, sharding.batch_sharding(mesh)) for z in embeddings())
    both = jitted(jax.value_and_grad(split_loss(mesh), argnums=(0, 1, 2), has_aux=True))
    (loss, metrics), gradients = both(z_i, z_t, jnp.float32(20))
    expected, wanted = jax.value_and_grad(plain_loss, argnums=(0, 1, 2))(*embeddings(), jnp.float32(20))
    assert abs(float(loss - expected)) < 1e-6 * float(expected)
    for gradient, want in zip(gradients, wanted, strict=True):
        np.testing.assert_allclose(gradient, want, atol=1e-6 * float(jnp.abs(want).max()) + 1e-7)
    likeness = np.asarray(embeddings()[0]) @ np.asarray(embeddings()[1]).T
    assert float(metrics["accuracy"]) == pytest.approx((likeness.argmax(1) == np.arange(PAIRS)).mean())


def test_no_device_holds_more_logits_than_those_of_its_own_rows():
    mesh = make_mesh({"data": 4, "fsdp": 2})
    spec = jax.ShapeDtypeStruct((PAIRS, DIMENSIONS), jnp.float32, sharding=sharding.batch_sharding(mesh))
    step = jitted(jax.value_and_grad(split_loss(mesh), argnums=(0, 1, 2), has_aux=True))
    compiled = step.lower(spec, spec, jax.ShapeDtypeStruct((), jnp.float32)).compile().as_text()
    sizes = {int(np.prod([int(n) for n in dims.split(",")])) for dims in re.findall(r"f32\[([\d,]+)\]", compiled)}
    own = PAIRS // 8 * PAIRS
    assert own in sizes and max(sizes) <= PAIRS * DIMENSIONS < PAIRS * PAIRS


# SAM.


def sam_config(**changes):
    config = ConfigDict(small("clip", model__vision_stem=()).to_dict())
    config.sam = {"rho": 0.1, "pairs": 4, "negatives": "replica", **changes}
    return config


@functools.cache
def stage_and_inputs():
    stage = base.create(sam_config())
    rng = np.random.default_rng(3)
    params = jax.tree.map(
        lambda x: jnp.asarray(rng.normal(size=x.shape) / np.sqrt(max(np.prod(x.shape[:-1]), 1)), jnp.float32),
        nn.meta.unbox(jax.eval_shape(stage.init, jax.random.key(0))),
    )
    batch = fake.batch(stage.batch_spec(8), seed=0, vocab_size=stage.vocab_size)
    return stage, params, {name: jnp.asarray(x) for name, x in batch.items()}


@functools.cache
def by_hand(negatives: str):
    """Two replicas of four pairs, each embedding its own pairs by its own perturbed weights."""
    stage, params, batch = stage_and_inputs()
    halves = [{name: x[part] for name, x in batch.items()} for part in (slice(0, 4), slice(4, 8))]

    def embedded(params, half):
        z_i, z_t, log_scale = stage.network.apply(
            params, half["clip_image"] / jnp.float32(127.5) - 1, half["clip_tokens"]
        )
        unit = [z / jnp.linalg.norm(z, axis=-1, keepdims=True) for z in (z_i, z_t)]
        return *unit, jnp.exp(jnp.minimum(log_scale, jnp.log(100.0)))

    def rows_loss(own, others, first):
        """Of one replica's rows: its logit scale, its pairs, and everybody's candidates."""
        z_i, z_t, scale = own
        all_i, all_t = others
        at = jnp.arange(first, first + 4)
        total = 0.0
        for queries, candidates in ((z_i, all_t), (z_t, all_i)):
            logits = scale * queries @ candidates.T
            total += (jax.scipy.special.logsumexp(logits, axis=1) - logits[jnp.arange(4), at]).mean() / 2
        return total

    def whole_loss(first_params, second_params):
        mine = [embedded(p, half) for p, half in zip((first_params, second_params), halves, strict=True)]
        everybody = tuple(jnp.concatenate([one[i] for one in mine]) for i in (0, 1))
        return (rows_loss(mine[0], everybody, 0) + rows_loss(mine[1], everybody, 4)) / 2

    if negatives == "global":
        uphill = jitted(jax.grad(whole_loss, argnums=(0, 1)))(params, params)
    else:
        alone = jitted(jax.grad(lambda p, half: plain_loss(*embedded(p, half))))
        uphill = [alone(params, half) for half in halves]
    perturbed = []
    for gradient in uphill:
        length = jnp.sqrt(sum(jnp.sum(g**2) for g in jax.tree.leaves(gradient)))
        perturbed.append(jax.tree.map(lambda w, g, n=length: w + RHO * g / n, params, gradient))
    loss, gradients = jitted(jax.value_and_grad(whole_loss, argnums=(0, 1)))(*perturbed)
    return loss, jax.tree.map(jnp.add, *gradients)


@functools.cache
def plain_gradient():
    stage, params, batch = stage_and_inputs()
    return jitted(jax.grad(lambda p: stage.loss(p, {}, batch, jax.random.key(0), train=True)[0]))(params)


@pytest.mark.parametrize(
    ("sizes", "negatives"),
    [({"data": 1}, "replica"), ({"data": 2}, "global"), ({"fsdp": 2, "model": 2}, "replica")],
    ids=str,
)
def test_sam_is_two_replicas_perturbed_apart(sizes, negatives):
    stage, params, batch = stage_and_inputs()
    mesh = make_mesh(sizes)
    config = {"rho": RHO, "pairs": 4, "negatives": negatives}
    fn = sharpness.value_and_grad(functools.partial(stage.loss, train=True), config, mesh)
    placed = jax.device_put(batch, sharding.batch_sharding(mesh))
    (loss, _), gradient = jitted(fn)(params, {}, placed, jax.random.key(0))
    expected, wanted = by_hand(negatives)
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)
    largest = float(optax.tree.norm(wanted, ord=np.inf))
    for got, want in zip(jax.tree.leaves(gradient), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-3 * largest)
    plain = plain_gradient()
    moved = max(float(jnp.abs(a - b).max()) for a, b in zip(*map(jax.tree.leaves, (plain, wanted)), strict=True))
    assert moved > 0.5 * largest, "the perturbation must matter here"


def test_a_config_with_sam_trains_and_one_that_cannot_is_refused():
    config = sam_config()
    mesh = make_mesh({"data": 2})
    built = program.build(config, mesh)
    lowered = built.train_step.lower(built.state, built.frozen, built.batch())
    assert "all_gather" in lowered.as_text() or "all-gather" in lowered.as_text()
    for changes, message in (
        ({"pairs": 3}, r"config.sam.pairs=3 does not divide the \d+ examples that each of 2 devices"),
        ({"negatives": "globl"}, "config.sam.negatives='globl'.*global"),
    ):
        with pytest.raises(InputError, match=message):
            program.build(sam_config(**changes), mesh)
