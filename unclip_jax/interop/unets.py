"""Names of a U-Net's weights: diffusers' classes, and guided-diffusion's code, from which GLIDE's and Karlo's come.

Both number what ours names by level. diffusers counts up blocks from the deepest; guided-diffusion counts all blocks of
one side through, and puts what a block is made of (residual block, attention, resampling) into one list.
"""

from collections.abc import Iterator
from typing import NamedTuple

from unclip_jax.interop import names
from unclip_jax.interop.names import Table
from unclip_jax.models.unet import UNet


class _Block(NamedTuple):
    """A residual block of ours and the attention that may follow it.

    Attributes:
      ours: its name; that of the attention is `{ours}_attention`.
      side: "down", "middle" or "up".
      level: of its input; 0 is the full size.
      number: among those of its level, or of the middle; None for the one that changes the size.
      widens: whether it has a convolution on the residual.
      heads: of the attention; 0 for none.
    """

    ours: str
    side: str
    level: int
    number: int | None
    widens: bool
    heads: int


def _blocks(network: UNet) -> Iterator[_Block]:
    """Yields all blocks in the order in which they are applied."""
    deepest = len(network.channel_mult) - 1
    widths = [network.channels * mult for mult in network.channel_mult]

    def heads(level: int) -> int:
        attends = network.image_size >> level in network.attention_resolutions
        return widths[level] // network.head_channels if attends else 0

    here, skips = network.channels, [network.channels]
    for level, width in enumerate(widths):
        for number in range(network.depth):
            yield _Block(f"down_{level}_{number}", "down", level, number, here != width, heads(level))
            here = width
            skips.append(here)
        if level != deepest:
            yield _Block(f"down_{level}", "down", level, None, False, 0)
            skips.append(here)
    middle = here // network.head_channels if network.attention_resolutions else 0
    yield _Block("middle_0", "middle", deepest, 0, False, middle)
    yield _Block("middle_1", "middle", deepest, 1, False, 0)
    for level in range(deepest, -1, -1):
        for number in range(network.depth + 1):
            into, here = here + skips.pop(), widths[level]
            yield _Block(f"up_{level}_{number}", "up", level, number, into != here, heads(level))
        if level:
            yield _Block(f"up_{level}", "up", level, None, False, 0)


def _attention_name(block: _Block) -> str:
    # The middle's has a name of its own, for it stands between two blocks.
    return "middle_attention" if block.side == "middle" else f"{block.ours}_attention"


def diffusers(network: UNet, *, context: bool) -> Table:
    """diffusers' UNet2DConditionModel of SimpleCrossAttn blocks, or, without attention, its UNet2DModel.

    Args:
      network: ours; the paths are those of its weights.
      context: whether the attention blocks read vectors beside the image.
    """
    deepest = len(network.channel_mult) - 1
    tables = [
        names.conv("in_conv", "conv_in"),
        names.linear("time_1", "time_embedding.linear_1"),
        names.linear("time_2", "time_embedding.linear_2"),
        names.norm("out_norm", "conv_norm_out"),
        names.conv("out_conv", "conv_out"),
    ]
    for block in _blocks(network):
        at = {
            "down": f"down_blocks.{block.level}",
            "middle": "mid_block",
            "up": f"up_blocks.{deepest - block.level}",
        }[block.side]
        resampler = {"down": "downsamplers.0", "up": "upsamplers.0"}.get(block.side)
        theirs = f"{at}.{resampler}" if block.number is None else f"{at}.resnets.{block.number}"
        parts = ("norm1", "conv1", "time_emb_proj", "norm2", "conv2", "conv_shortcut")
        tables.append(_res_block(block, [f"{theirs}.{part}" for part in parts]))
        if block.heads:
            ours, theirs = _attention_name(block), f"{at}.attentions.{block.number}"
            tables += [
                names.norm(f"{ours}/norm", f"{theirs}.group_norm"),
                names.separate(
                    f"{ours}/attention/qkv", [f"{theirs}.{one}" for one in ("to_q", "to_k", "to_v")], block.heads
                ),
                names.joined(f"{ours}/attention/out", f"{theirs}.to_out.0", block.heads),
            ]
            if context:
                added = [f"{theirs}.{one}" for one in ("add_k_proj", "add_v_proj")]
                tables.append(names.separate(f"{ours}/attention/context_kv", added, block.heads))
    return names.table(*tables)


def guided(network: UNet, *, context: bool) -> Table:
    """guided-diffusion's UNetModel with resampling in residual blocks; arguments as in `diffusers`.

    Its q, k and v come head by head, and its projections are convolutions of one place.
    """
    tables = [
        names.conv("in_conv", "input_blocks.0.0"),
        names.linear("time_1", "time_embed.0"),
        names.linear("time_2", "time_embed.2"),
        names.norm("out_norm", "out.0"),
        names.conv("out_conv", "out.2"),
    ]
    counts = {"down": 1, "up": 0}
    after = 1  # place behind residual block and attention, in the list of the last up block
    for block in _blocks(network):
        if block.side == "middle":
            place = 0 if block.number == 0 else 1 + bool(network.attention_resolutions)
            theirs, attention = f"middle_block.{place}", "middle_block.1"
        elif block.side == "up" and block.number is None:
            theirs, attention = f"output_blocks.{counts['up'] - 1}.{after}", ""
        else:
            at = f"{'input' if block.side == 'down' else 'output'}_blocks.{counts[block.side]}"
            theirs, attention = f"{at}.0", f"{at}.1"
            counts[block.side] += 1
            after = 2 if block.heads else 1
        parts = ("in_layers.0", "in_layers.2", "emb_layers.1", "out_layers.0", "out_layers.3", "skip_connection")
        tables.append(_res_block(block, [f"{theirs}.{part}" for part in parts]))
        if block.heads:
            ours = _attention_name(block)
            tables += [
                names.norm(f"{ours}/norm", f"{attention}.norm"),
                _interleaved(f"{ours}/attention/qkv", f"{attention}.qkv", 3, block.heads),
                names.joined(
                    f"{ours}/attention/out", f"{attention}.proj_out", block.heads, layout=names.POINTWISE
                ),
            ]
            if context:
                tables.append(_interleaved(f"{ours}/attention/context_kv", f"{attention}.encoder_kv", 2, block.heads))
    return names.table(*tables)


def _interleaved(ours: str, theirs: str, count: int, heads: int) -> Table:
    layout = names.interleaved(count, heads)
    kernel = names.array(f"{ours}/kernel", f"{theirs}.weight", names.POINTWISE.then(layout))
    return kernel + names.array(f"{ours}/bias", f"{theirs}.bias", layout)


def _res_block(block: _Block, theirs: list[str]) -> Table:
    norm_1, conv_1, emb, norm_2, conv_2, skip = theirs
    return names.table(
        names.norm(f"{block.ours}/norm_1", norm_1),
        names.conv(f"{block.ours}/conv_1", conv_1),
        names.linear(f"{block.ours}/emb", emb),
        names.norm(f"{block.ours}/norm_2", norm_2),
        names.conv(f"{block.ours}/conv_2", conv_2),
        *([names.conv(f"{block.ours}/skip", skip)] if block.widens else []),
    )
