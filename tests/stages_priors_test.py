"""The two priors as stages: sampling from the cache against recomputing everything, embeddings' units, variances."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformer_oracle as oracle
from ml_collections import ConfigDict
from small_configs import small

from unclip_jax.diffusion import samplers
from unclip_jax.errors import InputError
from unclip_jax.models import quantizer
from unclip_jax.models.captions import EncodedCaption
from unclip_jax.stages import base, denoising
from unclip_jax.stages.embedding_space import EmbeddingSpace
from unclip_jax.stages.prior_diffusion import Condition

B, D, LENGTH, VOCAB = 3, 16, 24, 2048
RNG = np.random.default_rng(0)
TOKENS = jnp.asarray(RNG.integers(1, VOCAB - 2, (B, LENGTH)), jnp.int32).at[:, 5].set(VOCAB - 1)
EMPTY = jnp.zeros((B, LENGTH), jnp.int32).at[:, 0].set(VOCAB - 2).at[:, 1].set(VOCAB - 1)
Z_T = base.normalize(jnp.asarray(RNG.normal(size=(B, D)), jnp.float32))
KEYS = jax.random.split(jax.random.key(5), B)
GUIDANCE = 3.0
NEVER, ALWAYS = jnp.zeros((B,), bool), jnp.ones((B,), bool)


def stage_of(case, **overrides):
    """A stage at its small size, and weights that are all random."""
    stage = base.create(small(case, **overrides))
    return stage, oracle.random_weights(stage.init)


def own_keys(candidate):
    return jax.vmap(jax.random.fold_in, in_axes=(0, None))(KEYS, candidate)


@pytest.fixture(scope="module")
def prior():
    return stage_of("prior_diffusion")


@pytest.mark.parametrize("caption", ["tokens", "clip"])
def test_a_guided_run_from_the_prefix_equals_one_that_reads_everything_at_each_step(caption):
    stage, params = stage_of(
        "prior_diffusion", model__caption=caption, sampling__guidance_scale=GUIDANCE, sampling__timesteps="8"
    )
    frozen = {"clip": oracle.random_weights(lambda key: stage.init_frozen(key)["clip"])}

    def read(tokens):
        return stage.clip.apply(frozen["clip"], tokens, method="read_text")

    @jax.jit
    def uncached():
        z_t, states = read(TOKENS)
        empty_z, empty_states = read(EMPTY)
        z_t, empty_z = (z / jnp.linalg.norm(z, axis=-1, keepdims=True) for z in (z_t, empty_z))

        def whole(x_t, t):
            def ask(*condition):
                return stage.network.apply(params, x_t, t, *condition)

            if caption == "tokens":  # the network has a null of its own
                kept, null = ask(TOKENS, 4.3 * z_t, NEVER), ask(TOKENS, 4.3 * z_t, ALWAYS)
            else:
                kept = ask(EncodedCaption(states, jnp.arange(LENGTH) <= jnp.full((B, 1), 5)), 4.3 * z_t)
                null = ask(EncodedCaption(empty_states, jnp.arange(LENGTH) <= jnp.full((B, 1), 1)), 4.3 * empty_z)
            return null + GUIDANCE * (kept - null)

        def draw(keys):
            x_T = samplers.initial_noise(keys, (D,))
            x_0 = samplers.sample(stage.diffusion, whole, x_T, keys, method="ddpm", timesteps=8)
            return x_0 / jnp.linalg.norm(x_0, axis=-1, keepdims=True)

        return z_t, jnp.stack([draw(own_keys(candidate)) for candidate in range(2)])

    @jax.jit
    def cached():
        condition = stage.condition(frozen, {"tokens": TOKENS, "clip_tokens": TOKENS})
        return stage.sample(params, stage_statistics(stage), condition, stage.null(frozen, B), KEYS)

    z_t, drawn = (np.asarray(x) for x in uncached())
    likeness = (drawn * z_t).sum(-1)
    np.testing.assert_allclose(cached(), drawn[likeness.argmax(0), np.arange(B)], atol=1e-5)
    # The nearer is kept, and the other is another.
    assert np.abs(np.asarray(cached()) - drawn[likeness.argmin(0), np.arange(B)]).max() > 1e-3


def test_a_prior_whose_captions_clip_reads_hides_them_behind_the_empty_one():
    """Karlo's: no token ids of its own, and where a caption is dropped, CLIP's reading of "" in its place."""
    stage, params = stage_of("prior_diffusion", model__caption="clip", embedding__norm="raw")
    assert "tokens" not in stage.batch_spec(8) and stage.vocab_size == stage.clip.vocab_size
    frozen = {"clip": oracle.random_weights(lambda key: stage.init_frozen(key)["clip"])}

    @jax.jit
    def conditions():
        own, null = stage.condition(frozen, {"clip_tokens": TOKENS}), stage.null(frozen, B)
        empty = stage.condition(frozen, {"clip_tokens": EMPTY})
        return own, null, empty, stage._dropped(own, null, jnp.array([True, False, True]))

    own, null, empty, (caption, z_t, drop) = conditions()
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), null, empty)
    assert drop is None
    for row, source in enumerate((null, own, null)):
        np.testing.assert_allclose(z_t[row], 4.3 * source.z_t[row], rtol=1e-6)
        np.testing.assert_allclose(caption.states[row], source.caption.states[row], rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(caption.seen[row], source.caption.seen[row])
    assert np.abs(np.linalg.norm(own.z_t, axis=-1) - 1).min() > 1e-3  # raw
    with pytest.raises(InputError, match="reads all of CLIP's positions, 24"):
        stage_of("prior_diffusion", model__caption="clip", model__context_length=20)


def stage_statistics(stage):
    """The statistics of a stage's first state."""
    return {name: jnp.asarray(x) for name, x in _first_statistics(stage).items()}


