"""The FID Inception network against features that torch-fidelity's computed in float64; and each known slip, caught."""

import functools
import pathlib

import flax.linen as nn
import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from parity import inception_folder

from unclip_jax.errors import InputError
from unclip_jax.evaluation import image_sets, inception, inception_network, scoring

BAR = 2e-6
# The quietest slip has to be as far above the bar as float32's rounding is below it, and more.
LOUD = 20 * BAR
ANSWERS = inception.answers()


@pytest.fixture(scope="module")
def params():
    return inception.redrawn(inception.ANSWERS_SEED).params


@pytest.mark.parametrize("size", [299, 256, 64])
def test_features_are_torch_fidelitys(params, size):
    found = inception.features(params, inception.known_images(size))
    shapes = {name: value.shape for name, value in found.items()}
    assert shapes == {name: (2, width) for name, width in inception.WIDTHS.items()}
    assert all(value.dtype == jnp.float32 for value in found.values())
    assert inception.distance(found, ANSWERS[size]) <= BAR


def _products(jaxpr):
    """All equations that multiply, those of programs inside included."""
    for equation in jaxpr.eqns:
        if equation.primitive.name in ("conv_general_dilated", "dot_general"):
            yield equation
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from _products(inner)


def test_every_product_asks_for_full_float32(params):
    traced = jax.make_jaxpr(inception.features)(params, inception.known_images(64))
    asked = [equation.params["precision"] for equation in _products(traced.jaxpr)]
    assert len(asked) == 94 + 1
    assert {p for pair in asked for p in pair} == {jax.lax.Precision.HIGHEST}


# What a slip puts in the place of a function of the network.


def _aligned_corners(images, size=299):
    place = np.linspace(0, images.shape[1] - 1, size)
    grid = np.stack(np.meshgrid(place, place, indexing="ij"))
    read = functools.partial(jax.scipy.ndimage.map_coordinates, coordinates=grid, order=1)
    return jnp.stack([jnp.stack([read(image[..., c]) for c in range(3)], -1) for image in images])


def _resized(method, antialias):
    return lambda images: jax.image.resize(images, (len(images), 299, 299, 3), method, antialias=antialias)


def _rounding(*arrays, **options):
    return [None if x is None else x.astype(jnp.bfloat16).astype(jnp.float32) for x in arrays]


def _convolution(**fixed):
    def make(features, kernel, stride, padding):
        options = {"padding": padding, "use_bias": False, "name": "conv"} | fixed
        return nn.Conv(features, kernel, (stride, stride), **options)

    return make


# Each with the first features that hear it.
SLIPS = {
    "1 padding counts in average pools": ("768", {"average_pool": lambda x: nn.avg_pool(x, (3, 3), (1, 1), "SAME")}),
    "2 the last pool is an average": ("2048", {"last_pool": inception_network.average_pool}),
    "4 pixels by 2 x / 255 - 1": ("64", {"scaled": lambda x: 2 * x / 255 - 1}),
    "4 pixels by ImageNet's mean and deviation": (
        "64",
        {"scaled": lambda x: (x / 255 - np.array([0.485, 0.456, 0.406])) / np.array([0.229, 0.224, 0.225])},
    ),
    "5 half a pixel": ("64", {"resized": _resized("bilinear", False)}),
    "5 aligned corners": ("64", {"resized": _aligned_corners}),
    "5 antialiased bicubic": ("64", {"resized": _resized("bicubic", True)}),
    "5 not resized": ("64", {"resized": lambda images: images}),
    "6 Flax's epsilon": ("64", {"EPSILON": 1e-5}),
    "8 bfloat16 products": ("64", {"convolution": _convolution(promote_dtype=_rounding)}),
    "9 padding": (
        "64",
        {
            "convolution": _convolution(padding="SAME"),
            "reduced": lambda x: nn.max_pool(x, (3, 3), (2, 2), "SAME"),
        },
    ),
}


def _wanted():
    return {name: value[:1] for name, value in ANSWERS[256].items()}


def _computed(params, images, name=None, **options):
    """What the network gives with whatever stands in its functions' places now: all of it, or one entry."""

    def apply(params, pixels):
        found = inception_network.Inception().apply(params, inception_network.resized(pixels), **options)
        return {name: found[name]} if name else found

    return jax.jit(apply)(params, jnp.asarray(images, jnp.float32))


def _leave_out_what_follows(monkeypatch):
    """Puts nothing in the place of all blocks after the stem, which takes a tenth of the time to trace."""
    for block in ("Pooled35", "To17", "To8", "Widened8", "classes"):
        monkeypatch.setattr(inception_network, block, lambda *_, **__: lambda x: x)
    monkeypatch.setattr(inception_network, "Factored17", lambda *_, **__: lambda x: (x, x))


@pytest.mark.parametrize("slip", SLIPS)
def test_slips_in_the_network_are_heard(params, monkeypatch, slip):
    name, replacements = SLIPS[slip]
    if name == "64":
        _leave_out_what_follows(monkeypatch)
        right = _computed(params, inception.known_images(256)[:1], name)
        assert inception.distance(right, {name: _wanted()[name]}) <= BAR
    for function, replacement in replacements.items():
        monkeypatch.setattr(inception_network, function, replacement)
    found = _computed(params, inception.known_images(256)[:1], name)
    assert inception.distance(found, {name: _wanted()[name]}) > LOUD


