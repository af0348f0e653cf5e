"""CLIP: contrastive training of the image and text towers.

    python -m unclip_jax.train --config=configs/clip.py:tiny --workdir=runs/clip

`tiny` trains on captioned_shapes in about a minute on one core; `emoji` on a colour-emoji font. `paper` is unCLIP's own
CLIP: ViT-H/16 with SAM, each replica of 64 pairs for itself; what appendix C does not say is Radford et al.'s (2021).
`small` trains on one accelerator of 16 GB. Both want `--config.data.dataset=FOLDER` and OpenAI's vocabulary.
`diffusers` is a laptop's CLIP that transformers has, too. `tiny_noised` and so on read noised images of the decoder's
size, to guide it while it draws (GLIDE): `--workdir=runs/mine/clip_noised`.
"""

from configs import common


def _sam(*, rho):
    """Sharpness-aware minimisation by replicas of 64 pairs (appendix C); a rho of 0 is none."""
    return {"rho": rho, "pairs": 64, "negatives": "replica"}


def _laptop(emoji):
    config = common.base(stage="clip", batch_size=128, steps=1000 if emoji else 400)
    common.laptop(config, emoji=emoji)
    config.model = {**common.clip_tiny(emoji=emoji), "logit_scale_max": 100.0}
    config.optim.update({"learning_rate": 1e-3 if emoji else 2e-3, "weight_decay": 0.1, "beta2": 0.98, "eps": 1e-6})
    config.evaluation.update({"evaluators": ("loss", "retrieval"), "examples": 512, "batch_size": 128})
    config.evaluation.update(_measures())
    if not emoji:
        config.evaluation.evaluators += ("zero_shot", "linear_probe")
        config.evaluation.update({"label": "shape", "templates": ("a {}", "a small {}", "a large {}")})
        config.evaluation.probe_examples = 2000
    config.sam = _sam(rho=0.0)
    return config


def _noised(config, *, image_size, patch_size):
    """Reads images as noisy as a decoder has them while it draws, of its size and by its process: to guide it."""
    config.model.update({"image_size": image_size, "patch_size": patch_size, "noised": True})
    config.diffusion = common.diffusion()
    return config


def _tiny_noised():
    config = _noised(_laptop(False), image_size=16, patch_size=4)
    config.model.vision_stem = (32, 64)
    config.update(common.durations(total_steps=1200))
    config.optim.learning_rate = 1e-3
    return config


def _paper_noised():
    """GLIDE's (section 4.3): patches of 4 of the decoder's 64 pixels; without SAM, of which it says nothing."""
    config = _noised(_paper(), image_size=64, patch_size=4)
    config.sam.rho = 0.0
    return config


def _diffusers():
    config = _laptop(False)
    config.model = {**common.clip_diffusers(), "logit_scale_max": 100.0}
    # Without convolutions before the patches shapes take longer to learn.
    config.update(common.durations(total_steps=800))
    config.optim.learning_rate = 1e-3
    return config


def _paper():
    config = common.pod(common.base(stage="clip", batch_size=32768, steps=390_000))  # 12.8 billion pairs
    config.model = {**common.clip_paper(), "remat": "full", "logit_scale_max": 100.0}
    config.sam = _sam(rho=0.1)
    config.optim.update({"learning_rate": 3e-4, "schedule": "cosine", "weight_decay": 0.2, "beta2": 0.98, "eps": 1e-6})
    config.optim.update(common.durations(warmup_steps=2000))
    config.evaluation.update({"evaluators": ("loss", "retrieval"), "examples": 4096, "batch_size": 1024})
    config.evaluation.update(_measures())
    return config


def _small():
    config = common.accelerator(common.base(stage="clip", batch_size=512, steps=200_000))
    config.model = {**common.clip_small(), "remat": "full", "logit_scale_max": 100.0}
    config.optim.update({"learning_rate": 5e-4, "schedule": "cosine", "weight_decay": 0.2, "beta2": 0.98, "eps": 1e-6})
    config.optim.update(common.durations(warmup_steps=2000))
    config.evaluation.evaluators = ("loss", "retrieval")
    config.evaluation.update(_measures())
    config.sam = _sam(rho=0.0)
    return config


def _measures():
    """Keys of the evaluators retrieval, zero_shot and linear_probe."""
    return {
        "recall_at": (1, 5, 10),
        "label": "",  # feature of the records with their classes, of TFDS's ClassLabel
        "label_dataset": "",  # folder of a labelled data set, where that is another one than data.dataset
        "label_split": "",  # where it is empty, data.eval_split
        "label_train_split": "",  # where it is empty, data.split
        "classes": (),  # names of the classes where the data's own do not do; "@names.txt" reads a file
        "templates": (),  # captions with {} for the name, or "@file"; where there are none, a few for photographs
        "probe_examples": 10_000,
    }


VARIANTS = {
    "tiny": lambda: _laptop(False),
    "emoji": lambda: _laptop(True),
    "diffusers": _diffusers,
    "small": _small,
    "paper": _paper,
    "tiny_noised": _tiny_noised,
    "small_noised": lambda: _noised(_small(), image_size=64, patch_size=8),
    "paper_noised": _paper_noised,
}


def get_config(variant="tiny"):
    """Returns the config of a variant."""
    return common.choose(variant, VARIANTS)
