"""Arcs, directions and sums of embeddings: their closed forms, their ends, and what is refused."""

import numpy as np
import pytest

from unclip_jax.errors import InputError
from unclip_jax.manipulation import arithmetic, interpolation, text_diffs
from unclip_jax.manipulation.latents import Latents
from unclip_jax.manipulation.variations import repeated

RNG = np.random.default_rng(0)


def units(count, width=8):
    z = RNG.normal(size=(count, width))
    return (z / np.linalg.norm(z, axis=1, keepdims=True)).astype(np.float32)


def test_slerp_turns_in_the_plane_of_two_vectors_at_a_constant_rate():
    """In that plane the closed form is a rotation: (cos, sin) of theta times the angle."""
    angle = 2.1
    start = np.asarray([[1.0, 0.0, 0.0]], np.float32)
    end = np.asarray([[np.cos(angle), 0.0, np.sin(angle)]], np.float32)
    for theta in np.linspace(0, 1, 7):
        expected = [[np.cos(theta * angle), 0, np.sin(theta * angle)]]
        np.testing.assert_allclose(interpolation.slerp(start, end, float(theta)), expected, atol=1e-6)


def test_slerps_ends_are_the_vectors_to_the_last_bit_and_its_length_is_kept():
    start, end = units(5), units(5)
    np.testing.assert_array_equal(interpolation.slerp(start, end, 0.0), start)
    np.testing.assert_array_equal(interpolation.slerp(start, end, 1.0), end)
    np.testing.assert_allclose(np.linalg.norm(interpolation.slerp(start, end, 0.3), axis=1), 1, atol=1e-6)
    # Symmetric, and of any shape: an x_T is one vector.
    np.testing.assert_allclose(
        interpolation.slerp(start, end, 0.3), interpolation.slerp(end, start, 0.7), atol=1e-6
    )
    as_image = interpolation.slerp(start.reshape(5, 2, 4), end.reshape(5, 2, 4), 0.3)
    np.testing.assert_array_equal(as_image.reshape(5, 8), interpolation.slerp(start, end, 0.3))


def test_noise_that_turns_stays_noise():
    """What lies half-way on the arc has the variance of its ends, where the mean of the two would have half of it."""
    a, b = (RNG.normal(size=(1, 64, 64, 3)).astype(np.float32) for _ in range(2))
    assert abs(float(interpolation.slerp(a, b, 0.5).std()) - 1) < 0.02
    assert abs(float(((a + b) / 2).std()) - np.sqrt(0.5)) < 0.02


def test_slerp_of_vectors_that_are_all_but_the_same_is_the_straight_line():
    start = units(1)
    np.testing.assert_allclose(interpolation.slerp(start, start, 0.5), start, atol=1e-7)
    near = start + np.float32(1e-5) * units(1)
    np.testing.assert_allclose(interpolation.slerp(start, near, 0.5), (start + near) / 2, atol=1e-7)


@pytest.mark.parametrize(("start", "end", "theta", "says"), [
    ([[1.0, 0]], [[0, 1.0]], 1.1, "theta is 1.1"),
    ([[1.0, 0]], [[0, 1.0]], -0.1, "theta is -0.1"),
    ([[1.0, 0]], [[0, 1.0]], float("nan"), "theta is nan"),
    ([[1.0, 0]], [[-2.0, 0]], 0.5, "opposite"),
    ([[0.0, 0]], [[0, 1.0]], 0.5, "length 0"),
])  # fmt: skip
def test_arcs_that_are_none_are_refused(start, end, theta, says):
    with pytest.raises(InputError, match=says):
        interpolation.slerp(np.asarray(start, np.float32), np.asarray(end, np.float32), theta)


