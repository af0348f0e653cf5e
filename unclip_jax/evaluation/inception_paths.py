"""How real images become pixels, and pixels what Inception reads: a function for each way that protocols name.

The ways differ in what they cut off and in the filter that shrinks, and the distance between a photograph shrunk in
one way and in another can exceed that between two models.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import UInt8

from unclip_jax.data import resize
from unclip_jax.evaluation import inception, preprocessing

Pixels = UInt8[np.ndarray, "h w 3"]
Batch = UInt8[np.ndarray, "b h w 3"]

# Of a protocol's `real`: function of an image of any size.
REAL: dict[str, Callable[[Pixels], Pixels]] = {
    "centre-crop-256": lambda image: preprocessing.center_crop_arr(image, 256),
    "lanczos-256": lambda image: preprocessing.lanczos_crop(image, 256),
    "squeezed-512-jpeg-75": lambda image: preprocessing.through_jpeg(preprocessing.squeeze(image, 512), quality=75),
    "square-64": lambda image: resize.square(image, size=64),
}


def _resized(resizing: Callable[[Pixels], np.ndarray]) -> Callable[[Any, Batch], inception.Features]:
    return lambda params, images: inception.features_of_resized(params, np.stack([resizing(one) for one in images]))


# Of a protocol's `inception`: function of weights and images. The network's own resizing is TensorFlow 1's, clean-fid's
# is Pillow's bicubic filter, not rounded, and pytorch-fid's is PyTorch's bilinear one without antialiasing.
INCEPTION: dict[str, Callable[[Any, Batch], inception.Features]] = {
    "graph": lambda params, images: inception.features(params, images),
    "clean": _resized(preprocessing.clean_fid_input),
    "torch": _resized(preprocessing.pytorch_fid_input),
}
