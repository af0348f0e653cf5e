"""Variances measured on trained weights, stored with them, and asked for by sampling."""

import json
import os
import signal
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_configs import small
from untrained_models import write

from unclip_jax import checkpoint, programs, sharding, statistics, unclip
from unclip_jax import program as program_lib
from unclip_jax.diffusion import samplers
from unclip_jax.errors import InputError
from unclip_jax.inputs import Input, load_frozen
from unclip_jax.stopping import Stopping

T = 12
ANALYTIC = {"prior_diffusion": {"method": "analytic", "candidates": 1}}


def test_the_mean_over_examples_counts_those_that_are_there_and_no_more_than_all_of_x_start():
    # Two timesteps; the third example is filled up.
    errors = np.array([[1.0, 3.0, np.nan], [9.0, 9.0, np.inf]], np.float32)
    squares = np.array([4.0, 6.0, 0.0], np.float32)
    there = np.array([True, True, False])
    more = (np.array([[5.0], [0.0]], np.float32), np.array([5.0], np.float32), np.array([True]))
    variance, count = statistics.x_start_variance([(errors, squares, there), more])
    assert count == 3 and variance.dtype == np.float64
    np.testing.assert_allclose(variance, [3.0, 5.0])  # (9 + 9 + 0) / 3 is more than predicting zeros would leave
    with pytest.raises(InputError, match="no example to measure"):
        statistics.x_start_variance([])
    with pytest.raises(InputError, match="not finite"):
        statistics.x_start_variance([(errors, squares, ~there)])


def test_sums_do_not_lose_what_float32_would():
    """A million examples of 1 + 2^-20: in float32 sums the small part is lost."""
    batch = (np.full((1, 1 << 16), 1 + 2.0**-20, np.float32), np.full(1 << 16, 2, np.float32), np.ones(1 << 16, bool))
    variance, count = statistics.x_start_variance([batch] * 16)
    assert count == 1 << 20 and variance[0] == 1 + 2.0**-20


@pytest.fixture(scope="module")
def models(tmp_path_factory, data_dir):
    folder = tmp_path_factory.mktemp("models")
    write(folder, "clip")
    write(folder, "prior_diffusion", diffusion__num_timesteps=T, data__variant="smoke", data__data_dir=data_dir)
    return folder


@pytest.fixture
def one_device(monkeypatch):
    make_mesh = sharding.make_mesh
    monkeypatch.setattr(sharding, "make_mesh", lambda sizes, devices=None: make_mesh(sizes, jax.devices()[:1]))


def arrays(workdir):
    return json.loads((workdir / "checkpoints" / "0" / "meta" / "metadata").read_text())["arrays"]


def by_hand(workdir, *, examples, timestep):
    """The mean square error at one timestep, by the whole network and by the definition of x_t."""
    config = small("prior_diffusion", diffusion__num_timesteps=T, batch_size=examples)
    with config.unlocked():
        config.frozen.clip = str(workdir.parent / "clip")
        config.data.data_dir, config.data.variant = statistics_data(workdir)
    program = program_lib.build(config, sharding.make_mesh({"data": 1}, jax.devices()[:1]))
    stage = program.stage
    params, _, _, _ = checkpoint.load(workdir, lambda _: (program.state.ema, program.state.statistics))
    frozen = load_frozen(program)
    data = Input(program).evaluation()
    spec = stage.batch_spec(examples)
    batch = next(data.batches(spec, source="evaluation", limit=examples, batch_size=examples))
    assert batch["mask"].all()

    @jax.jit
    def errors(batch):
        z_i = stage.space.images(frozen["clip"], batch["clip_image"])
        z_t = stage.space.of_texts(frozen, batch)
        keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(jax.random.key(config.seed), batch["id"])
        eps = samplers.draw_noise(keys, z_i.shape[1:], step=timestep)
        t = jnp.full((examples,), timestep)
        ab = stage.diffusion.alpha_bars[timestep]
        x_t = np.sqrt(ab) * 4.3 * z_i + np.sqrt(1 - ab) * eps
        guess = stage.network.apply(params, x_t, t, batch["tokens"], 4.3 * z_t, jnp.zeros((examples,), bool))
        return jnp.square(4.3 * z_i - guess).mean()

    return float(errors({name: jnp.asarray(x) for name, x in batch.items()}))


