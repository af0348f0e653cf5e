"""A config for tests that start real training processes: a CLIP that steps in milliseconds. The variant is its length.

python -m unclip_jax.train --config=tests/small_clip.py:120 --workdir=… --config.data.data_dir=…
"""

from configs import clip


def get_config(variant="120"):
    """Returns the config of a run of `variant` steps on captioned_shapes' smallest variant."""
    config = clip.get_config("tiny")
    with config.unlocked():
        config.batch_size = 8
        config.total_steps = int(variant)
        config.data.variant = "smoke"
        config.model.update(
            {"vision_width": 16, "vision_depth": 1, "vision_heads": 2, "text_width": 16, "text_depth": 1}
        )
        config.model.update({"text_heads": 2, "embed_dim": 8, "patch_size": 16, "vision_stem": ()})
        config.log.every_percent = None
        config.log.every_steps = 1
        config.checkpoint.every_percent = None
        config.checkpoint.every_steps = 3
        config.evaluation.update({"evaluators": ("loss", "retrieval"), "examples": 8, "batch_size": 8})
        config.evaluation.recall_at = (1, 5)
        config.evaluation.every_percent = 100.0
    return config