def test_paths_go_pair_by_pair():
    start, end = Latents.of(units(2), ["a", "b"]), Latents.of(units(2), ["c", "d"])
    path = interpolation.between(start, end, interpolation.thetas(3), noise="fixed")
    assert path.captions == ("a", "a", "c", "b", "b", "d") and not path.x_T
    np.testing.assert_array_equal(path.z_i[[0, 3]], start.z_i)
    np.testing.assert_array_equal(path.z_i[[2, 5]], end.z_i)
    np.testing.assert_array_equal(path.z_i[4], interpolation.slerp(start.z_i, end.z_i, 0.5)[1])
    with pytest.raises(InputError, match="no x_T to turn"):
        interpolation.between(start, end, [0.5])
    with pytest.raises(InputError, match="did you mean 'slerp'"):
        interpolation.between(start, end, [0.5], noise="slurp")
    with pytest.raises(InputError, match="from 2 images to 1"):
        interpolation.between(start, end.take([0]), [0.5], noise="fixed")
    with pytest.raises(InputError, match="two at least"):
        interpolation.thetas(1)


def test_a_text_diff_has_length_1_and_leads_from_the_image_towards_it():
    z_t, z_t0 = units(2), units(2)
    z_d = text_diffs.direction(z_t, z_t0)
    np.testing.assert_allclose(np.linalg.norm(z_d, axis=1), 1, atol=1e-6)
    # What two captions have in common is not in their difference: with unit vectors it is at right angles to the sum.
    np.testing.assert_allclose(np.sum(z_d * (z_t + z_t0), axis=1), 0, atol=1e-6)
    np.testing.assert_allclose(text_diffs.direction(3 * z_t), z_t, atol=1e-6)
    images = Latents(units(2), {"decoder": RNG.normal(size=(2, 4, 4, 3)).astype(np.float32)}, ("", "a ring"))
    along = text_diffs.along(images, z_d, [0.0, 0.25, 0.5])
    np.testing.assert_array_equal(along.z_i[[0, 3]], images.z_i)
    assert along.captions == ("", "", "", "a ring", "a ring", "a ring")
    np.testing.assert_array_equal(along.x_T["decoder"][[0, 1, 2]], images.x_T["decoder"][[0, 0, 0]])
    cosines = (along.z_i.reshape(2, 3, -1) * z_d[:, None]).sum(-1)
    angles = np.arccos(np.clip(cosines, -1, 1))
    np.testing.assert_allclose(angles, angles[:, :1] * [1, 0.75, 0.5], atol=1e-4)  # evenly, from z_i
    np.testing.assert_allclose(np.linalg.norm(along.z_i, axis=1), 1, atol=1e-6)


def test_embeddings_of_other_lengths_keep_theirs():
    images = Latents.of(5 * units(2))
    along = text_diffs.along(images, units(2), [0.3])
    np.testing.assert_allclose(np.linalg.norm(along.z_i, axis=1), 5, atol=1e-5)


def test_text_diffs_that_say_nothing_are_refused():
    z = units(2)
    with pytest.raises(InputError, match="caption 1 and its baseline"):
        text_diffs.direction(z, np.stack([-z[0], z[1]]))
    with pytest.raises(InputError, match="theta is 1.5"):
        text_diffs.along(Latents.of(z), z, [1.5])
    with pytest.raises(InputError, match="1 directions were given for 2 images"):
        text_diffs.along(Latents.of(z), z[:1], [0.5])


def test_sums_are_as_long_as_their_first_term():
    a, b, c = units(3), units(1), units(3)
    np.testing.assert_allclose(arithmetic.combined([(2.0, a)]), a, atol=1e-6)
    made = arithmetic.combined([(1.0, 3 * a), (0.5, b), (-0.5, c)])
    np.testing.assert_allclose(np.linalg.norm(made, axis=1), 3, atol=1e-5)
    total = 3 * a + 0.5 * b - 0.5 * c
    np.testing.assert_allclose(made, 3 * total / np.linalg.norm(total, axis=1, keepdims=True), atol=1e-5)
    for terms, says in (
        ([], "at least one"), ([(1.0, a), (-1.0, a)], "cancel out"), ([(1.0, a), (1.0, units(1, 4))], "of 4 and of 8")
    ):  # fmt: skip
        with pytest.raises(InputError, match=says):
            arithmetic.combined(terms)


def test_latents_are_repeated_image_by_image():
    images = Latents.of(units(2), ["a", "b"])
    assert repeated(images, samples=3).captions == ("a", "a", "a", "b", "b", "b")
    with pytest.raises(InputError, match="one at least"):
        repeated(images, samples=0)
    with pytest.raises(InputError, match="2 embeddings were given, but captions for 1"):
        Latents.of(units(2), ["a"])