@functools.cache
def _first_statistics(stage):
    return jax.device_get(jax.jit(lambda: stage.init_frozen(jax.random.key(0))["statistics"])())


def test_the_analytic_variance_is_the_small_one_plus_what_was_measured(prior):
    """Zeros, which stand for "not measured", sample as beta~ does; more variance is more noise in every step."""
    _, params = prior
    made = {}
    for method, unknown in (("ddpm", 0.0), ("analytic", 0.0), ("analytic", 0.2)):
        stage, _ = stage_of("prior_diffusion", sampling__method=method, sampling__candidates=1)
        statistics = {**stage_statistics(stage), "x_start_variance": jnp.full((1000,), unknown)}
        sample = jax.jit(stage.sample)
        made[method, unknown] = np.asarray(sample(params, statistics, Condition(TOKENS, Z_T), None, KEYS))
    np.testing.assert_allclose(made["analytic", 0.0], made["ddpm", 0.0], atol=1e-5)
    assert np.abs(made["analytic", 0.2] - made["ddpm", 0.0]).max() > 1e-3


def test_a_guided_sentence_of_codes_from_the_cache_equals_one_that_is_read_anew_for_each_code():
    stage, params = stage_of("prior_ar", sampling__guidance_scale=GUIDANCE, sampling__temperature=0.7)
    statistics = stage_statistics(stage)
    network = stage.network
    dot = jax.vmap(lambda key: quantizer.sample_dot(key, statistics, top=stage.dot_top))(KEYS)

    @jax.jit
    def next_code(codes, position):
        kept, null = (network.apply(params, codes, dot, TOKENS, Z_T, dropped) for dropped in (NEVER, ALWAYS))
        logits = (null + GUIDANCE * (kept - null))[:, position] / 0.7
        keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(KEYS, position)
        return jax.vmap(jax.random.categorical)(keys, logits)

    codes = jnp.zeros((B, network.components), jnp.int32)
    for position in range(network.components):
        codes = codes.at[:, position].set(next_code(codes, position))
    cached = jax.jit(stage._sample_codes)(params, statistics, TOKENS, Z_T, KEYS, None)
    np.testing.assert_array_equal(cached, codes)
    assert len(np.unique(codes)) > 2


def gaussian_denoiser(process, variance):
    """E [x_start | x_t] for data N(0, variance)."""
    alpha_bars = jnp.asarray(process.alpha_bars, jnp.float32)

    def denoise(x_t, t):
        ab = alpha_bars[t][:, None]
        return jnp.sqrt(ab) * variance * x_t / (ab * variance + 1 - ab)

    return denoise


