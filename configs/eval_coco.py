"""An evaluation on MS-COCO: which protocols, by which features, drawn how.

    python -m unclip_jax.evaluate --config=configs/eval_coco.py --checkpoint=runs/mine --workdir=evaluations/mine \
        --config.coco_files.annotations=captions_val2014.json --config.coco_files.images=val2014 \
        --config.inception=pt_inception-2015-12-05-6726825d.pth

`openai` (the default) scores the same images by `coco30k-openai` and `coco30k-clean`; `filtered` and `mlperf` are
protocols by themselves; `sweep` draws at many guidance scales, figure 11 of the paper.
"""

from ml_collections import ConfigDict

from configs import common

# What figure 11's axis covers.
GUIDANCE = (1.0, 1.25, 1.5, 2.0, 3.0, 4.0)


def evaluation(*protocols):
    """The keys that every evaluation has."""
    return ConfigDict(
        {
            "protocols": protocols,
            # Networks whose features are compared: inception, inception-redrawn, clip.
            "features": ("inception",),
            # File of Inception's weights, and the workdir of a CLIP for scores ("" takes that of the models).
            "inception": "",
            "clip_workdir": "",
            "coco_files": {"annotations": "", "images": "", "tfds": ""},
            "data_dir": "~/unclip_data",
            # File of near-duplicates, for protocols that leave them out; folder of real images' features ("" is one
            # of the workdir), which evaluations of one protocol may share.
            "removed": "",
            "reference": "",
            "prior": "diffusion",
            "weights": "ema",
            "seed": 0,
            # Images of a call on each device, and of a unit of work: part of what a run is, for other sizes round
            # otherwise.
            "microbatch": 16,
            "unit_rows": 64,
            # Options of each part's sampling; "" is what it was trained with.
            "sampled": {
                "prior": {"method": "", "timesteps": "", "guidance_scale": "", "candidates": ""},
                "decoder": {"method": "", "timesteps": "", "guidance_scale": "", "eta": ""},
                "upsampler_1": {"method": "", "timesteps": "", "eta": ""},
                "upsampler_2": {"method": "", "timesteps": "", "eta": ""},
            },
            # Guidance scales; () is what each part says itself.
            "sweep": {"decoder": (), "prior": ()},
            "max_bad_percent": 1.0,
        }
    )


def _openai():
    config = evaluation("coco30k-openai", "coco30k-clean")
    # GLIDE's and unCLIP's: all 250 steps of the decoder, 27 of the upsampler.
    config.sampled.decoder.timesteps, config.sampled.upsampler_1.timesteps = "250", "fast27"
    return config


def _only(name):
    config = _openai()
    config.protocols = (name,)
    return config


def _sweep():
    config = _only("coco30k-openai")
    config.sweep.decoder = GUIDANCE
    return config


VARIANTS = {
    "openai": _openai,
    "filtered": lambda: _only("coco30k-openai-filtered"),
    "mlperf": lambda: _only("coco30k-mlperf"),
    "sweep": _sweep,
}


def get_config(variant="openai"):
    """Returns the config of a variant."""
    return common.choose(variant, VARIANTS)
