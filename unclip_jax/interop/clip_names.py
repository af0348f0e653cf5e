"""CLIP's weights by OpenAI's and OpenCLIP's names, and by transformers', as our towers' trees.

OpenAI's names: github.com/openai/CLIP, clip/model.py. OpenCLIP's: github.com/mlfoundations/open_clip, where the same
names have a few more beside them. transformers': CLIPModel, and its towers with a projection alone.
"""

from unclip_jax.interop import names
from unclip_jax.interop.names import Piece, Table
from unclip_jax.models.clip import CLIP

# Position ids are counted anew; a mask is no weight; a ResNet's norms count the batches that they have seen.
_COUNTERS = (r"(.*\.)?position_ids", r"(.*\.)?attn_mask", r".*\.num_batches_tracked")
# OpenAI's archives hold these whole numbers beside the weights.
_SIZES = ("input_resolution", "context_length", "vocab_size")


def openai(clip: CLIP, *, text: str = "") -> Table:
    """Both towers by OpenAI's names. `text` is in front of the text tower's; "text." in OpenCLIP's CustomTextCLIP."""
    return names.table(
        openai_vision(clip).under(ours="vision/", theirs="visual."),
        openai_text(clip).under(ours="text/", theirs=text),
        names.array("logit_scale", "logit_scale"),
        Table((), (*_COUNTERS, *_SIZES)),
    )


def openai_text(clip: CLIP) -> Table:
    """The text tower alone, with no prefix."""
    return names.table(
        names.array("tokens/embedding", "token_embedding.weight"),
        names.array("positions", "positional_embedding"),
        names.array("class", "cls_emb") if clip.text_pool == "class" else Table(()),
        _openai_blocks(clip.text_depth, clip.text_heads),
        names.norm("ln_final", "ln_final"),
        _projection(clip.text_projection, "text_projection"),
        Table((), _COUNTERS),
    )


def openai_vision(clip: CLIP) -> Table:
    """The image tower alone, with no prefix."""
    if clip.vision_layers:
        return _resnet(clip)
    return names.table(
        names.conv("patches", "conv1", bias=False),
        names.array("class", "class_embedding"),
        names.array("positions", "positional_embedding"),
        names.norm("ln_pre", "ln_pre") if clip.vision_input_norm else Table(()),
        _openai_blocks(clip.vision_depth, clip.vision_heads, layer_scale=bool(clip.vision_layer_scale)),
        _pooling(clip) if clip.vision_pool == "attention" else Table(()),
        names.norm("ln_post", "ln_post"),
        _projection(clip.vision_projection, "proj"),
    )


def _projection(kind: str, theirs: str) -> Table:
    """Theirs is a matrix that vectors are multiplied by from the left, or where it has a bias, a linear layer."""
    if kind == "none":
        return Table(())
    return names.linear("projection", theirs) if kind == "biased" else names.array("projection/kernel", theirs)


def _openai_blocks(depth: int, heads: int, *, layer_scale: bool = False) -> Table:
    def block(number: int) -> Table:
        at = f"transformer.resblocks.{number}"
        return names.table(
            names.norm("norm_1", f"{at}.ln_1"),
            names.norm("norm_2", f"{at}.ln_2"),
            names.array("attention/qkv/kernel", f"{at}.attn.in_proj_weight", names.fused(3, heads)),
            names.array("attention/qkv/bias", f"{at}.attn.in_proj_bias", names.fused(3, heads)),
            names.joined("attention/out", f"{at}.attn.out_proj", heads),
            names.linear("mlp/up", f"{at}.mlp.c_fc"),
            names.linear("mlp/down", f"{at}.mlp.c_proj"),
            names.array("scale_1", f"{at}.ls_1.gamma") if layer_scale else Table(()),
            names.array("scale_2", f"{at}.ls_2.gamma") if layer_scale else Table(()),
        )

    return names.stacked([block(number) for number in range(depth)]).under(ours="stack/blocks/")


_READER = ("query", "key", "value")