def test_slips_in_what_is_read_or_taken_are_heard(params):
    images, wanted = inception.known_images(256), ANSWERS[256]
    read = functools.partial(inception.features, params)
    found, every = _computed(params, images, capture_intermediates=lambda module, _: module.name in ("branch1x1", "bn"))
    assert inception.distance(found, wanted) <= BAR

    without_scale = jax.tree_util.tree_map_with_path(
        lambda path, x: jnp.ones_like(x) if path[-1].key == "scale" else x, params
    )
    bias = inception.redrawn_tensors(inception.ANSWERS_SEED)["fc.bias"]
    spatial = np.asarray(found["spatial"]).reshape(2, 17, 17, 7)

    def branch(letter, channels=slice(7)):
        output = every["intermediates"][f"Mixed_6{letter}"]["branch1x1"]["__call__"][0]
        return np.asarray(output)[..., channels].reshape(2, -1)

    before_relu = every["intermediates"]["Mixed_6d"]["branch1x1"]["bn"]["__call__"][0][..., :7]
    slips = {
        "6 without scales": found | _computed(without_scale, images, "64"),
        "7 BGR": read(images[..., ::-1]),
        "7 columns for rows": read(images.swapaxes(1, 2)),
        "3 logits with bias": found | {"logits_unbiased": found["logits_unbiased"] + bias},
        "channels first": found | {"spatial": spatial.transpose(0, 3, 1, 2).reshape(2, -1)},
        "other channels": found | {"spatial": branch("d", slice(7, 14))},
        "before the ReLU": found | {"spatial": before_relu.reshape(2, -1)},
    }
    slips |= {f"another block, {letter}": found | {"spatial": branch(letter)} for letter in "bce"}
    heard = {slip: inception.distance(changed, wanted) for slip, changed in slips.items()}
    assert min(heard.values()) > LOUD, heard
    assert inception.distance(found | {"spatial": branch("d")}, wanted) <= BAR


def test_known_answers_tell_a_good_device_from_a_bad_one(params):
    assert inception.check_device(size=64, batch=2) <= BAR

    def rounding(params, images):
        """A device that rounds weights to bfloat16."""
        return inception.features(jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(x.dtype), params), images)

    with pytest.raises(InputError, match="features on cpu .* are .*e-0[23] away .*bfloat16"):
        inception.check_device(size=64, compute=rounding)

    def broken(params, images):
        return {name: x.at[0, 0].set(jnp.nan) for name, x in inception.features(params, images).items()}

    with pytest.raises(InputError, match="inf away"):
        inception.check_device(size=64, compute=broken)


def test_known_answers_are_for_any_batch():
    calls = []

    def compute(params, images):
        calls.append(images.shape)
        return {name: value[[0, 1, 0, 1, 0]] for name, value in ANSWERS[256].items()}

    assert inception.check_device(batch=5, compute=compute) == 0
    assert calls == [(5, 256, 256, 3)]


def test_tensors_of_another_network_are_refused():
    tensors = inception.redrawn_tensors(0)
    shape = tensors["Mixed_7c.branch1x1.conv.weight"].shape
    assert shape == (320, 2048, 1, 1)
    changed = dict(tensors) | {
        "AuxLogits.fc.weight": np.zeros(3, np.float32),
        "fc.weight": np.zeros((1000, 2048), np.float32),
        "Mixed_5b.branch_pool.bn.bias": np.full(32, np.nan, np.float32),
    }
    del changed["Conv2d_1a_3x3.bn.running_var"]
    with pytest.raises(InputError) as caught:
        inception.from_tensors(changed, where="x.pth")
    for said in (
        "x.pth", "Conv2d_1a_3x3.bn.running_var is missing", "AuxLogits.fc.weight is unknown",
        "fc.weight is float32[1000, 2048], not float32[1008, 2048]", "branch_pool.bn.bias is not finite",
    ):  # fmt: skip
        assert said in str(caught.value)


def test_redrawn_weights_are_named_after_their_seed():
    assert inception.redrawn(inception.ANSWERS_SEED).name == "inception-2015-12-05-redrawn-20151205"


def test_a_folder_of_pictures_has_torch_fidelitys_features(params, tmp_path):
    inception_folder.write(tmp_path)
    wanted = np.load(pathlib.Path(inception_folder.__file__).parent / inception_folder.ANSWERS)
    feature_set, lines = inception.FeatureSet("redrawn", params), []
    batches = image_sets.read(tmp_path, batch_size=2)
    found = scoring.extracted(
        feature_set, batches, 3, names=tuple(inception.WIDTHS), batch_size=2, report=lines.append, what="pictures"
    )
    assert inception.distance(found, {name: wanted[name] for name in inception.WIDTHS}) <= BAR
    assert lines[-1].startswith("pictures: 3 of 3, ")
