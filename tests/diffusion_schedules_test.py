"""Noise schedules against their published formulas, and the published subsets of timesteps."""

import math

import numpy as np
import pytest

from unclip_jax.diffusion import schedules
from unclip_jax.errors import InputError


@pytest.mark.parametrize("num_timesteps", [10, 64, 1000])
def test_cosine_betas_follow_the_formula(num_timesteps):
    def alpha_bar(time):
        return math.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2

    expected = [min(1 - alpha_bar((t + 1) / num_timesteps) / alpha_bar(t / num_timesteps), 0.999)
                for t in range(num_timesteps)]
    betas = schedules.betas("cosine", num_timesteps)
    assert betas.dtype == np.float64
    np.testing.assert_allclose(betas, expected, rtol=0, atol=1e-12)
    assert betas[-1] == 0.999


@pytest.mark.parametrize("num_timesteps", [50, 1000])
def test_linear_betas_are_evenly_spaced_between_the_published_ends(num_timesteps):
    betas = schedules.betas("linear", num_timesteps)
    scale = 1000 / num_timesteps
    expected = [scale * (1e-4 + (0.02 - 1e-4) * t / (num_timesteps - 1)) for t in range(num_timesteps)]
    assert betas.dtype == np.float64
    np.testing.assert_allclose(betas, expected, rtol=0, atol=1e-12)


def test_both_schedules_end_near_pure_noise():
    for name in schedules.SCHEDULES:
        assert np.prod(1 - schedules.betas(name, 1000)) < 1e-4


@pytest.mark.parametrize(
    ("name", "num_timesteps", "sentence"),
    [
        ("cosin", 1000, "did you mean 'cosine'"),
        ("linear", 20, "21 timesteps or more"),
        ("cosine", 0, "1 timestep or more"),
    ],
)
def test_an_impossible_schedule_is_refused(name, num_timesteps, sentence):
    with pytest.raises(InputError, match=sentence):
        schedules.betas(name, num_timesteps)


def test_64_even_steps_are_the_trajectory_of_analytic_dpm():
    """Bao et al. 2022 count timesteps from 1 and spread them as round(1 + k (N - 1) / (K - 1))."""
    theirs = [round(1 + k * 999 / 63) for k in range(64)]
    assert theirs[:4] == [1, 17, 33, 49] and theirs[-3:] == [968, 984, 1000]
    assert (schedules.sampling_timesteps(1000, 64)[::-1] + 1).tolist() == theirs


def test_fast27_is_glides_subset():
    steps = schedules.sampling_timesteps(1000, "fast27")
    assert len(steps) == 27 and steps.dtype == np.int32
    assert steps[0] == 997 and steps[-1] == 0 and 999 not in steps
    # Ten steps in each of the two cleanest fifths, two in the noisiest.
    assert [int(((steps >= low) & (steps < low + 200)).sum()) for low in range(0, 1000, 200)] == [10, 10, 3, 2, 2]
    sections = schedules.sampling_timesteps(1000, "10,10,3,2,2")
    assert set(sections) ^ set(steps) == {997, 999}


@pytest.mark.parametrize("spec", [1, 2, 15, 250, 999, 1000, "250", "ddim50", "90,60,60,20,20", "fast27"])
def test_every_subset_descends_strictly_within_the_process(spec):
    steps = schedules.sampling_timesteps(1000, spec)
    assert np.all(np.diff(steps) < 0) and steps[0] <= 999 and steps[-1] >= 0
    if isinstance(spec, int):
        assert len(steps) == spec and steps[0] == 999


def test_ddim_steps_have_one_integer_stride_from_zero():
    np.testing.assert_array_equal(schedules.sampling_timesteps(1000, "ddim50"), np.arange(980, -1, -20))


@pytest.mark.parametrize(
    ("spec", "sentence"),
    [
        (1001, "from 1 to 1000"),
        (0, "from 1 to 1000"),
        (-3, "from 1 to 1000"),
        ("600,500", "from 1 to 1000"),
        ("501,1", "from 1 to 500, not 501"),
        ("10,0", "from 1 to 500, not 0"),
        ("ddim1001", "from 1 to 1000"),
        ("ddim300", "'ddim334' is the nearest"),
        ("fast28", "'fast27'"),
        ("", "unknown sampling steps"),
    ],
)
def test_impossible_steps_are_refused_with_what_would_be_right(spec, sentence):
    with pytest.raises(InputError, match=sentence):
        schedules.sampling_timesteps(1000, spec)
