"""What the configs of all stages share. Strings and numbers only: a config names things, it never builds them."""

import difflib
from collections.abc import Callable

from ml_collections import ConfigDict, config_dict


def choose(variant: str, variants: dict[str, Callable[[], ConfigDict]]) -> ConfigDict:
    """Returns the locked config of a variant; an unknown one is an error that names the nearest."""
    if variant not in variants:
        near = difflib.get_close_matches(variant, variants, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(variants)}"
        raise ValueError(f"there is no variant {variant!r}; {hint}")
    config = variants[variant]()
    _place(config)
    return config.lock()


def _place(section: ConfigDict) -> None:
    """Gives every None a type, so that the command line can set it."""
    for key, value in section.items():
        if isinstance(value, ConfigDict):
            _place(value)
        elif value is None:
            section[key] = config_dict.placeholder(int if key.endswith(("_steps", "_examples")) else float)


def durations(**given: int | float) -> dict:
    """Expands `every_steps=50` to all three units of the duration, of which one is set."""
    keys = {}
    for name, value in given.items():
        stem = name.rsplit("_", 1)[0]
        for key in (f"{stem}_steps", f"{stem}_examples", f"{stem}_percent"):
            keys[key] = value if key == name else None
    return keys


def base(*, stage: str, batch_size: int, steps: int) -> ConfigDict:
    """The keys that every stage has, with defaults that suit a pod; variants change what they must."""
    return ConfigDict(
        {
            "stage": stage,
            "seed": 0,
            "batch_size": batch_size,
            "dtype": "auto",
            "max_nonfinite_steps": 20,
            # Workdir of a run of this stage that this one goes on from; its moving average becomes the first weights.
            "begin_from": "",
            **durations(total_steps=steps),
            "data": {
                "dataset": "captioned_shapes",
                "variant": "tiny",
                "data_dir": "~/unclip_data",
                "split": "train",
                "eval_split": "validation",
                # Data sets to train on in place of the one above: (name or folder, variant, split, weight) for each.
                "mixture": (),
                "vocabulary": "tiny",
                "workers": 8,
                "cache": False,
                "flip": False,
                "degradation": "none",
                "crop_fraction": 1.0,
                # Folder that `python -m unclip_jax.embed` made, or "auto" for those beside the data; "" runs CLIP.
                "embeddings": "",
                "max_bad_percent": 1.0,
            },
            "optim": {
                "learning_rate": 1e-4,
                "schedule": "constant",
                "final_fraction": 0.0,
                "beta1": 0.9,
                "beta2": 0.999,
                "eps": 1e-8,
                "weight_decay": 0.0,
                "decay": "matrices",
                "grad_clip": 1.0,
                "accumulation": 1,
                "ema_decay": 0.9999,
                "ema_warmup": False,
                **durations(warmup_steps=1000),
            },
            "mesh": {"slice": -1, "data": -1, "fsdp": 1, "model": 1},
            # Logical axes -> mesh axes; what is not named is on every device. A convolution's weights are split along
            # one axis: with both channel axes split, on a data x fsdp x model mesh, XLA's gradients came out wrong.
            "sharding": (
                ("embed", "fsdp"),
                ("mlp", "model"),
                ("heads", "model"),
                ("vocab", "model"),
                ("conv_out", "fsdp"),
            ),
            # A checkpoint by the clock, for machines that may be taken away, lasts until the next regular one.
            "checkpoint": {**durations(every_steps=1000), "keep": 3, "every_minutes": 0.0},
            "log": {
                **durations(every_steps=100),
                "tensorboard": True,
                "profile_start": 0,
                "profile_steps": 0,
                # A step that takes longer than this ends all hosts, each naming where it was; 0 is off.
                "watchdog_seconds": 1200.0,
            },
            "evaluation": {**durations(every_steps=5000), "evaluators": ("loss",), "examples": 1024, "batch_size": 64},
        }
    )


def laptop(config: ConfigDict, *, emoji: bool) -> ConfigDict:
    """Makes a config run in minutes on two cores: everything in memory, no TensorBoard, quick warm-up."""
    config.data.dataset = "emoji" if emoji else "captioned_shapes"
    config.data.variant = "default" if emoji else "tiny"
    config.data.cache = True
    config.data.workers = 0
    config.optim.update(durations(warmup_percent=5.0))
    config.optim.update({"schedule": "cosine", "ema_decay": 0.995, "ema_warmup": True})
    config.checkpoint.update({**durations(every_percent=20.0), "keep": 2})
    config.log.update({**durations(every_percent=2.0), "tensorboard": False})
    config.evaluation.update(
        {**durations(every_percent=50.0 if emoji else 100.0), "examples": 64, "batch_size": 64}
    )
    return config


def pod(config: ConfigDict) -> ConfigDict:
    """Names what the user of a large config brings: data of their own, and OpenAI's CLIP vocabulary."""
    # All chips share the weights: gradients are scattered, which is half the bytes of summing them everywhere.
    # Gradients are scattered among fewer chips than a slice has: among all of them, TPUs sum in full, twice the bytes.
    config.mesh.update({"data": 2, "fsdp": -1})
    config.data.dataset = ""  # a folder that `python -m unclip_jax.prepare` made
    config.data.vocabulary = "~/unclip_data/clip_vocabulary"  # holds vocab.json and merges.txt
    return config


