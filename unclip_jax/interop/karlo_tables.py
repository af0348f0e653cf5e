"""Names of Karlo's weights: those of diffusers' folders, and those of the files that Kakao Brain published.

Karlo (2022) is an unCLIP whose networks are ours under other settings: captions are read by CLIP, embeddings are not
normalised, upsamplers have no variance channels. diffusers has its weights as `UnCLIPPipeline`. Tables are of the
weights of a network, its own module at the top, but for those of statistics.
"""

from unclip_jax.interop import names, unets
from unclip_jax.interop.names import Table
from unclip_jax.models.decoder import Decoder
from unclip_jax.models.prior import DiffusionPrior
from unclip_jax.models.unet import UNet

# Buffers that older versions saved: positions are counted, and the causal mask is known.
_COUNTED = (r"(.*\.)?position_ids", r"causal_attention_mask")
# Mean and deviation of embeddings, which diffusers has among a prior's weights.
PRIOR_STATISTICS = names.table(
    names.array("clip_mean", "clip_mean", names.leading_ones(1)),
    names.array("clip_std", "clip_std", names.leading_ones(1)),
)


def prior(network: DiffusionPrior) -> Table:
    """diffusers' PriorTransformer, but for `PRIOR_STATISTICS`, which it holds beside its weights."""

    def block(number: int) -> Table:
        mine, theirs = "stack/blocks", f"transformer_blocks.{number}"
        heads = network.heads
        return names.table(
            names.norm(f"{mine}/norm_1", f"{theirs}.norm1"),
            names.separate(f"{mine}/attention/qkv", [f"{theirs}.attn1.to_{one}" for one in "qkv"], heads),
            names.joined(f"{mine}/attention/out", f"{theirs}.attn1.to_out.0", heads),
            names.norm(f"{mine}/norm_2", f"{theirs}.norm3"),
            names.linear(f"{mine}/mlp/up", f"{theirs}.ff.net.0.proj"),
            names.linear(f"{mine}/mlp/down", f"{theirs}.ff.net.2"),
        )

    return names.table(
        names.array("positions", "positional_embedding", names.leading_ones(1)),
        names.array("query", "prd_embedding", names.leading_ones(2)),
        names.linear("states", "encoder_hidden_states_proj"),
        names.linear("text_embedding", "embedding_proj"),
        names.linear("time_1", "time_embedding.linear_1"),
        names.linear("time_2", "time_embedding.linear_2"),
        names.linear("image_embedding", "proj_in"),
        names.stacked([block(number) for number in range(network.depth)]),
        names.norm("norm", "norm_out"),
        names.linear("readout", "proj_to_clip_embeddings"),
        Table((), _COUNTED),
    )


def original_prior(network: DiffusionPrior) -> Table:
    """The file `prior-ckpt-…`; mean and deviation are in a file of their own."""

    def block(number: int) -> Table:
        mine, theirs = "stack/blocks", f"transformer.resblocks.{number}"
        heads = network.heads
        return names.table(
            names.norm(f"{mine}/norm_1", f"{theirs}.ln_1"),
            names.linear(f"{mine}/attention/qkv", f"{theirs}.attn.c_qkv", names.interleaved(3, heads)),
            names.joined(f"{mine}/attention/out", f"{theirs}.attn.c_proj", heads),
            names.norm(f"{mine}/norm_2", f"{theirs}.ln_2"),
            names.linear(f"{mine}/mlp/up", f"{theirs}.mlp.c_fc"),
            names.linear(f"{mine}/mlp/down", f"{theirs}.mlp.c_proj"),
        )

    weights = names.table(
        names.array("positions", "positional_embedding", names.leading_ones(1)),
        names.array("query", "prd_emb", names.leading_ones(2)),
        names.linear("states", "text_enc_proj"),
        names.linear("text_embedding", "text_emb_proj"),
        names.linear("time_1", "time_embed.0"),
        names.linear("time_2", "time_embed.2"),
        names.linear("image_embedding", "clip_img_proj"),
        names.stacked([block(number) for number in range(network.depth)]),
        names.norm("norm", "final_ln"),
        names.linear("readout", "out_proj"),
    )
    return weights.under(theirs="model.")


def decoder(network: Decoder) -> Table:
    """Both folders that a decoder is in: `decoder.` of UNet2DConditionModel, `text_proj.` of UnCLIPTextProjModel."""
    unet = unets.diffusers(UNet(**network.unet), context=True)
    return unet.under(ours="network/", theirs="decoder.") + text_projection(network).under(theirs="text_proj.")


def text_projection(network: Decoder) -> Table:
    """diffusers' UnCLIPTextProjModel: what a decoder makes of captions and embeddings, before its U-Net."""
    return names.table(
        names.array("null_embedding", "learned_classifier_free_guidance_embeddings"),
        names.linear("text_emb", "embedding_proj"),
        names.linear("clip_emb", "clip_image_embeddings_project_to_time_embeddings"),
        names.linear("states", "encoder_hidden_states_proj"),
        names.norm("states_norm", "text_encoder_hidden_states_norm"),
        names.linear("clip_context", "clip_extra_context_tokens_proj", names.token_major(network.clip_tokens)),
    )


def original_decoder(network: Decoder) -> Table:
    """The file `decoder-ckpt-…`."""
    weights = names.table(
        unets.guided(UNet(**network.unet), context=True).under(ours="network/"),
        names.array("null_embedding", "cf_param"),
        names.linear("text_emb", "text_feat_proj"),
        names.linear("clip_emb", "clip_emb"),
        names.linear("states", "text_seq_proj.0"),
        names.norm("states_norm", "text_seq_proj.1"),
        names.linear("clip_context", "clip_tok_proj", names.token_major(network.clip_tokens)),
    )
    return weights.under(theirs="model.")


def upsampler(network: UNet) -> Table:
    """diffusers' UNet2DModel, of which there are two, for the first steps and for the last."""
    return unets.diffusers(network, context=False)


def original_upsampler(network: UNet, *, last: bool) -> Table:
    """One of both networks in the file `improved-sr-ckpt-…`."""
    theirs = "model_last_step." if last else "model_first_steps."
    return unets.guided(network, context=False).under(ours="", theirs=theirs)
