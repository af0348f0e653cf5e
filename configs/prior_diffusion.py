"""The diffusion prior: caption -> z_i.

    python -m unclip_jax.train --config=configs/prior_diffusion.py:tiny --workdir=runs/prior_diffusion \
        --config.frozen.clip=runs/clip

`paper` is Table 3's (appendix C); `small` trains on one accelerator of 16 GB. Both want `--config.data.dataset=FOLDER`
and OpenAI's vocabulary. They sample with the analytic variance, which is measured when the run has ended:
`python -m unclip_jax.statistics --workdir=…`. `diffusers` is a laptop's that diffusers' PriorTransformer can be:
Karlo's way, on CLIP's reading of captions, with embeddings whitened by their statistics.
"""

from configs import common


def _laptop(emoji):
    config = common.base(stage="prior_diffusion", batch_size=128, steps=1500 if emoji else 600)
    common.laptop(config, emoji=emoji)
    config.frozen = {"clip": ""}
    config.clip = common.clip_tiny(emoji=emoji)
    config.model = {**common.text_tiny(), "embed_dim": 64, "depth": 3}
    # 17.2 * sqrt(64 / 1024): unit vectors with coordinates of variance 0.289.
    config.embedding = {"scaling": "constant", "scale": 4.3, "norm": "unit"}
    config.fit_examples = 4096  # for scaling "whiten"
    config.drop = {"text": 0.1}
    config.diffusion = {**common.diffusion(prediction="x_start", variance="fixed_small"), "clip_x_start": None}
    config.sampling = {"method": "ddpm", "timesteps": "32", "eta": 0.0, "threshold": "static"}
    config.sampling.update({"guidance_scale": 1.0, "candidates": 2})
    config.optim.update({"learning_rate": 2e-3, "weight_decay": 6e-2, "beta2": 0.96, "eps": 1e-6})
    config.evaluation.update({"evaluators": ("loss", "embedding"), "examples": 128, "batch_size": 128})
    return config


def _diffusers():
    config = _laptop(False)
    clip = common.clip_diffusers()
    width = {"width": 96, "depth": 3, "heads": 3, "activation": "gelu", "remat": "none"}
    words = {"caption": "clip", "context_length": clip["context_length"], "vocab_size": clip["vocab_size"]}
    config.model = {**width, **words, "embed_dim": clip["embed_dim"]}
    config.diffusion.clip_x_start = 5.0
    config.sampling.update({"timesteps": "25", "guidance_scale": 2.0, "candidates": 1})
    return common.exportable(config, clip)


def _large(config, clip, text):
    config.frozen = {"clip": ""}
    config.clip = clip
    config.model = {**text, "embed_dim": clip["embed_dim"]}
    # 17.2 at 1,024 numbers.
    config.embedding = {"scaling": "constant", "scale": 0.5375 * clip["embed_dim"] ** 0.5, "norm": "unit"}
    config.fit_examples = 1 << 20  # for scaling "whiten"
    config.drop = {"text": 0.1}
    config.diffusion = {**common.diffusion(prediction="x_start", variance="fixed_small"), "clip_x_start": None}
    config.sampling = {"method": "analytic", "timesteps": "64", "eta": 0.0, "threshold": "static"}
    config.sampling.update({"guidance_scale": 1.0, "candidates": 2})
    config.optim.update({"learning_rate": 1.1e-4, "weight_decay": 6e-2, "beta2": 0.96, "eps": 1e-6})
    config.evaluation.evaluators = ("loss", "embedding")
    return config


def _paper():
    config = common.pod(common.base(stage="prior_diffusion", batch_size=4096, steps=600_000))
    return _large(config, common.clip_paper(), {**common.text_paper(), "remat": "products"})


def _small():
    config = common.accelerator(common.base(stage="prior_diffusion", batch_size=256, steps=300_000))
    text = {**common.text_small(), "context_length": 77, "width": 1024, "heads": 16}
    return _large(config, common.clip_small(), text)


VARIANTS = {
    "tiny": lambda: _laptop(False),
    "emoji": lambda: _laptop(True),
    "diffusers": _diffusers,
    "small": _small,
    "paper": _paper,
}


def get_config(variant="tiny"):
    """Returns the config of a variant."""
    return common.choose(variant, VARIANTS)
