"""The autoregressive prior: caption -> codes of z_i.

    python -m unclip_jax.train --config=configs/prior_ar.py:tiny --workdir=runs/prior_ar \
        --config.frozen.clip=runs/clip

`paper` is Table 3's (appendix C): 319 of 1,024 principal components in 1,024 buckets each. `small` trains on one
accelerator of 16 GB. Both want `--config.data.dataset=FOLDER` and OpenAI's vocabulary.
"""

from configs import common


def _laptop(emoji):
    config = common.base(stage="prior_ar", batch_size=64, steps=1500 if emoji else 700)
    common.laptop(config, emoji=emoji)
    config.frozen = {"clip": ""}
    config.clip = common.clip_tiny(emoji=emoji)
    config.model = {
        "embed_dim": 64,
        "components": 24,
        "buckets": 64,
        "dot_buckets": 64,
        "context_length": 24,
        "vocab_size": 2048,
        "text_width": 96,
        "text_depth": 2,
        "text_heads": 3,
        "width": 96,
        "depth": 3,
        "heads": 3,
        "activation": "quick_gelu",
        "remat": "none",
    }
    config.fit_examples = 4096
    config.dot_top = 0.5
    config.drop = {"text": 0.1}
    config.sampling = {"guidance_scale": 1.0, "candidates": 2, "temperature": 1.0}
    config.optim.update({"learning_rate": 2e-3, "weight_decay": 4e-2, "beta2": 0.91, "eps": 1e-10})
    config.evaluation.update({"evaluators": ("loss", "embedding"), "examples": 128, "batch_size": 128})
    return config


def _large(config, clip, model):
    config.frozen = {"clip": ""}
    config.clip = clip
    config.model = {"embed_dim": clip["embed_dim"], "vocab_size": 49408, "activation": "gelu", **model}
    config.fit_examples = 1 << 20
    config.dot_top = 0.5
    config.drop = {"text": 0.1}
    config.sampling = {"guidance_scale": 1.0, "candidates": 2, "temperature": 1.0}
    config.optim.update({"learning_rate": 1.6e-4, "weight_decay": 4e-2, "beta2": 0.91, "eps": 1e-10})
    config.evaluation.evaluators = ("loss", "embedding")
    return config


def _paper():
    config = common.pod(common.base(stage="prior_ar", batch_size=4096, steps=1_000_000))
    config.optim.ema_decay = 0.999
    config.mesh.update({"data": -1, "fsdp": 128})  # 1,664 is 13 x 128
    text = {"context_length": 256, "text_width": 2048, "text_depth": 24, "text_heads": 32}
    decoder = {"width": 1664, "depth": 24, "heads": 26, "remat": "products"}
    codes = {"components": 319, "buckets": 1024, "dot_buckets": 1024}
    return _large(config, common.clip_paper(), {**text, **decoder, **codes})


def _small():
    config = common.accelerator(common.base(stage="prior_ar", batch_size=256, steps=300_000))
    text = {"context_length": 77, "text_width": 768, "text_depth": 12, "text_heads": 12}
    decoder = {"width": 768, "depth": 12, "heads": 12, "remat": "full"}
    codes = {"components": 160, "buckets": 1024, "dot_buckets": 1024}
    return _large(config, common.clip_small(), {**text, **decoder, **codes})


VARIANTS = {"tiny": lambda: _laptop(False), "emoji": lambda: _laptop(True), "small": _small, "paper": _paper}


def get_config(variant="tiny"):
    """Returns the config of a variant."""
    return common.choose(variant, VARIANTS)
