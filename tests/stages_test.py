"""What holds for every stage of the table: spec, step, guard, mesh, checkpoint and predictions agree."""

import dataclasses
import functools
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small_configs import VARIANTS, small

from unclip_jax import checkpoint, optim, sharding
from unclip_jax import program as program_lib
from unclip_jax.data import fake
from unclip_jax.errors import InputError
from unclip_jax.stages import base
from unclip_jax.state import OF_WEIGHTS, of_data

# Most of this file's time is compilation; these programs run for milliseconds.
QUICK: dict[str, str | bool] = {"xla_backend_optimization_level": "0"}
# Programs that differ, and whose numbers may not: the generator of loops that tests use rounds by what it fuses.
EXACT = {**QUICK, "xla_cpu_use_fusion_emitters": True}
SINGLE = {"data": 1, "fsdp": 1, "model": 1}
# A step rounds more often than once per weight.
NOISE = 20
MESH = {"data": 2, "fsdp": 2, "model": 2}


class Case:
    """A stage at its small size, with weights that no initializer made (some begin at zero); compiled once."""

    def __init__(self, name: str):
        self.name = name
        self.config = small(name)
        self.program = self.build(SINGLE)
        self.stage = self.program.stage
        self.frozen_on_host = jax.tree_util.tree_map_with_path(_weights(1), self.program.frozen)

    def build(self, mesh: dict[str, int]) -> program_lib.Program:
        devices = jax.devices()[: np.prod(list(mesh.values()))]
        return program_lib.build(self.config, sharding.make_mesh(mesh, devices))

    def compiled(self, program: program_lib.Program, options=QUICK):
        lowered = program.train_step.lower(program.state, program.frozen, program.batch())
        return lowered.compile(compiler_options=options)

    @functools.cached_property
    def step(self):
        return self.compiled(self.program)

    @functools.cached_property
    def statistics(self):
        return jax.device_get(jax.jit(lambda key: self.stage.init_frozen(key).get("statistics", {}))(jax.random.key(0)))

    def state(self, program: program_lib.Program | None = None):
        """The first state, placed as `program` wants it; each call makes new arrays, for a step donates them."""
        program = program or self.program
        zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), program.state)
        params = jax.tree_util.tree_map_with_path(_weights(0), program.state.params)
        state = zeros.replace(params=params, ema=params, statistics=self.statistics)
        return jax.tree.map(lambda x, like: jax.device_put(jnp.array(x), like.sharding), state, program.state)

    def frozen(self, program: program_lib.Program | None = None):
        program = program or self.program
        return jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), self.frozen_on_host, program.frozen)

    def batch(self, number: int, spec=None) -> dict[str, np.ndarray]:
        spec = spec or self.stage.batch_spec(self.config.batch_size)
        return fake.batch(spec, seed=number, vocab_size=max(self.stage.vocab_size, 4))

    def run(self, state, first: int, last: int):
        """Steps from `first` to `last`; returns the state and the losses as exact strings."""
        losses = []
        for number in range(first, last):
            batch = sharding.put_batch(self.batch(number), self.program.batch_sharding)
            state, report = self.step(state, self.frozen(), batch)
            losses.append(float(report["loss"]).hex())
        return state, losses

    def predict(self, name: str, batch):
        frozen = {**self.frozen(), "statistics": self.statistics}
        params = self.state().params
        compiled = self.program.predict[name].lower(params, frozen, batch, jax.random.key(3))
        return jax.device_get(compiled.compile(compiler_options=QUICK)(params, frozen, batch, jax.random.key(3)))


def _weights(seed: int):
    """Makes random weights of a size that keeps a network's signal as it is."""
    rng = np.random.default_rng(seed)

    def one(path, x):
        noise = rng.normal(size=x.shape)
        if len(x.shape) > 1:
            return np.asarray(noise / np.sqrt(np.prod(x.shape[:-1])), x.dtype)
        return np.asarray((1 if "scale" in jax.tree_util.keystr(path[-1:]) else 0) + 0.1 * noise, x.dtype)

    return one


@pytest.fixture(scope="module", params=VARIANTS)
def case(request):
    return Case(request.param)


def bits(tree):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def test_every_stage_is_tested():
    assert set(base.TABLE) <= set(VARIANTS)


