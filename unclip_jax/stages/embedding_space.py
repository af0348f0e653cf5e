"""The units in which a diffusion prior sees CLIP's embeddings, and the way back.

The paper scales "the CLIP embedding inputs by 17.2" so that their coordinates have the variance of pixels (appendix C):
for unit vectors of 1,024 numbers that is 0.289. Karlo works on embeddings as CLIP's heads return them, not normalised,
and whitens those of images: less their mean, over their standard deviation, each per dimension over the data.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from unclip_jax.arrays import Embeddings
from unclip_jax.errors import InputError, nearest
from unclip_jax.models.clip import CLIP
from unclip_jax.models.quantizer import Moments
from unclip_jax.stages import base

SCALINGS = ("constant", "sqrt_d", "whiten")
NORMS = ("unit", "raw")


@dataclasses.dataclass(frozen=True)
class EmbeddingSpace:
    """How embeddings are made from CLIP's outputs, and scaled.

    Attributes:
      scaling: "constant" multiplies z_i and z_t by `scale`; "sqrt_d" by the root of their width, which gives unit
        vectors coordinates of variance 1; "whiten" subtracts `clip_mean` from z_i and divides it by `clip_std`, which
        are measured of the data, and leaves z_t as it is.
      scale: the factor of "constant".
      norm: length of z_i and z_t before that: "unit" is 1, "raw" is what CLIP's heads return.
      clip: the CLIP that they come from.
    """

    scaling: str
    scale: float
    norm: str
    clip: CLIP

    @classmethod
    def of(cls, config: ConfigDict, clip: CLIP) -> "EmbeddingSpace":
        """Reads `config.embedding`; configs older than that section have `config.embedding_scale`, a constant.

        Raises:
          InputError: unknown names, a scale that "constant" lacks, or "whiten" without `config.fit_examples`.
        """
        options = config.get("embedding", {})
        scaling, norm = options.get("scaling", "constant"), options.get("norm", "unit")
        scale = options.get("scale", config.get("embedding_scale"))
        for key, value, known in (("scaling", scaling, SCALINGS), ("norm", norm, NORMS)):
            if value not in known:
                raise InputError(f"config.embedding.{key}={value!r} is unknown; {nearest(value, known)}")
        if scaling == "constant" and scale is None:
            raise InputError("config.embedding.scale is not set; the paper's is 17.2 for embeddings of 1,024 numbers")
        if scaling == "whiten" and not config.get("fit_examples"):
            raise InputError(
                "config.embedding.scaling='whiten' needs config.fit_examples, the number of training examples whose "
                "mean and deviation are measured"
            )
        return cls(scaling, 1.0 if scale is None else float(scale), norm, clip)

    @property
    def factor(self) -> float:
        """What z_t is multiplied by, and z_i where it is not whitened."""
        return {"constant": self.scale, "sqrt_d": float(np.sqrt(self.clip.embed_dim)), "whiten": 1.0}[self.scaling]

    def statistics(self) -> dict[str, Any]:
        """What `enter` and `leave` read, before it is measured: a whitening that changes nothing."""
        d = self.clip.embed_dim
        return {"clip_mean": jnp.zeros((d,)), "clip_std": jnp.ones((d,))} if self.scaling == "whiten" else {}

    def fit(self, over_data: base.OverData) -> tuple[dict[str, Any], dict[str, float]]:
        """Measures mean and standard deviation of z_i per dimension, in float64; {} where nothing is whitened."""
        if self.scaling != "whiten":
            return {}, {}
        moments = over_data(
            lambda frozen, batch: (self.of_images(frozen, batch),), lambda z_i: Moments.of(z_i)
        )
        mean, variances = moments.mean, np.diag(moments.covariance)
        # A dimension that never varies is only shifted.
        std = np.sqrt(np.where(variances > 1e-12 * variances.max(), variances, 1.0))
        fitted = {"clip_mean": mean.astype(np.float32), "clip_std": std.astype(np.float32)}
        return fitted, {"smallest_std": float(std.min()), "largest_std": float(std.max())}

    def images(self, params: base.Params, pixels: Any) -> Embeddings:
        """Returns z_i, unscaled, of uint8 images."""
        return base.embed_images(self.clip, params, pixels, unit=self.norm == "unit")

    def of_images(self, frozen: Any, batch: base.Batch) -> Embeddings:
        """Returns z_i, unscaled, of a batch's images, which CLIP may have embedded before."""
        return base.image_embeddings(self.clip, frozen, batch, unit=self.norm == "unit")

    def of_texts(self, frozen: Any, batch: base.Batch) -> Embeddings:
        """Returns z_t, unscaled, of a batch's captions, which CLIP may have embedded before."""
        return base.text_embeddings(self.clip, frozen, batch, unit=self.norm == "unit")

    def texts_and_states(self, params: base.Params, tokens: Any) -> tuple[Embeddings, Float[Array, "b n w"]]:
        """Returns z_t, unscaled, and the text tower's last hidden states, float32, without gradient."""
        read: Any = self.clip.apply(params, tokens, method="read_text")
        z_t, states = jax.lax.stop_gradient(read)
        return base.normalize(z_t) if self.norm == "unit" else z_t, states

    def enter(self, z_i: Embeddings, statistics: Any) -> Embeddings:
        """Returns the x_start that stands for z_i."""
        if self.scaling == "whiten":
            return (z_i - statistics["clip_mean"]) / statistics["clip_std"]
        return self.factor * z_i

    def leave(self, x_start: Any, statistics: Any) -> Any:
        """Returns the z_i that x_start [..., d] stands for; of length 1 where embeddings are."""
        if self.scaling == "whiten":
            z_i = x_start * statistics["clip_std"] + statistics["clip_mean"]
        else:
            z_i = x_start / self.factor
        return base.normalize(z_i) if self.norm == "unit" else z_i
