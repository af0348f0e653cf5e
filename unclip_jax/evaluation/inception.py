"""Features of the Inception network of 2015-12-05, which FID, sFID, KID, the Inception Score and recall are of.

Its weights are not in this repository: `unclip_jax.inception_file` reads them from a file that the user names, and
`redrawn` draws others of the same shapes, with which everything but the numbers' meaning can be tried.
"""

import functools
import importlib.resources
import io
import math
import zlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from unclip_jax.errors import InputError
from unclip_jax.evaluation import inception_network
from unclip_jax.evaluation.inception_network import SIZE

NAME = "inception-2015-12-05"
# What each entry of the features has per image; "spatial" are seven channels at 17 x 17 places.
WIDTHS = {"64": 64, "192": 192, "768": 768, "2048": 2048, "spatial": 17 * 17 * 7, "logits_unbiased": 1008}
ANSWERS = "inception_answers.npz"
ANSWERS_SEED = 20151205
# Float32 in another order of additions is 1e-7 away, TensorFloat-32 about 3e-4, bfloat16 2e-3, the quietest mistake in
# the network 2e-4.
TOLERANCE = 2e-5

Features = dict[str, Float[Array, "b _"]]


class FeatureSet(NamedTuple):
    """Weights of the network and the name that results are given, for numbers of two sets do not compare."""

    name: str
    params: Any


def features(params: Any, images: UInt8[Array, "b h w 3"] | UInt8[np.ndarray, "b h w 3"]) -> Features:
    """Reads images of any one size, which the network resizes itself.

    Args:
      params: the `params` of a FeatureSet.
      images: RGB, uint8 [b, h, w, 3] in [0, 255].

    Returns:
      float32 arrays [b, n] by name: "64", "192", "768" and "2048", means over the image of what the network has after
      its first and second max pool, before Mixed_7a and at its end (the last is what FID is of); "spatial", the first 7
      channels of Mixed_6d's 1x1 branch in rows, columns, channels (sFID: Nash et al., 2021, "Generating images with
      sparse representations", as ADM's evaluation has it); "logits_unbiased", 1,008 logits without their bias (the
      Inception Score).
    """
    return _features(params, images)


def features_of_resized(
    params: Any, pixels: Float[Array, "b 299 299 3"] | Float[np.ndarray, "b 299 299 3"]
) -> Features:
    """As `features` for protocols that resize by themselves and do not round: float32 [b, 299, 299, 3] in [0, 255].

    Raises:
      ValueError: pixels of another size, which the network would read without a word.
    """
    if pixels.shape[1:3] != (SIZE, SIZE):
        raise ValueError(f"pixels of {pixels.shape[1:3]} are not resized to {SIZE}")
    return _features_of_resized(params, pixels)


@jax.jit
def _features(params, images):
    return inception_network.Inception().apply(params, inception_network.resized(images.astype(jnp.float32)))


@jax.jit
def _features_of_resized(params, pixels):
    return inception_network.Inception().apply(params, pixels.astype(jnp.float32))


# Last parts of the published names and where those tensors are here: collection, name.
_PLACES = {
    "conv.weight": ("params", "conv", "kernel"),
    "bn.weight": ("params", "bn", "scale"),
    "bn.bias": ("params", "bn", "bias"),
    "bn.running_mean": ("batch_stats", "bn", "mean"),
    "bn.running_var": ("batch_stats", "bn", "var"),
}