def statistics_data(workdir):
    data = json.loads((workdir / "checkpoints" / "0" / "meta" / "metadata").read_text())["config"]["data"]
    return data["data_dir"], data["variant"]


def test_variances_are_asked_for_measured_and_kept_with_the_weights(models, one_device):
    prior = models / "prior_diffusion"
    command = f"python -m unclip_jax.statistics --workdir={prior}"
    with pytest.raises(InputError, match=rf"not measured at step 0 of {prior}; measure it: {command}"):
        unclip.UnCLIP.load(str(models), sampling=ANALYTIC)
    before = arrays(prior)
    variance = statistics.measure(str(prior), examples=20, batch_size=8)
    assert variance.shape == (T,) and (0 < variance).all() and (variance <= 4.3**2 / 16 + 1e-6).all()
    after = arrays(prior)
    assert {**before, "statistics": None} == {**after, "statistics": None} and before != after
    # Of the 20, the second and third batch hold 8 and 4.
    expected = [by_hand(prior, examples=20, timestep=t) for t in (1, T - 1)]
    np.testing.assert_allclose(variance[[1, T - 1]], np.minimum(expected, 4.3**2 / 16), rtol=1e-4)
    assert min(expected) < 4.3**2 / 16  # not both of them clipped

    model = unclip.UnCLIP.load(str(models), sampling=ANALYTIC)
    kept = model.part("prior_diffusion").statistics["x_start_variance"]
    np.testing.assert_array_equal(kept, variance.astype(np.float32))
    z_i = model.sample_prior(["a small red star on a white background"])
    np.testing.assert_allclose(np.linalg.norm(z_i, axis=-1), 1, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "options", "sentence"),
    [
        ("clip", {}, "holds a clip, of which there is nothing to measure; give a prior_diffusion's"),
        ("prior_diffusion", {"split": "tain"}, "did you mean 'train'"),
        ("prior_diffusion", {"step": 7}, r"no checkpoint of step 7; it has \[0\]"),
        ("prior_diffusion", {"overrides": {"frozen.clip": ""}}, "config.frozen.clip is not set"),
        ("nothing", {}, "holds no checkpoint"),
    ],
)
def test_what_cannot_be_measured_is_one_sentence_and_changes_nothing(models, one_device, name, options, sentence):
    before = arrays(models / "prior_diffusion")
    with pytest.raises(InputError, match=sentence):
        statistics.measure(str(models / name), examples=4, batch_size=4, **options)
    assert arrays(models / "prior_diffusion") == before


def test_another_clip_than_the_prior_was_trained_on_is_refused(models, one_device, tmp_path):
    other = write(tmp_path, "clip", seed=1)
    with pytest.raises(InputError, match="trained on another clip; give the workdir of that one as --clip"):
        statistics.measure(str(models / "prior_diffusion"), examples=4, overrides={"frozen.clip": str(other)})


def test_a_stage_that_measures_nothing_of_its_data_says_so_before_it_writes(tmp_path):
    for case in ("prior_diffusion", "decoder"):
        with pytest.raises(InputError, match=f"a {case} with this config measures nothing before its first step"):
            statistics.fit(small(case), str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_fit_of_one_process_stops_when_it_is_told_to():
    kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        stopping = Stopping(disposable=lambda: False)  # or a slow machine would end the tests
        stopping.now()
        os.kill(os.getpid(), signal.SIGTERM)
        while not stopping.asked:
            time.sleep(0.01)
        with pytest.raises(SystemExit) as stopped:
            stopping.now()
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)
    assert stopped.value.code == programs.REQUEUE
