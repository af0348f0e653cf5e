"""The decoder: z_i and caption -> image.

    python -m unclip_jax.train --config=configs/decoder.py:tiny --workdir=runs/decoder \
        --config.frozen.clip=runs/clip

`paper` is Table 3's (appendix C), sampled with the guidance of its COCO evaluation; `small` trains on one accelerator
of 16 GB. Both want `--config.data.dataset=FOLDER` and OpenAI's vocabulary. `tiny_glide` and so on read captions alone,
without CLIP; `tiny_text` and so on are trained on z_t in place of z_i (section 5.1). `diffusers` is a laptop's that
diffusers' unCLIP pipelines can draw with: it has no text encoder of its own, like Karlo's, and predicts eps.

`tiny_inpaint` and so on fine-tune a finished decoder to draw what is missing of an image (GLIDE), the new channels of
its input beginning as zeros: `--config=configs/decoder.py:tiny_inpaint --config.begin_from=runs/mine/decoder
--workdir=runs/inpaint/decoder --config.frozen.clip=runs/mine/clip`.
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
            "remat": "none",
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


def _diffusers():
    config = _laptop(False)
    clip = common.clip_diffusers()
    # Groups that divide the channels of all norms, for diffusers has one number of groups.
    unet = {**config.model.unet.to_dict(), "norm_groups": 8}
    words = {"text": None, "caption": "clip", "context_width": clip["text_width"]}
    config.model = {"unet": unet, **words, "embed_dim": clip["embed_dim"], "clip_tokens": 4}
    config.model.update({"null_clip": "learned", "clip_scale": 1.0})
    config.drop = {"text": 0.3, "clip": 0.1}
    config.diffusion = common.diffusion()
    config.sampling = common.pixel_sampling(method="ddpm", timesteps="25", guidance_scale=2.0)
    config.round_pixels = False
    return common.exportable(config, clip)


def _large(config, clip, text, unet):
    config.frozen = {"clip": ""}
    config.clip = clip
    config.model = {
        "unet": {
            "in_channels": 3,
            "out_channels": 6,
            "channel_mult": (1, 2, 3, 4),
            "depth": 3,
            "attention_resolutions": (32, 16, 8),
            "image_size": 64,
            "head_channels": 64,
            "dropout": 0.1,
            "scale_shift": "film",
            **unet,
        },
        "text": text,
        "embed_dim": clip["embed_dim"],
        "clip_tokens": 4,
        "null_clip": "zeros",
        "clip_scale": 1.0,
    }
    config.drop = {"text": 0.5, "clip": 0.1}
    config.diffusion = common.diffusion()
    config.sampling = common.pixel_sampling(method="ddpm", timesteps="250", guidance_scale=1.25)
    config.optim.learning_rate = 1.2e-4
    config.evaluation.evaluators = ("loss", "pictures")
    return config


def _paper():
    config = common.pod(common.base(stage="decoder", batch_size=2048, steps=800_000))
    return _large(config, common.clip_paper(), common.text_paper(), {"channels": 512, "remat": "none"})


def _small():
    config = common.accelerator(common.base(stage="decoder", batch_size=64, steps=500_000))
    return _large(config, common.clip_small(), common.text_small(), {"channels": 128, "remat": "full"})


def _glide(config):
    """Captions alone, no CLIP: GLIDE, which forgets a fifth of the captions, not half, to be guided."""
    del config.frozen, config.clip
    config.model.update({"embed_dim": 0, "clip_tokens": 0})
    config.drop = {"text": 0.2, "clip": 0.0}
    return config


def _text_embeddings(config):
    """Trained on z_t where unCLIP's decoder has z_i: the text-embedding decoder of section 5.1."""
    config.condition = "text"
    return config


def _inpaint(config, *, steps, learning_rate):
    return common.inpainting(config, config.model.unet, steps=steps, learning_rate=learning_rate)


VARIANTS = {
    "tiny": lambda: _laptop(False),
    "tiny_glide": lambda: _glide(_laptop(False)),
    "tiny_text": lambda: _text_embeddings(_laptop(False)),
    "emoji": lambda: _laptop(True),
    "diffusers": _diffusers,
    "small": _small,
    "small_glide": lambda: _glide(_small()),
    "small_text": lambda: _text_embeddings(_small()),
    "paper": _paper,
    "paper_glide": lambda: _glide(_paper()),
    "paper_text": lambda: _text_embeddings(_paper()),
    "tiny_inpaint": lambda: _inpaint(_laptop(False), steps=1000, learning_rate=2e-3),
    "emoji_inpaint": lambda: _inpaint(_laptop(True), steps=1000, learning_rate=1e-3),
    "small_inpaint": lambda: _inpaint(_small(), steps=50_000, learning_rate=1.2e-4),
    "paper_inpaint": lambda: _inpaint(_paper(), steps=80_000, learning_rate=1.2e-4),
}


def get_config(variant="tiny"):
    """Returns the config of a variant."""
    return common.choose(variant, VARIANTS)
