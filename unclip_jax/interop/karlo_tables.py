"""Names of Karlo's weights: those of diffusers' folders, and those of the files that Kakao Brain published.

Karlo (2022) is an unCLIP whose networks are ours under other settings: captions are read by CLIP, embeddings are not
normalised, upsamplers have no variance channels. diffusers has its weights as `UnCLIPPipeline`. A table's paths begin
with what a part of a model has: "params", its weights, or "statistics", what was measured of its data.
"""

from unclip_jax.interop import names, unets
from unclip_jax.interop.names import Table
from unclip_jax.models.decoder import Decoder
from unclip_jax.models.prior import DiffusionPrior
from unclip_jax.models.unet import UNet

# Buffers that older versions saved: positions are counted, and the causal mask is known.
_COUNTED = (r"(.*\.)?position_ids", r"causal_attention_mask")


def prior(network: DiffusionPrior) -> Table:
    """diffusers' PriorTransformer, which holds mean and deviation of embeddings beside its weights."""
    ours = "params"

    def block(number: int) -> Table:
        mine, theirs = f"{ours}/stack/blocks", f"transformer_blocks.{number}"
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
        names.array(f"{ours}/positions", "positional_embedding", names.leading_ones(1)),
        names.array(f"{ours}/query", "prd_embedding", names.leading_ones(2)),
        names.array("statistics/clip_mean", "clip_mean", names.leading_ones(1)),
        names.array("statistics/clip_std", "clip_std", names.leading_ones(1)),
        names.linear(f"{ours}/states", "encoder_hidden_states_proj"),
        names.linear(f"{ours}/text_embedding", "embedding_proj"),
        names.linear(f"{ours}/time_1", "time_embedding.linear_1"),
        names.linear(f"{ours}/time_2", "time_embedding.linear_2"),
        names.linear(f"{ours}/image_embedding", "proj_in"),
        names.stacked([block(number) for number in range(network.depth)]),
        names.norm(f"{ours}/norm", "norm_out"),
        names.linear(f"{ours}/readout", "proj_to_clip_embeddings"),
        Table((), _COUNTED),
    )


def original_prior(network: DiffusionPrior) -> Table:
    """The file `prior-ckpt-…`; mean and deviation are in a file of their own, here named `stats.0` and `stats.1`."""
    ours = "params"

    def block(number: int) -> Table:
        mine, theirs = f"{ours}/stack/blocks", f"transformer.resblocks.{number}"
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
        names.array(f"{ours}/positions", "positional_embedding", names.leading_ones(1)),
        names.array(f"{ours}/query", "prd_emb", names.leading_ones(2)),
        names.linear(f"{ours}/states", "text_enc_proj"),
        names.linear(f"{ours}/text_embedding", "text_emb_proj"),
        names.linear(f"{ours}/time_1", "time_embed.0"),
        names.linear(f"{ours}/time_2", "time_embed.2"),
        names.linear(f"{ours}/image_embedding", "clip_img_proj"),
        names.stacked([block(number) for number in range(network.depth)]),
        names.norm(f"{ours}/norm", "final_ln"),
        names.linear(f"{ours}/readout", "out_proj"),
    )
    return names.table(
        weights.under(theirs="model."),
        names.array("statistics/clip_mean", "stats.0"),
        names.array("statistics/clip_std", "stats.1"),
    )


def decoder(network: Decoder) -> Table:
    """Both folders that a decoder is in: `decoder.` of UNet2DConditionModel, `text_proj.` of UnCLIPTextProjModel."""
    unet = unets.diffusers(UNet(**network.unet), context=True)
    return unet.under(ours="params/network/", theirs="decoder.") + text_projection(network).under(theirs="text_proj.")


def text_projection(network: Decoder) -> Table:
    """diffusers' UnCLIPTextProjModel: what a decoder makes of captions and embeddings, before its U-Net."""
    return names.table(
        names.array("params/null_embedding", "learned_classifier_free_guidance_embeddings"),
        names.linear("params/text_emb", "embedding_proj"),
        names.linear("params/clip_emb", "clip_image_embeddings_project_to_time_embeddings"),
        names.linear("params/states", "encoder_hidden_states_proj"),
        names.norm("params/states_norm", "text_encoder_hidden_states_norm"),
        names.linear("params/clip_context", "clip_extra_context_tokens_proj", names.token_major(network.clip_tokens)),
    )


def original_decoder(network: Decoder) -> Table:
    """The file `decoder-ckpt-…`."""
    weights = names.table(
        unets.guided(UNet(**network.unet), context=True).under(ours="params/network/"),
        names.array("params/null_embedding", "cf_param"),
        names.linear("params/text_emb", "text_feat_proj"),
        names.linear("params/clip_emb", "clip_emb"),
        names.linear("params/states", "text_seq_proj.0"),
        names.norm("params/states_norm", "text_seq_proj.1"),
        names.linear("params/clip_context", "clip_tok_proj", names.token_major(network.clip_tokens)),
    )
    return weights.under(theirs="model.")


def upsampler(network: UNet) -> Table:
    """diffusers' UNet2DModel, of which there are two, for the first steps and for the last."""
    return unets.diffusers(network, context=False).under(ours="params/")


def original_upsampler(network: UNet, *, last: bool) -> Table:
    """One of both networks in the file `improved-sr-ckpt-…`."""
    theirs = "model_last_step." if last else "model_first_steps."
    return unets.guided(network, context=False).under(ours="params/", theirs=theirs)
