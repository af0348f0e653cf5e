"""An evaluation without COCO, on rendered scenes or emoji, of models that were trained on them.

    python -m unclip_jax.evaluate --config=configs/eval_captioned_shapes.py --checkpoint=runs/quickstart \
        --workdir=evaluations/quickstart

`full` draws the protocol's 5,000 images, `sweep` 1,000 at each of five guidance scales, `smoke` 96 in a minute.
Features are those of the models' own CLIP: their numbers order the guidance scales of one model, and compare models
that share that CLIP. With Inception's weights: `--config.features="('inception', 'clip')" --config.inception=FILE`.
"""

from ml_collections import ConfigDict

from configs import common


def _shapes():
    return ConfigDict(
        {
            "protocols": ("captioned_shapes",),
            # Networks whose features are compared: inception, inception-redrawn, clip.
            "features": ("clip",),
            "inception": "",
            "clip_workdir": "",
            "coco_files": {"annotations": "", "images": "", "tfds": ""},
            "data_dir": "~/unclip_data",
            "removed": "",
            "reference": "",
            "prior": "diffusion",
            "weights": "ema",
            "seed": 0,
            "microbatch": 50,
            "unit_rows": 100,
            # Options of each part's sampling; "" is what it was trained with.
            "sampled": {
                "prior": {"method": "", "timesteps": "", "guidance_scale": "", "candidates": ""},
                "decoder": {"method": "", "timesteps": "", "guidance_scale": "", "eta": ""},
                "upsampler_1": {"method": "", "timesteps": "", "eta": ""},
                "upsampler_2": {"method": "", "timesteps": "", "eta": ""},
            },
            "sweep": {"decoder": (), "prior": ()},
            "max_bad_percent": 1.0,
        }
    )


def _sweep():
    """Figure 11 of the paper: distance by the decoder's guidance, of 1,000 captions at each scale."""
    config = _shapes()
    config.protocols = ("captioned_shapes-1k",)
    config.sweep.decoder = (1.0, 1.5, 2.0, 3.0, 4.0)
    return config


def _smoke():
    """A minute or less: few images, in few units."""
    config = _shapes()
    config.protocols = ("captioned_shapes-smoke",)
    config.update({"microbatch": 16, "unit_rows": 16})
    return config


def _emoji():
    config = _shapes()
    config.protocols = ("emoji",)
    return config


VARIANTS = {"full": _shapes, "sweep": _sweep, "smoke": _smoke, "emoji": _emoji}


def get_config(variant="full"):
    """Returns the config of a variant."""
    return common.choose(variant, VARIANTS)
