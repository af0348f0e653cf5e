"""The upsamplers: a low-resolution image -> a larger one. Two variants of each size, first and second of the cascade.

    python -m unclip_jax.train --config=configs/upsampler.py:tiny_1 --workdir=runs/upsampler_1

`paper_1` (64 -> 256) and `paper_2` (256 -> 1024) are Table 3's (appendix C), trained on crops of a quarter; the first
samples by GLIDE's 27 steps. `small_1` and `small_2` train on one accelerator of 16 GB. All four want
`--config.data.dataset=FOLDER`. `diffusers` is the one of a laptop's stack with which diffusers' pipelines can draw.

`tiny_1_inpaint` and so on fine-tune a finished upsampler (`--config.begin_from=runs/mine/upsampler_1`) to go by what is
known of the large image; see configs/decoder.py.
"""

from configs import common

# No layer is split here: where devices share an image, each holds some of its rows.
_SHARDING = (("embed", "fsdp"), ("conv_out", "fsdp"), ("height", "model"))


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
        "remat": "none",
    }
    config.sharding = _SHARDING
    config.low_res_size = low
    config.data.degradation = "gaussian_blur"
    config.data.crop_fraction = 0.5 if second else 1.0
    config.diffusion = common.diffusion(prediction="v")
    config.sampling = common.pixel_sampling(method="ddim", timesteps="12" if emoji else "6", temperature=1.0)
    config.optim.update({"learning_rate": 2e-3 if emoji else 4e-3})
    config.evaluation.evaluators = ("loss", "pictures")
    return config


def _diffusers():
    """As Karlo's: four times larger in one stage, enlarged bicubically, no variance learned."""
    config = _laptop(False, False)
    config.unet.update({"out_channels": 3, "image_size": 64, "channel_mult": (1, 2, 2)})
    config.enlarge = "bicubic"
    config.diffusion = common.diffusion(variance="fixed_small")
    config.sampling = common.pixel_sampling(method="ddpm", timesteps="12", temperature=1.0, last_steps=0)
    return common.exportable(config, {})


def _large(config, second, unet):
    config.data.vocabulary = "tiny"  # no captions are read
    config.unet = {
        "in_channels": 6,
        "out_channels": 6,
        "attention_resolutions": (),
        "image_size": 1024 if second else 256,
        "head_channels": 64,
        "dropout": 0.0 if second else 0.1,
        "scale_shift": "film",
        **unet,
    }
    config.sharding = _SHARDING
    config.low_res_size = 256 if second else 64
    config.data.degradation = "bsr" if second else "gaussian_blur"
    config.data.crop_fraction = 0.25
    config.diffusion = common.diffusion(schedule="linear" if second else "cosine")
    timesteps, temperature = ("15", 1.0) if second else ("fast27", 0.997)
    config.sampling = common.pixel_sampling(method="ddim", timesteps=timesteps, temperature=temperature)
    config.optim.learning_rate = 1.0e-4 if second else 1.2e-4
    config.evaluation.evaluators = ("loss", "pictures")
    return config


_MULT = {False: (1, 2, 3, 4), True: (1, 1, 2, 2, 4, 4)}


def _paper(second):
    size = {"channels": 192, "depth": 2} if second else {"channels": 320, "depth": 3}
    config = common.pod(common.base(stage="upsampler", batch_size=512 if second else 1024, steps=1_000_000))
    config.mesh.update({"data": -1, "fsdp": 64})  # 320 is 5 x 64, 192 is 3 x 64
    return _large(config, second, {**size, "channel_mult": _MULT[second], "remat": "none"})


def _small(second):
    config = common.accelerator(common.base(stage="upsampler", batch_size=8 if second else 32, steps=500_000))
    size = {"channels": 96 if second else 128, "depth": 2}
    return _large(config, second, {**size, "channel_mult": _MULT[second], "remat": "full"})


def _inpaint(config, *, steps, learning_rate):
    return common.inpainting(config, config.unet, steps=steps, learning_rate=learning_rate)


VARIANTS = {
    "tiny_1": lambda: _laptop(False, False),
    "tiny_2": lambda: _laptop(False, True),
    "emoji_1": lambda: _laptop(True, False),
    "emoji_2": lambda: _laptop(True, True),
    "diffusers": _diffusers,
    "small_1": lambda: _small(False),
    "small_2": lambda: _small(True),
    "paper_1": lambda: _paper(False),
    "paper_2": lambda: _paper(True),
    "tiny_1_inpaint": lambda: _inpaint(_laptop(False, False), steps=400, learning_rate=2e-3),
    "tiny_2_inpaint": lambda: _inpaint(_laptop(False, True), steps=400, learning_rate=2e-3),
    "small_1_inpaint": lambda: _inpaint(_small(False), steps=50_000, learning_rate=1.2e-4),
    "small_2_inpaint": lambda: _inpaint(_small(True), steps=50_000, learning_rate=1e-4),
    "paper_1_inpaint": lambda: _inpaint(_paper(False), steps=100_000, learning_rate=1.2e-4),
    "paper_2_inpaint": lambda: _inpaint(_paper(True), steps=100_000, learning_rate=1e-4),
}


def get_config(variant="tiny_1"):
    """Returns the config of a variant."""
    return common.choose(variant, VARIANTS)