def test_spec_init_and_loss_agree(case):
    stage, program = case.stage, case.program
    key = jax.random.key(0)
    params = nn.meta.unbox(jax.eval_shape(stage.init, key))
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    as_shapes = functools.partial(jax.tree.map, lambda x: (x.shape, x.dtype))
    assert as_shapes(params) == as_shapes(program.state.params) == as_shapes(program.state.ema)
    assert as_shapes(jax.eval_shape(program.init, key)) == as_shapes(program.state)
    spec = stage.batch_spec(16)
    assert all(x.shape[0] == 16 for x in spec.values()) and spec["id"].dtype == jnp.uint32
    frozen = {**program.frozen, "statistics": program.state.statistics}
    loss, metrics = jax.eval_shape(functools.partial(stage.loss, train=True), params, frozen, spec, key)
    assert loss.shape == () and loss.dtype == jnp.float32
    for name, metric in metrics.items():  # a scalar, or (sum, count)
        assert all(x.shape == () and x.dtype == jnp.float32 for x in jax.tree.leaves(metric)), name


def test_gradients_reach_every_parameter_and_every_scanned_layer(case):
    """Adam's first moment after the first step is the gradient times a constant."""
    state, losses = case.run(case.state(), 0, 1)
    assert np.isfinite(float.fromhex(losses[0]))
    (first_moment,) = (part.mu for part in jax.tree.leaves(state.opt_state, is_leaf=_is_adam) if _is_adam(part))
    boxed = jax.eval_shape(case.stage.init, jax.random.key(0))
    boxes = jax.tree.leaves(boxed, is_leaf=lambda x: isinstance(x, nn.meta.AxisMetadata))
    untouched = []
    for (path, moment), box in zip(jax.tree_util.tree_leaves_with_path(first_moment), boxes, strict=True):
        names = getattr(box, "names", ())  # a scalar has none
        layers = np.moveaxis(moment, names.index("layers"), 0) if "layers" in names else moment[None]
        untouched += [
            f"{jax.tree_util.keystr(path)}, layer {number}" for number, layer in enumerate(layers) if not np.any(layer)
        ]
    assert not untouched


def _is_adam(part):
    return isinstance(part, optax.ScaleByAdamState)


def test_frozen_trees_and_statistics_are_left_as_they_were(case):
    frozen = case.frozen()
    state = case.state()
    measured = {name: jnp.full_like(x, 0.5) for name, x in state.statistics.items() if name in OF_WEIGHTS}
    state = state.replace(statistics={**state.statistics, **measured})
    before = bits(of_data(state.statistics))
    batch = sharding.put_batch(case.batch(0), case.program.batch_sharding)
    state, _ = case.step(state, frozen, batch)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(frozen))
    assert bits(frozen) == bits(case.frozen_on_host)
    assert bits(of_data(state.statistics)) == before
    # What was measured of the weights was measured of other weights.
    assert not any(np.any(x) for name, x in state.statistics.items() if name in OF_WEIGHTS)
    assert set(measured) == (set(OF_WEIGHTS) if isinstance(case.stage, base.MeasuresVariance) else set())


def test_resume_is_bitwise(case, tmp_path):
    straight, losses = case.run(case.state(), 0, 4)
    half, first_losses = case.run(case.state(), 0, 2)
    saver = checkpoint.Checkpointer(tmp_path, every_steps=1, keep=1)
    saver.save(half, config=case.config)
    saver.close()
    saver = checkpoint.Checkpointer(tmp_path, every_steps=1, keep=1)
    restored, _ = saver.restore(case.program.state)
    saver.close()
    resumed, later_losses = case.run(restored, 2, 4)
    assert first_losses + later_losses == losses and len(set(losses)) == 4
    assert bits(resumed) == bits(straight)


