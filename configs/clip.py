"""CLIP: contrastive training of the image and text towers.

    python -m unclip_jax.train --config=configs/clip.py:tiny --workdir=runs/clip

`tiny` trains on captioned_shapes in about a minute on one core; `emoji` on a colour-emoji font.
"""

from configs import common


def _laptop(emoji):
    config = common.base(stage="clip", batch_size=128, steps=1000 if emoji else 400)
    common.laptop(config, emoji=emoji)
    config.model = {**common.clip_tiny(emoji=emoji), "logit_scale_max": 100.0}
    config.optim.update({"learning_rate": 1e-3 if emoji else 2e-3, "weight_decay": 0.1, "beta2": 0.98, "eps": 1e-6})
    config.evaluation.update({"evaluators": ("loss", "retrieval"), "examples": 512, "batch_size": 128})
    return config


def get_config(variant="tiny"):
    """Returns the config of a variant."""
    return common.choose(variant, {"tiny": lambda: _laptop(False), "emoji": lambda: _laptop(True)})
