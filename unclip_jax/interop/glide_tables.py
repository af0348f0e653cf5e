"""GLIDE's names: github.com/openai/glide-text2im, whose base, upsampler and inpainting models are one class.

They are an ADM U-Net with a text transformer beside it (Nichol et al., 2021); in every attention, q, k and v come head
by head.
"""

from unclip_jax.interop import names, unets
from unclip_jax.interop.names import Table
from unclip_jax.models.decoder import Decoder
from unclip_jax.models.text_encoder import TextEncoder
from unclip_jax.models.unet import UNet


def glide(network: Decoder) -> Table:
    """A whole model."""
    assert network.text is not None, "GLIDE reads captions"
    return names.table(
        unets.guided(UNet(**network.unet), context=True).under(ours="network/"),
        text_encoder(TextEncoder(**network.text)).under(ours="text_encoder/"),
        names.linear("text_emb", "transformer_proj"),
    )


def text_encoder(encoder: TextEncoder) -> Table:
    """Its text transformer."""

    def block(number: int) -> Table:
        at = f"transformer.resblocks.{number}"
        return names.table(
            names.norm("norm_1", f"{at}.ln_1"),
            names.linear("attention/qkv", f"{at}.attn.c_qkv", names.interleaved(3, encoder.heads)),
            names.joined("attention/out", f"{at}.attn.c_proj", encoder.heads),
            names.norm("norm_2", f"{at}.ln_2"),
            names.linear("mlp/up", f"{at}.mlp.c_fc"),
            names.linear("mlp/down", f"{at}.mlp.c_proj"),
        )

    return names.table(
        names.array("token/embedding", "token_embedding.weight"),
        names.array("position", "positional_embedding"),
        names.array("padding", "padding_embedding"),
        names.stacked([block(number) for number in range(encoder.depth)]).under(ours="transformer/blocks/"),
        names.norm("final_norm", "final_ln"),
    )
