"""The networks whose features an evaluation compares images by: Inception, or a CLIP.

    inception           the network of 2015-12-05 with the weights of a file that the user has; what FID means
    inception-redrawn   the same network with weights drawn from a seed, for machines without that file
    clip                a CLIP: that of the models which are evaluated, or one of another run

Numbers by two of them do not compare, so a result is named after its network.
"""

import dataclasses
import logging
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import UInt8

from unclip_jax import digests, inception_file, unclip
from unclip_jax.errors import InputError, nearest
from unclip_jax.evaluation import inception, inception_paths, protocols

_LOG = logging.getLogger(__name__)
NETWORKS = ("inception", "inception-redrawn", "clip")
_REDRAWN_SEED = 0
_KNOWN_SIZE = 256
# What of Inception's features is kept: of FID, sFID and the Inception Score.
_KEPT = ("2048", "spatial", "logits_unbiased")

Pixels = UInt8[np.ndarray, "b h w 3"]


@dataclasses.dataclass(frozen=True)
class FeatureNetwork:
    """What makes features of images.

    Attributes:
      key: one of NETWORKS.
      name: what results call it.
      digest: of its weights.
      path: how pixels reach it; a key of `inception_paths.INCEPTION`, or how a CLIP's are made.
      compute: fn(images, captions) -> {name: float32 [b, n]}; without captions no "z_t".
      main: name of the array that distances are of.
    """

    key: str
    name: str
    digest: str
    path: str
    compute: Callable[[Pixels, Sequence[str] | None], dict[str, np.ndarray]]
    main: str

    def described(self) -> dict[str, str]:
        """Returns what a manifest says of it."""
        return {"name": self.name, "digest": self.digest, "path": self.path}


def check(keys: Sequence[str]) -> None:
    """Raises InputError where one of them is no network, or there is none."""
    for key in keys:
        if key not in NETWORKS:
            raise InputError(f"there is no feature network {key!r}; {nearest(key, NETWORKS)}")
    if not keys:
        raise InputError(f"config.features is empty; name some of {', '.join(NETWORKS)}")


def read(
    key: str, protocol: protocols.Protocol, *, weights: str, clip: unclip.UnCLIP | None, microbatch: int
) -> FeatureNetwork:
    """Reads a network, and has the device show that it computes Inception's features right.

    Args:
      key: one of NETWORKS.
      protocol: what images are made for.
      weights: file of Inception's weights.
      clip: a model with the part "clip".
      microbatch: images of a call.

    Raises:
      InputError: there is no such file or CLIP, it is another, or the device does not compute in float32.
    """
    check([key])
    if key == "clip":
        if clip is None or "clip" not in clip.parts:
            raise InputError("config.features has 'clip', and there is none; give its workdir by --config.clip_workdir")
        return _clip(clip)
    if key == "inception" and not weights:
        raise InputError(
            "config.features has 'inception', whose weights are a file that you must have: "
            "--config.inception=pt_inception-2015-12-05-6726825d.pth; without it take 'inception-redrawn' or 'clip', "
            "whose numbers are no FID that anybody else has"
        )
    if key == "inception-redrawn":
        return _inception(key, inception.redrawn(_REDRAWN_SEED), protocol.inception, microbatch)
    read_set = inception_file.read(weights)
    size = protocol.size if protocol.size in inception.answers() else _KNOWN_SIZE
    away = inception.check_device(size=size, batch=microbatch)
    _LOG.info("Inception's features of known images are %.1e away from those known", away)
    return _inception(key, read_set, protocol.inception, microbatch)


def _inception(key: str, network: inception.FeatureSet, path: str, microbatch: int) -> FeatureNetwork:
    def batch(images: Pixels) -> dict[str, np.ndarray]:
        places = np.minimum(np.arange(microbatch), len(images) - 1)  # the last is filled up: one compiled program
        found = inception_paths.INCEPTION[path](network.params, images[places])
        return {name: np.asarray(found[name])[: len(images)] for name in _KEPT}

    def compute(images: Pixels, captions: Sequence[str] | None) -> dict[str, np.ndarray]:
        del captions
        parts = [batch(images[start : start + microbatch]) for start in range(0, len(images), microbatch)]
        return {name: np.concatenate([part[name] for part in parts]) for name in _KEPT}

    return FeatureNetwork(key, network.name, digests.fingerprint(network.params), path, compute, "2048")


def _clip(model: unclip.UnCLIP) -> FeatureNetwork:
    part = model.part("clip")
    digest = digests.fingerprint(part.params)

    def compute(images: Pixels, captions: Sequence[str] | None) -> dict[str, np.ndarray]:
        found = {"z_i": model.embed_images(images)}
        return found if captions is None else {**found, "z_t": model.embed_text(captions)}

    return FeatureNetwork("clip", f"CLIP {digest[:8]}", digest, "square, area", compute, "z_i")
