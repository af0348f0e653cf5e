"""The autoregressive prior: caption -> codes of z_i.

    python -m unclip_jax.train --config=configs/prior_ar.py:tiny --workdir=runs/prior_ar \
        --config.frozen.clip=runs/clip
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
        "remat": False,
    }
    config.fit_examples = 4096
    config.dot_top = 0.5
    config.drop = {"text": 0.1}
    config.sampling = {"guidance_scale": 1.0, "candidates": 2, "temperature": 1.0}
    config.optim.update({"learning_rate": 2e-3, "weight_decay": 4e-2, "beta2": 0.91, "eps": 1e-10})
    config.evaluation.update({"evaluators": ("loss", "embedding"), "examples": 128, "batch_size": 128})
    return config


def get_config(variant="tiny"):
    """Returns the config of a variant."""
    return common.choose(variant, {"tiny": lambda: _laptop(False), "emoji": lambda: _laptop(True)})
