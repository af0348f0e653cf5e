"""An affine function of a CLIP embedding, fit to what people said of images, as a file that knows its CLIP."""

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Float64

from unclip_jax.errors import InputError
from unclip_jax.evaluation import feature_sets
from unclip_jax.evaluation.feature_sets import Features

RATINGS, PAIRS = "ratings", "pairs"
_FORMAT = "unclip_jax probe 1"


@dataclasses.dataclass(frozen=True)
class AffineProbe:
    """weights . z / |z| + bias.

    Attributes:
      kind: RATINGS, whose score is a rating in the unit of those it was fit to, or PAIRS, whose scores are log-odds: of
        two images the one with a score higher by s is preferred with probability 1 / (1 + exp(-s)).
      weights: float64 [d].
      bias: 0 for PAIRS, by symmetry.
      clip: which CLIP's embeddings it is for: a fingerprint of weights, or a name.
      about: how it was made, for the reader: numbers and texts.
    """

    kind: str
    weights: Float64[np.ndarray, "d"]
    bias: float
    clip: str
    about: Mapping[str, Any]

    def scores(self, z: Features) -> Float64[np.ndarray, "_"]:
        """Returns the scores of embeddings, float [n, d] of any length.

        Raises:
          InputError: embeddings of another width, zeros, or not finite.
        """
        if z.ndim == 2 and z.shape[1] != len(self.weights):
            raise InputError(f"this probe reads embeddings of {len(self.weights)} numbers, not of {z.shape[1]}")
        return feature_sets.unit(z, what="the embeddings") @ self.weights + self.bias

    def check_clip(self, clip: str) -> None:
        """Raises InputError where embeddings come from another CLIP: numbers would come out that mean nothing."""
        if clip != self.clip:
            raise InputError(
                f"this probe was fit to embeddings of the CLIP {self.clip!r}, and these are of {clip!r}; fit one for it"
            )

    def write(self, path: epath.PathLike) -> None:
        """Writes it as JSON, whole or not at all; numbers are read back to the last bit."""
        content = {
            "format": _FORMAT,
            "kind": self.kind,
            "clip": self.clip,
            "about": dict(self.about),
            "bias": self.bias,
            "weights": self.weights.tolist(),
        }
        path = epath.Path(path).expanduser()
        temporary = path.parent / f".{path.name}.new"
        temporary.write_text(json.dumps(content, indent=1) + "\n")
        temporary.replace(path)


def read(path: epath.PathLike) -> AffineProbe:
    """Reads what `AffineProbe.write` wrote.

    Raises:
      InputError: there is no such file, or it is something else.
    """
    try:
        content = json.loads(epath.Path(path).expanduser().read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"the probe {str(path)!r} cannot be read: {error}") from error
    try:
        weights = np.array([float(weight) for weight in content["weights"]], np.float64)
        probe = AffineProbe(
            content["kind"], weights, float(content["bias"]), str(content["clip"]), dict(content["about"])
        )
        whole = content["format"] == _FORMAT and probe.kind in (RATINGS, PAIRS) and len(weights) > 0
    except (KeyError, TypeError, ValueError):
        whole = False
    if not whole or not (np.isfinite(weights).all() and math.isfinite(probe.bias)):
        raise InputError(f"{str(path)!r} is no probe that this program wrote; make one by unclip_jax.preferences")
    return probe