@functools.cache
def shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes of the published file's tensors, kernels as [out, in, h, w].

    A file may also have `num_batches_tracked` for each batch norm, which no feature depends on.
    """
    pixels = jax.ShapeDtypeStruct((1, SIZE, SIZE, 3), jnp.float32)
    tree = jax.eval_shape(inception_network.Inception().init, jax.random.key(0), pixels)
    found: dict[str, tuple[int, ...]] = {"fc.weight": (1008, 2048), "fc.bias": (1008,)}
    ends = {place: end for end, place in _PLACES.items()}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        collection, *modules, module, name = (key.key for key in path)
        if module != "fc":
            shape = leaf.shape if name != "kernel" else (leaf.shape[3], leaf.shape[2], *leaf.shape[:2])
            found[".".join([*modules, ends[collection, module, name]])] = shape
    return found


def from_tensors(tensors: Mapping[str, np.ndarray], *, where: str = "the weights") -> Any:
    """Returns the network's variables from arrays by their published names.

    Args:
      tensors: arrays by name; read one at a time.
      where: what messages call them.

    Raises:
      InputError: a tensor is missing, is none of the network's, or has another shape or type; the first five are named.
    """
    wanted = shapes()
    names = {name for name in tensors if not name.endswith("num_batches_tracked")}
    wrong = [f"{name} is missing" for name in sorted(wanted.keys() - names)]
    wrong += [f"{name} is unknown" for name in sorted(names - wanted.keys())]
    tree: dict[str, Any] = {}
    for name in sorted(wanted.keys() & names):
        tensor = np.asarray(tensors[name])
        if tensor.shape != wanted[name] or not np.issubdtype(tensor.dtype, np.floating):
            wrong.append(f"{name} is {tensor.dtype}{list(tensor.shape)}, not float32{list(wanted[name])}")
        elif not np.isfinite(tensor).all():
            wrong.append(f"{name} is not finite")
        elif name != "fc.bias":
            _place(tree, name, tensor.astype(np.float32))
    if wrong:
        shown = "; ".join(wrong[:5]) + (f"; and {len(wrong) - 5} more" if len(wrong) > 5 else "")
        raise InputError(f"{where} are not those of the FID Inception network: {shown}")
    return tree


def _place(tree, name, tensor):
    if name == "fc.weight":
        path: tuple[str, ...] = ("params", "fc", "kernel")
    else:
        *modules, layer, kind = name.split(".")
        collection, *rest = _PLACES[f"{layer}.{kind}"]
        path = (collection, *modules, *rest)
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = jnp.asarray(tensor.transpose(2, 3, 1, 0) if tensor.ndim == 4 else tensor.T)


def redrawn_tensors(seed: int) -> dict[str, np.ndarray]:
    """Draws all tensors of the published file anew, each from `seed` and its own name: float32 arrays by name.

    No statistic of a batch norm is at its default, and activations neither vanish nor grow with depth: kernels are He's
    times the deviation that a norm divides by.
    """
    return {name: _drawn(name, shape, seed) for name, shape in shapes().items()}


def _drawn(name, shape, seed):
    rng = np.random.RandomState(zlib.crc32(name.encode()) ^ seed)
    if name.endswith("running_var"):
        return rng.uniform(0.05, 0.15, shape).astype(np.float32)
    if name.endswith("bn.weight"):
        return rng.uniform(0.7, 1.3, shape).astype(np.float32)
    deviation = {"conv": math.sqrt(0.2 / math.prod(shape[1:])), "fc": 0.03, "bn": 0.1}[name.split(".")[-2]]
    return (deviation * rng.standard_normal(shape)).astype(np.float32)


@functools.lru_cache(maxsize=1)
def redrawn(seed: int) -> FeatureSet:
    """Returns redrawn weights, for tests and machines without the file: features, but nobody else's."""
    return FeatureSet(f"{NAME}-redrawn-{seed}", from_tensors(redrawn_tensors(seed)))


def known_images(size: int) -> UInt8[np.ndarray, "2 {size} {size} 3"]:
    """Two pictures of integer arithmetic alone, the same on every machine: waves of all lengths, and blocks of noise.

    Neither is like its mirror image, its transposed, or itself in another order of channels.
    """
    row, column, channel = np.ogrid[:size, :size, :3]
    row, column = row * 256 // size, column * 256 // size
    waves = (row * row // (7 + 4 * channel) + column * (3 + 2 * channel) + row * column // 11) % 256
    mixed = (row // 3 * 40503 + column // 5 * 30011 + channel * 20101) * 2654435761 % 2**32
    blocks = (mixed >> 13) % 256 * (column + 64) // 320
    return np.stack([waves, blocks]).astype(np.uint8)


def distance(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> float:
    """Returns the largest relative L2 distance of an entry of `found` from `wanted`.

    It is infinite where a number is not finite or a shape is another.
    """
    worst = 0.0
    for name, array in wanted.items():
        expected, got = np.asarray(array, np.float64), np.asarray(found[name], np.float64)
        if got.shape != expected.shape or not np.isfinite(got).all():
            return math.inf
        worst = max(worst, float(np.linalg.norm(got - expected) / np.linalg.norm(expected)))
    return worst


def answers() -> dict[int, dict[str, np.ndarray]]:
    """Returns what is known of `known_images` under weights redrawn with ANSWERS_SEED: features by size and name.

    Computed in float64 by another implementation (`tests/parity/inception_answers.py`).
    """
    packed = importlib.resources.files("unclip_jax.evaluation").joinpath(ANSWERS).read_bytes()
    found: dict[int, dict[str, np.ndarray]] = {}
    with np.load(io.BytesIO(packed)) as file:
        for key in file.files:
            size, name = key.split("/")
            found.setdefault(int(size), {})[name] = file[key]
    return found


def check_device(
    *, size: int = 256, batch: int = 2, compute: Callable[[Any, UInt8[np.ndarray, "b h w 3"]], Features] = features
) -> float:
    """Computes features that are known on the device that will compute the others, before a job spends it.

    Args:
      size: of the images, a key of `answers`; with `batch`, those of the job, and the compiled program is the job's.
      batch: images in a call, at least 2; the known ones are repeated.
      compute: what maps weights and images to features.

    Returns:
      the largest relative L2 distance of the six features from those known.

    Raises:
      InputError: it is above TOLERANCE.
    """
    known = known_images(size)
    wanted = answers()[size]
    images = known[np.arange(max(batch, len(known))) % len(known)]
    found = compute(redrawn(ANSWERS_SEED).params, images)
    worst = distance(found, {name: wanted[name][np.arange(len(images)) % len(known)] for name in WIDTHS})
    if worst > TOLERANCE:
        device = jax.devices()[0]
        raise InputError(
            f"Inception's features on {device.platform} ({device.device_kind}) are {worst:.1e} away from those known, "
            f"more than {TOLERANCE:.0e}: it computes float32 convolutions in lower precision (bfloat16 gives 2e-3), or "
            "its compiler's options are wrong; score on another device, or without those options"
        )
    return worst