def test_errors_of_a_known_denoiser_are_its_posterior_variance_at_every_timestep():
    """For data N(0, v) it is v (1 - ab) / (ab v + 1 - ab): what Analytic-DPM calls cov_x0."""
    variance, count, d = 17.2**2 / 1024, 64, 256
    config = small("prior_diffusion", diffusion__num_timesteps=50).diffusion
    process = denoising.process(config)
    x_start = np.sqrt(variance) * jax.random.normal(jax.random.key(1), (count, d))
    keys = jax.random.split(jax.random.key(2), count)
    errors = jax.jit(
        lambda x, keys: denoising.x_start_errors(process, gaussian_denoiser(process, variance), x, keys)
    )(x_start, keys)
    assert errors.shape == (50, count)
    ab = process.alpha_bars
    expected = variance * (1 - ab) / (ab * variance + 1 - ab)
    # A mean of count * d squares of standard normals has a deviation of sqrt(2 / (count d)) = 1.1%.
    np.testing.assert_allclose(errors.mean(1), expected, rtol=0.05)
    alone = denoising.x_start_errors(process, gaussian_denoiser(process, variance), x_start[7:8], keys[7:8])
    np.testing.assert_allclose(alone[:, 0], errors[:, 7], rtol=1e-5)


def test_what_was_measured_gives_samples_the_variance_of_the_data():
    """N(0, 17.2^2 / 1024) in 64 of 1,000 cosine steps: exact variances give 0.9999 of it, beta~ 0.9021."""
    variance, shape = 17.2**2 / 1024, (256, 256)
    process = denoising.process(small("prior_diffusion").diffusion)
    denoise = gaussian_denoiser(process, variance)

    @jax.jit
    def ratios(data_key, keys, noise_keys):
        x_start = np.sqrt(variance) * jax.random.normal(data_key, (64, 256))
        measured = denoising.x_start_errors(process, denoise, x_start, keys).mean(1)
        x_T = samplers.initial_noise(noise_keys, shape[1:])
        draw = functools.partial(samplers.sample, process, denoise, x_T, noise_keys, timesteps=64)
        analytic = draw(method="analytic", x_start_variance=measured)
        return jnp.square(analytic).mean() / variance, jnp.square(draw(method="ddpm")).mean() / variance

    analytic, small_variance = ratios(
        jax.random.key(1), jax.random.split(jax.random.key(2), 64), jax.random.split(jax.random.key(3), shape[0])
    )
    # The mean of 65,536 squares has a deviation of 0.55%.
    assert analytic == pytest.approx(0.9999, abs=0.02)
    assert small_variance == pytest.approx(0.9021, abs=0.02)


def test_errors_are_those_of_clipped_predictions():
    process = denoising.process(small("prior_diffusion", diffusion__clip_x_start=0.5).diffusion)
    keys = jax.random.split(jax.random.key(2), 2)
    errors = denoising.x_start_errors(process, lambda x_t, t: jnp.full_like(x_t, 7.0), jnp.zeros((2, 4)), keys)
    np.testing.assert_allclose(errors, 0.25)


def space_of(**options):
    config = small("prior_diffusion")
    return EmbeddingSpace.of(ConfigDict({**config.to_dict(), "embedding": options}), base.clip_network(config))


def fitted(space, z_i):
    """`EmbeddingSpace.fit` on given embeddings, in three parts."""

    def over_data(compute, measure, *, limit=None):
        sums = [measure(part) for part in np.array_split(z_i, 3)]
        return functools.reduce(lambda a, b: jax.tree.map(np.add, a, b), sums)

    return space.fit(over_data)


def test_units_of_embeddings_and_back():
    z = base.normalize(jnp.asarray(RNG.normal(size=(50, D)), jnp.float32))
    for options, length in (({"scaling": "constant", "scale": 4.3}, 4.3), ({"scaling": "sqrt_d"}, np.sqrt(D))):
        space = space_of(**options)
        assert space.statistics() == {} and fitted(space, np.asarray(z)) == ({}, {})
        entered = space.enter(z, {})
        np.testing.assert_allclose(np.linalg.norm(entered, axis=-1), length, rtol=1e-6)
        np.testing.assert_allclose(space.leave(entered, {}), z, atol=1e-6)
        np.testing.assert_allclose(space.leave(3 * entered, {}), z, atol=1e-6)  # of length 1 whatever was sampled
        assert space.factor == pytest.approx(length)