def accelerator(config: ConfigDict) -> ConfigDict:
    """As `pod`, for one accelerator of 16 GB: the moving average and the evaluations of a shorter run."""
    pod(config)
    config.mesh.update({"data": -1, "fsdp": 1})
    config.optim.ema_decay = 0.9995
    config.evaluation.update({**durations(every_percent=10.0), "examples": 1024, "batch_size": 64})
    return config


def clip_paper() -> dict:
    """ViT-H/16 at 256 pixels and a text tower of 24 blocks (appendix C); 64 numbers a head, as in OpenAI's CLIPs."""
    return {
        "image_size": 256,
        "patch_size": 16,
        "vision_width": 1280,
        "vision_depth": 32,
        "vision_heads": 20,
        "context_length": 77,
        "vocab_size": 49408,
        "text_width": 1024,
        "text_depth": 24,
        "text_heads": 16,
        "embed_dim": 1024,
        "activation": "gelu",
        "remat": "none",
    }


def clip_small() -> dict:
    """The CLIP of the configs for one accelerator: ViT-B/32 at 256 pixels."""
    return {
        **clip_paper(),
        "patch_size": 32,
        "vision_width": 768,
        "vision_depth": 12,
        "vision_heads": 12,
        "text_width": 512,
        "text_depth": 12,
        "text_heads": 8,
        "embed_dim": 512,
    }


def clip_diffusers() -> dict:
    """A laptop's CLIP that transformers has, too: patches without convolutions before them, and text as wide as z_t.

    The second is for diffusers' prior and decoder, which read both by layers of one width.
    """
    vision = {"patch_size": 4, "vision_width": 96, "vision_depth": 2, "vision_heads": 3}
    text = {"text_width": 96, "text_depth": 2, "text_heads": 3, "embed_dim": 96}
    sizes = {"image_size": 32, "context_length": 24, "vocab_size": 2048}
    return {**sizes, **vision, **text, "activation": "quick_gelu", "remat": "none"}


def text_paper() -> dict:
    """The caption encoder of Table 3, of priors and decoder."""
    return {
        "context_length": 256,
        "vocab_size": 49408,
        "width": 2048,
        "depth": 24,
        "heads": 32,
        "activation": "gelu",
        "remat": "none",
    }


def text_small() -> dict:
    """The caption encoder of the configs for one accelerator."""
    return {**text_paper(), "context_length": 128, "width": 512, "depth": 12, "heads": 8, "remat": "full"}


def clip_tiny(*, emoji: bool) -> dict:
    """The CLIP of the laptop configs; the stages after it must name the same one."""
    # Convolutions before the transformer teach it shapes in hundreds of steps; the emoji do not need them.
    stem = {} if emoji else {"vision_stem": (32, 64, 96)}
    return {
        **stem,
        "image_size": 32,
        "patch_size": 8,
        "vision_width": 96,
        "vision_depth": 2,
        "vision_heads": 3,
        "context_length": 24,
        "vocab_size": 2048,
        "text_width": 96,
        "text_depth": 2,
        "text_heads": 3,
        "embed_dim": 64,
        "activation": "quick_gelu",
        "remat": "none",
    }


def text_tiny() -> dict:
    """The caption encoder of the laptop configs."""
    return {
        "context_length": 24,
        "vocab_size": 2048,
        "width": 96,
        "depth": 2,
        "heads": 3,
        "activation": "quick_gelu",
        "remat": "none",
    }


def inpainting(config: ConfigDict, unet: ConfigDict, *, steps: int, learning_rate: float) -> ConfigDict:
    """Makes of a config the one that fine-tunes its run to draw what is missing of an image (GLIDE, section 4.2)."""
    config.inpaint = True
    unet.in_channels += 4  # the known part and a mask of it
    config.update(durations(total_steps=steps))
    config.optim.learning_rate = learning_rate
    return config


def pixel_sampling(*, method: str, timesteps: str, **more: float) -> dict:
    """How images are sampled; with threshold "dynamic", `quantile` of every image's |x_start| is kept unclipped."""
    return {"method": method, "timesteps": timesteps, "eta": 0.0, "threshold": "static", "quantile": 0.995, **more}


def exportable(config: ConfigDict, clip: dict) -> ConfigDict:
    """Sets what diffusers' unCLIP pipelines take for granted: embeddings as CLIP returns them, float32 tables."""
    if "clip" in config:
        config.clip = clip
    if config.stage in ("prior_diffusion", "decoder"):
        config.embedding = {"scaling": "whiten", "scale": 1.0, "norm": "raw"}
    config.diffusion.tables = "float32"
    return config


def diffusion(*, prediction: str = "eps", variance: str = "learned_range", schedule: str = "cosine") -> dict:
    """The process of Table 3: 1,000 steps; pixels and predictions clipped to [-1, 1]."""
    return {
        "schedule": schedule,
        "num_timesteps": 1000,
        "prediction": prediction,
        "variance": variance,
        "clip_x_start": 1.0,
    }
