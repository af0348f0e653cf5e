"""The decoder: z_i and caption -> image.

    python -m unclip_jax.train --config=configs/decoder.py:tiny --workdir=runs/decoder \
        --config.frozen.clip=runs/clip
"""

from configs import common


def _laptop(emoji):
    # On a few minutes' worth of examples, many small steps learn more than few large ones.
    size = {"batch_size": 32, "steps": 4000} if emoji else {"batch_size": 16, "steps": 3000}
    config = common.base(stage="decoder", **size)
    common.laptop(config, emoji=emoji)
    config.frozen = {"clip": ""}
    config.clip = common.clip_tiny(emoji=emoji)
    config.model = {
        "unet": {
            "in_channels": 3,
            "out_channels": 6,
            "channels": 32 if emoji else 16,
            "channel_mult": (1, 2, 3) if emoji else (1, 2, 4),
            "depth": 1,
            "attention_resolutions": (8, 4),
            "image_size": 16,
            "head_channels": 16,
            "dropout": 0.0,
            "scale_shift": "film",
            "remat": False,
        },
        "text": common.text_tiny(),
        "embed_dim": 64,
        "clip_tokens": 4,
        "null_clip": "zeros",
        "clip_scale": 8.0,
    }
    config.drop = {"text": 0.5, "clip": 0.1}
    config.diffusion = common.diffusion(prediction="v")
    config.sampling = common.pixel_sampling(method="ddim", timesteps="32" if emoji else "16", guidance_scale=1.5)
    config.optim.update({"learning_rate": 2e-3 if emoji else 4e-3})
    config.evaluation.evaluators = ("loss", "pictures")
    return config


def get_config(variant="tiny"):
    """Returns the config of a variant."""
    return common.choose(variant, {"tiny": lambda: _laptop(False), "emoji": lambda: _laptop(True)})