def test_whitening_is_fitted_to_the_data_and_undone_after_sampling():
    z = (RNG.normal(size=(500, D)) * np.linspace(0.01, 3, D) + np.linspace(-20, 5, D)).astype(np.float32)
    z[:, 3] = 0.25
    space = space_of(scaling="whiten", norm="raw")
    statistics, told = fitted(space, z)
    np.testing.assert_allclose(statistics["clip_mean"], z.astype(np.float64).mean(0), rtol=1e-6)
    expected = z.astype(np.float64).std(0)
    expected[3] = 1  # a dimension that never varies
    np.testing.assert_allclose(statistics["clip_std"], expected, rtol=1e-5)
    assert told["smallest_std"] == pytest.approx(expected.min(), rel=1e-5)
    entered = np.asarray(space.enter(jnp.asarray(z), statistics))
    np.testing.assert_allclose(entered.mean(0), 0, atol=1e-4)
    np.testing.assert_allclose(np.delete(entered.std(0), 3), 1, atol=1e-4)
    np.testing.assert_allclose(space.leave(jnp.asarray(entered), statistics), z, atol=1e-4)  # raw: not of length 1
    assert space.factor == 1
    unfitted = {name: x for name, x in space.statistics().items()}
    np.testing.assert_array_equal(space.enter(jnp.asarray(z), unfitted), z)


def test_whitened_training_data_and_samples_are_in_those_units():
    """Loss and sampling read the statistics: with others, x_start and z_i are others, by exactly their affine map."""
    stage, params = stage_of(
        "prior_diffusion", embedding__scaling="whiten", embedding__norm="raw", sampling__candidates=1
    )
    first = stage_statistics(stage)
    shifted = {**first, "clip_mean": jnp.arange(D) * 1.0, "clip_std": jnp.linspace(1, 2, D)}
    sample = jax.jit(stage.sample)
    plain, moved = (np.asarray(sample(params, s, Condition(TOKENS, Z_T), None, KEYS)) for s in (first, shifted))
    np.testing.assert_allclose(moved, plain * np.linspace(1, 2, D) + np.arange(D), rtol=1e-5)
    clip = oracle.random_weights(lambda key: stage.init_frozen(key)["clip"])
    pixels = jnp.asarray(RNG.integers(0, 256, (B, 32, 32, 3)), jnp.uint8)
    raw = jax.jit(lambda pixels: base.embed_images(stage.clip, clip, pixels, unit=False))(pixels)
    assert np.abs(np.linalg.norm(raw, axis=-1) - 1).min() > 1e-2
    frozen = {"clip": clip, "statistics": shifted}
    x_start = jax.jit(lambda pixels: stage._x_start(frozen, {"clip_image": pixels}))(pixels)
    np.testing.assert_allclose(x_start, (raw - np.arange(D)) / np.linspace(1, 2, D), rtol=1e-5, atol=1e-6)


def test_a_config_of_before_the_section_is_a_constant_scale():
    new = small("prior_diffusion")
    old = {key: value for key, value in new.to_dict().items() if key not in ("embedding", "fit_examples")}
    space = EmbeddingSpace.of(ConfigDict({**old, "embedding_scale": 4.3}), base.clip_network(new))
    assert (space.scaling, space.factor, space.norm) == ("constant", 4.3, "unit")


@pytest.mark.parametrize(
    ("case", "overrides", "sentence"),
    [
        ("prior_diffusion", {"embedding__scaling": "white"}, "scaling='white' is unknown; did you mean 'whiten'"),
        ("prior_diffusion", {"embedding__norm": "units"}, "norm='units' is unknown; did you mean 'unit'"),
        ("prior_diffusion", {"embedding": {"scaling": "constant"}}, "scale is not set; the paper's is 17.2"),
        ("prior_diffusion", {"embedding__scaling": "whiten", "fit_examples": None}, "needs config.fit_examples"),
        ("decoder", {"sampling__method": "analytic"}, "is for the diffusion prior"),
    ],
)
def test_what_a_config_may_not_say(case, overrides, sentence):
    config = small(case).to_dict()
    for key, value in overrides.items():
        *sections, last = key.split("__")
        section = functools.reduce(dict.__getitem__, sections, config)
        section[last] = value
    with pytest.raises(InputError, match=sentence):
        base.create(ConfigDict(config))
