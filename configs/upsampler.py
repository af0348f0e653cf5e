"""The upsamplers: a low-resolution image -> a larger one. Two variants of each size, first and second of the cascade.

    python -m unclip_jax.train --config=configs/upsampler.py:tiny_1 --workdir=runs/upsampler_1
"""

from configs import common


def _laptop(emoji, second):
    size = {"batch_size": 16, "steps": 2500} if emoji else {"batch_size": 4, "steps": 800}
    config = common.base(stage="upsampler", **size)
    common.laptop(config, emoji=emoji)
    low = 32 if second else 16
    config.unet = {
        "in_channels": 6,
        "out_channels": 6,
        "channels": 16,
        "channel_mult": (1, 2),
        "depth": 1,
        "attention_resolutions": (),
        "image_size": 2 * low,
        "head_channels": 16,
        "dropout": 0.0,
        "scale_shift": "film",
        "norm_groups": 32 if emoji else 4,
        "remat": False,
    }
    config.low_res_size = low
    config.data.degradation = "gaussian_blur"
    config.data.crop_fraction = 0.5 if second else 1.0
    config.diffusion = common.diffusion(prediction="v")
    config.sampling = common.pixel_sampling(method="ddim", timesteps="12" if emoji else "6", temperature=1.0)
    config.optim.update({"learning_rate": 2e-3 if emoji else 4e-3})
    config.evaluation.evaluators = ("loss", "pictures")
    return config


def get_config(variant="tiny_1"):
    """Returns the config of a variant."""
    variants = {
        "tiny_1": lambda: _laptop(False, False),
        "tiny_2": lambda: _laptop(False, True),
        "emoji_1": lambda: _laptop(True, False),
        "emoji_2": lambda: _laptop(True, True),
    }
    return common.choose(variant, variants)