def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(case):
    state, _ = case.run(case.state(), 0, 1)
    # All weights: one alone might belong to a word that the batch does not have.
    nowhere = jax.tree.map(lambda x: jax.device_put(jnp.full_like(x, jnp.nan), x.sharding), state.params)
    poisoned = state.replace(params=nowhere)
    before = [bits(tree) for tree in (poisoned.params, poisoned.ema, poisoned.opt_state)]
    batch = sharding.put_batch(case.batch(1), case.program.batch_sharding)
    after, report = case.step(poisoned, case.frozen(), batch)
    assert not np.isfinite(float(report["loss"])) or not np.isfinite(float(report["grad_norm"]))
    assert [bits(tree) for tree in (after.params, after.ema, after.opt_state)] == before
    assert (int(after.step), int(after.skipped), int(after.streak)) == (2, 1, 1)
    healed = after.replace(params=case.state().params)
    after, report = case.step(healed, case.frozen(), batch)
    assert (int(after.step), int(after.skipped), int(after.streak)) == (3, 1, 0)
    assert int(report["skipped_steps"]) == 1 and int(report["streak"]) == 0


def test_the_step_on_a_mesh_of_2x2x2_equals_the_step_on_one_device(case):
    """Within float32 rounding: moments differ by no more than when the last bit of every weight is changed."""
    program = case.build(MESH)
    state = case.state(program)
    split = {
        axis
        for leaf in jax.tree.leaves(state.params)
        for axis in leaf.sharding.spec
        if leaf.addressable_shards[0].data.size < leaf.size
    }
    # An upsampler's weights are split by fsdp alone, and "model" has the rows of its images.
    assert {axis for name, axis in program.config.sharding if name != "height"} <= split
    on_mesh, mesh_report = case.compiled(program)(
        state, case.frozen(program), sharding.put_batch(case.batch(0), program.batch_sharding)
    )
    assert jax.tree.map(lambda x: x.sharding, on_mesh) == jax.tree.map(lambda x: x.sharding, program.state)

    def alone(state):
        return case.step(state, case.frozen(), sharding.put_batch(case.batch(0), case.program.batch_sharding))

    expected, report = alone(case.state())
    signs = np.random.default_rng(2)
    rounded = jax.tree.map(lambda x: x * (1 + 2.0**-23 * signs.choice([-1, 1], x.shape)), case.state().params)
    noisy, _ = alone(dataclasses.replace(case.state(), params=rounded))
    for name in report:
        np.testing.assert_allclose(mesh_report[name], report[name], rtol=1e-4, atol=1e-5, err_msg=name)
    np.testing.assert_allclose(mesh_report["loss"], report["loss"], rtol=1e-5)
    for part in ("opt_state", "params", "ema"):
        there, here, near = jax.device_get([getattr(tree, part) for tree in (on_mesh, expected, noisy)])
        largest = max(np.abs(x).max() for x in jax.tree.leaves(here))
        for (path, a), b, c in zip(
            jax.tree_util.tree_leaves_with_path(there), jax.tree.leaves(here), jax.tree.leaves(near), strict=True
        ):
            atol = NOISE * np.abs(b - c).max() + 1e-7 * largest
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=atol, err_msg=part + jax.tree_util.keystr(path))


def test_predictions_take_what_their_specs_say(case):
    functions, specs = case.program.predict, case.stage.predict_specs(8)
    assert set(functions) == set(specs) and "loss" in functions
    for name in functions:
        made = case.predict(name, case.batch(0, specs[name]))
        if name == "loss":
            loss, metrics = made
            assert loss.shape == () and all(np.isfinite(x) for x in jax.tree.leaves((loss, metrics)))
        elif name == "x_T":
            assert made.dtype == np.float32 and made.shape == case.batch(0, specs[name])["image"].shape
        elif made.ndim == 4:
            assert made.dtype == np.uint8 and made.shape[0] == 8 and made.shape[1] == made.shape[2]
            assert len(np.unique(made)) > 20
        else:
            assert made.shape[0] == 8 and made.dtype == np.float32
            if name != "sample_x_start" and not name.startswith("raw_"):  # embeddings
                np.testing.assert_allclose(np.linalg.norm(made, axis=-1), 1, atol=1e-5)
        if name not in ("loss", "reconstruct", "x_T"):
            _check_independence(case, name, made, specs[name])


def _check_independence(case, name, made, spec):
    """The same examples, other company, other order: the same predictions."""
    chosen = [5, 0, 3]
    batch = {field: values[chosen] for field, values in case.batch(0, spec).items()}
    alone = case.predict(name, batch)
    difference = np.abs(alone.astype(np.float64) - made[chosen])
    assert difference.max() <= (1 if made.dtype == np.uint8 else 1e-4), name
    assert len(np.unique(np.round(made.reshape(8, -1).astype(np.float64), 3), axis=0)) > 1  # and they do differ