def _pooling(clip: CLIP) -> Table:
    """CoCa's attention that pools, a torch.nn.MultiheadAttention; of its queries the one that makes the embedding."""
    at = "attn_pool.attn"
    if clip.vision_width == clip.embed_dim:  # torch keeps the three matrices as one where their shapes are equal
        kernels = [
            Piece(f"{at}.in_proj_weight", f"pool_reader/{name}/kernel", names.LINEAR, part=(number, 3))
            for number, name in enumerate(_READER)
        ]
    else:
        kernels = [Piece(f"{at}.{name[0]}_proj_weight", f"pool_reader/{name}/kernel", names.LINEAR) for name in _READER]
    biases = [
        Piece(f"{at}.in_proj_bias", f"pool_reader/{name}/bias", part=(number, 3)) for number, name in enumerate(_READER)
    ]
    return names.table(
        names.array("pool_query", "attn_pool.query"),
        names.norm("pool_norm_query", "attn_pool.ln_q"),
        names.norm("pool_norm_tokens", "attn_pool.ln_k"),
        Table((*kernels, *biases)),
        names.linear("pool_reader/out", f"{at}.out_proj"),
    )


def _resnet(clip: CLIP) -> Table:
    def layer(ours: str, our_norm: str, theirs: str, their_norm: str) -> Table:
        statistics = [Piece(f"{their_norm}.{name}", f"{our_norm}/{name}") for name in ("running_mean", "running_var")]
        return names.table(
            names.conv(ours, theirs, bias=False), names.norm(our_norm, their_norm), Table(tuple(statistics))
        )

    def block(at: str, *, skip: bool) -> Table:
        layers = [layer(f"conv_{n}", f"norm_{n}", f"{at}.conv{n}", f"{at}.bn{n}") for n in "123"]
        if skip:
            # The average pool before the projection has no weights, so its norm is the second that has a name.
            layers.append(layer("conv_skip", "norm_skip", f"{at}.downsample.0", f"{at}.downsample.1"))
        return names.table(*layers)

    tables = [layer(f"stem_{n}", f"stem_norm_{n}", f"conv{n + 1}", f"bn{n + 1}") for n in range(3)]
    for stage, count in enumerate(clip.vision_layers):
        at = f"layer{stage + 1}"
        tables.append(block(f"{at}.0", skip=True).under(ours=f"stage_{stage}_first/"))
        rest = [block(f"{at}.{number}", skip=False) for number in range(1, count)]
        tables.append(names.stacked(rest).under(ours=f"stage_{stage}_rest/"))
    reader = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "out": "c_proj"}
    return names.table(
        *tables,
        names.array("positions", "attnpool.positional_embedding"),
        *(names.linear(f"reader/{ours}", f"attnpool.{theirs}") for ours, theirs in reader.items()),
    )


def transformers(clip: CLIP) -> Table:
    """Both towers by the names of transformers' CLIPModel."""
    return names.table(
        transformers_text(clip).under(ours="text/"),
        transformers_vision(clip).under(ours="vision/"),
        names.array("logit_scale", "logit_scale"),
    )


def transformers_text(clip: CLIP) -> Table:
    """The text tower by the names of CLIPTextModelWithProjection, which are those of CLIPModel."""
    return names.table(
        names.array("tokens/embedding", "text_model.embeddings.token_embedding.weight"),
        names.array("positions", "text_model.embeddings.position_embedding.weight"),
        _transformers_blocks("text_model", clip.text_depth, clip.text_heads),
        names.norm("ln_final", "text_model.final_layer_norm"),
        names.linear("projection", "text_projection", bias=False),
        Table((), _COUNTERS),
    )


def transformers_vision(clip: CLIP) -> Table:
    """The image tower by the names of CLIPVisionModelWithProjection, which are those of CLIPModel."""
    return names.table(
        names.conv("patches", "vision_model.embeddings.patch_embedding", bias=False),
        names.array("class", "vision_model.embeddings.class_embedding"),
        names.array("positions", "vision_model.embeddings.position_embedding.weight"),
        names.norm("ln_pre", "vision_model.pre_layrnorm"),
        _transformers_blocks("vision_model", clip.vision_depth, clip.vision_heads),
        names.norm("ln_post", "vision_model.post_layernorm"),
        names.linear("projection", "visual_projection", bias=False),
        Table((), _COUNTERS),
    )


def _transformers_blocks(tower: str, depth: int, heads: int) -> Table:
    def block(number: int) -> Table:
        at = f"{tower}.encoder.layers.{number}"
        return names.table(
            names.norm("norm_1", f"{at}.layer_norm1"),
            names.norm("norm_2", f"{at}.layer_norm2"),
            names.separate("attention/qkv", [f"{at}.self_attn.{kind}_proj" for kind in "qkv"], heads),
            names.joined("attention/out", f"{at}.self_attn.out_proj", heads),
            names.linear("mlp/up", f"{at}.mlp.fc1"),
            names.linear("mlp/down", f"{at}.mlp.fc2"),
        )

    return names.stacked([block(number) for number in range(depth)]).under(ours="stack/blocks/")
