"""CLIP (Radford et al., 2021): an image tower and a causal text transformer into one space.

unCLIP's own is ViT-H/16 at 256 px, width 1280, 32 blocks, and a text tower of width 1024, 24 blocks
(Ramesh et al., 2022, appendix C): 632.3M and 354.0M parameters. Other fields make it one of OpenAI's nine, five of
which have a ResNet for images, or one of OpenCLIP's.
"""

import dataclasses
import math
from collections.abc import Sequence

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from unclip_jax.arrays import Embeddings, Images, Timesteps, Tokens
from unclip_jax.errors import InputError
from unclip_jax.models.clip_resnet import ModifiedResNet
from unclip_jax.models.clip_towers import MEAN, STD, TextTransformer, VisionTransformer


class CLIP(nn.Module):
    """Both towers, and the learned temperature of the contrastive loss, kept as the log of the logit scale.

    Attributes: as in the towers; `vision_*` and `text_*` are each tower's own. Only `vision_layers` chooses:
      vision_layers: blocks in each stage of a ResNet, (3, 4, 6, 3) in RN50; () is the vision transformer. A ResNet
        has `vision_width` channels and `vision_heads` at its end, and none of the other `vision_*` nor `patch_size`.
      noised: whether its images are noised and come with their timestep, see VisionTransformer.
      image_tower: False for one that came without, with which captions can be read and nothing else: Karlo's text to
        image has no need of more. The fields of that tower are not read then.
    """

    image_size: int
    vision_width: int
    vision_heads: int
    context_length: int
    vocab_size: int
    text_width: int
    text_depth: int
    text_heads: int
    embed_dim: int
    patch_size: int = 0
    vision_depth: int = 0
    vision_layers: Sequence[int] = ()
    activation: str = "gelu"
    norm_epsilon: float = 1e-5
    vision_stem: Sequence[int] = ()
    vision_mlp_ratio: float = 4.0
    vision_layer_scale: float = 0.0
    vision_input_norm: bool = True
    vision_pool: str = "class"
    vision_pool_heads: int = 8
    vision_projection: str = "linear"
    text_mlp_ratio: float = 4.0
    text_causal: bool = True
    text_pool: str = "end"
    text_end_id: int | None = None
    text_projection: str = "linear"
    mean: Sequence[float] = MEAN
    std: Sequence[float] = STD
    image_tower: bool = True
    noised: bool = False
    remat: str = "none"
    dtype: DTypeLike = jnp.float32

    def __post_init__(self):
        super().__post_init__()
        if len(self.mean) != 3 or len(self.std) != 3:
            raise InputError(f"CLIP's mean {tuple(self.mean)} and std {tuple(self.std)} are of red, green and blue")
        if not self.image_tower:
            return
        if self.noised and self.vision_layers:
            raise InputError("CLIP's vision_layers make a ResNet, which reads no timestep: leave out noised")
        if not self.vision_layers:
            if not (self.patch_size and self.vision_depth):
                raise InputError("CLIP's vision transformer needs patch_size and vision_depth, a ResNet vision_layers")
            return
        own = ("image_size", "vision_width", "vision_heads", "vision_layers")
        fields = {field.name: field.default for field in dataclasses.fields(self)}
        vit = [name for name in fields if (name.startswith("vision_") or name == "patch_size") and name not in own]
        given = [name for name in vit if getattr(self, name) != fields[name]]
        if given:
            raise InputError(f"CLIP's vision_layers make a ResNet, which takes no {', '.join(given)}; leave out either")

    def setup(self):
        if not self.image_tower:
            pass
        elif self.vision_layers:
            self.vision = ModifiedResNet(
                image_size=self.image_size,
                layers=self.vision_layers,
                width=self.vision_width,
                heads=self.vision_heads,
                embed_dim=self.embed_dim,
                mean=self.mean,
                std=self.std,
                remat=self.remat,
                dtype=self.dtype,
            )
        else:
            self.vision = VisionTransformer(
                image_size=self.image_size,
                patch_size=self.patch_size,
                width=self.vision_width,
                depth=self.vision_depth,
                heads=self.vision_heads,
                embed_dim=self.embed_dim,
                activation=self.activation,
                mlp_ratio=self.vision_mlp_ratio,
                epsilon=self.norm_epsilon,
                layer_scale=self.vision_layer_scale,
                input_norm=self.vision_input_norm,
                pool=self.vision_pool,
                pool_heads=self.vision_pool_heads,
                projection=self.vision_projection,
                noised=self.noised,
                stem=self.vision_stem,
                mean=self.mean,
                std=self.std,
                remat=self.remat,
                dtype=self.dtype,
            )
        self.text = TextTransformer(
            context_length=self.context_length,
            vocab_size=self.vocab_size,
            width=self.text_width,
            depth=self.text_depth,
            heads=self.text_heads,
            embed_dim=self.embed_dim,
            activation=self.activation,
            mlp_ratio=self.text_mlp_ratio,
            epsilon=self.norm_epsilon,
            causal=self.text_causal,
            pool=self.text_pool,
            end_id=self.text_end_id,
            projection=self.text_projection,
            remat=self.remat,
            dtype=self.dtype,
        )
        self.logit_scale = self.param("logit_scale", nn.initializers.constant(math.log(1 / 0.07)), ())

    def encode_image(self, images: Images, t: Timesteps | None = None) -> Embeddings:
        """Embeds images in [-1, 1], noised ones with their timesteps; float32 [b, embed_dim], not normalised."""
        return self.read_image(images, t)[0]

    def encode_text(self, tokens: Tokens) -> Embeddings:
        """Embeds captions; float32 [b, embed_dim], not normalised."""
        return self.read_text(tokens)[0]

    def read_image(self, images: Images, t: Timesteps | None = None) -> tuple[Embeddings, Float[Array, "b n k"]]:
        """Embeds images in [-1, 1], and returns the tower's last features too: see `__call__` of the towers."""
        if not self.image_tower:
            raise InputError("this CLIP has no image tower, it only reads captions: import it with its image encoder")
        if (t is not None) != self.noised:
            reads = "noised images, with their timesteps" if self.noised else "clean images, without timesteps"
            raise InputError(f"this CLIP (noised={self.noised}) reads {reads}")
        return self.vision(images, t) if self.noised else self.vision(images)

    def read_text(self, tokens: Tokens) -> tuple[Embeddings, Float[Array, "b n k"]]:
        """Embeds captions, and returns the features of each token after the final norm, float32 [b, n, text_width]."""
        return self.text(tokens)

    def read_all(self, images: Images, tokens: Tokens) -> None:
        """Calls each tower that is there once: for `init`."""
        if self.image_tower:
            self.encode_image(images, jnp.zeros(images.shape[0], jnp.int32) if self.noised else None)
        self.encode_text(tokens)

    def __call__(
        self, images: Images, tokens: Tokens, t: Timesteps | None = None
    ) -> tuple[Embeddings, Embeddings, Float[Array, ""]]:
        """Returns image embeddings, text embeddings (neither normalised) and the log of the logit scale.

        Raises:
          InputError: if images or captions do not have the sizes of this CLIP.
        """
        return self.encode_image(images, t), self.encode_text(tokens), self.logit_scale