def test_the_guard_leaves_a_clean_curve_as_it_was():
    """Against a plain step, written here, without guard or counters: the same bits."""
    case = Case("clip")
    config, program = case.config, case.program
    case.step = case.compiled(program, EXACT)
    optimizer = optim.create(config.optim, program.learning_rate)

    def plain_step(params, ema, opt_state, step, batch):
        rng = jax.random.fold_in(jax.random.key(config.seed), step)
        loss_of = functools.partial(case.stage.loss, train=True)
        (loss, _), grads = jax.value_and_grad(loss_of, has_aux=True)(params, {"statistics": {}}, batch, rng)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        ema = optim.ema_update(ema, params, optim.ema_decay(config.optim, step))
        return loss, params, ema, opt_state

    start = case.state()
    params, ema, opt_state = start.params, start.ema, start.opt_state
    batches = [sharding.put_batch(case.batch(number), program.batch_sharding) for number in range(3)]
    compiled = jax.jit(plain_step).lower(params, ema, opt_state, jnp.int32(0), batches[0]).compile(EXACT)
    losses = []
    for number, batch in enumerate(batches):
        loss, params, ema, opt_state = compiled(params, ema, opt_state, jnp.int32(number), batch)
        losses.append(float(loss).hex())
    guarded, guarded_losses = case.run(case.state(), 0, 3)
    assert guarded_losses == losses
    assert bits((guarded.params, guarded.ema, guarded.opt_state)) == bits((params, ema, opt_state))


def _quadratic(params, frozen, batch, rng, *, train):
    """A stage's loss in small: the mean over examples of (w.x - y)^2, with a weighted metric."""
    errors = batch["x"] @ params["w"] - batch["y"]
    weights = (batch["y"] > 0).astype(jnp.float32)
    noise = jax.random.normal(rng) if frozen else 0.0
    loss = jnp.mean(errors**2) + noise * jnp.sum(params["w"])
    return loss, {"error": errors.mean(), "positive": (jnp.sum(weights * errors), weights.sum())}


def test_accumulated_gradients_are_those_of_the_whole_batch():
    value_and_grad = jax.value_and_grad(functools.partial(_quadratic, train=True), has_aux=True)
    rng = np.random.default_rng(0)
    batch = {"x": rng.normal(size=(16, 5)).astype(np.float32), "y": rng.normal(size=16).astype(np.float32)}
    params = {"w": jnp.asarray(rng.normal(size=5), jnp.float32)}

    def gradient(parts, frozen):
        config = types.SimpleNamespace(optim=types.SimpleNamespace(accumulation=parts))
        return program_lib._accumulated(config, value_and_grad, params, frozen, batch, jax.random.key(0))

    errors = batch["x"].astype(np.float64) @ np.asarray(params["w"], np.float64) - batch["y"]
    for parts in (1, 4):
        loss, metrics, grads = gradient(parts, {})
        np.testing.assert_allclose(loss, np.mean(errors**2), rtol=1e-6)
        np.testing.assert_allclose(grads["w"], 2 * errors @ batch["x"] / 16, rtol=1e-5)
        np.testing.assert_allclose(metrics["error"], errors.mean(), rtol=1e-5)
        np.testing.assert_allclose(metrics["positive"][0], errors[batch["y"] > 0].sum(), rtol=1e-5)
        assert metrics["positive"][1] == (batch["y"] > 0).sum()
    # Each part draws its own noise.
    _, _, grads = gradient(4, {"noisy": True})
    noise = np.mean([jax.random.normal(jax.random.fold_in(jax.random.key(0), part)) for part in range(4)])
    np.testing.assert_allclose(grads["w"], 2 * errors @ batch["x"] / 16 + noise, rtol=1e-5)


def test_clip_refuses_to_accumulate():
    config = small("clip", optim__accumulation=4)
    with pytest.raises(InputError, match="accumulation=4: the loss of 'clip' needs whole batches"):
        program_lib.build(config, sharding.make_mesh(SINGLE, jax.devices()[:1]))
