"""What diffusers draws with a stack that was trained here, beside what we draw: is it the same, and is it right?

    python -m unclip_jax.quickstart --config_variant=diffusers --workdir=runs/exportable
    python tests/benchmarks/exported_pictures.py --models=runs/exportable --out=exportable

The stack is exported and loaded by UnCLIPPipeline. Both draw from the same captions of the data set's generator, first
with the same noise, where pictures should differ by rounding alone, and then diffusers with its own. The oracle of
`captioned_shapes` counts how often colour and shape are as the caption says, in either's pictures. Both are shown, a
row each, in <out>/pictures.png.
"""

import argparse
import json
import pathlib
import sys
import time

import numpy as np
import torch
from diffusers.pipelines.deprecated.unclip import UnCLIPPipeline
from diffusers.schedulers import scheduling_unclip
from PIL import Image

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import tiny_karlo

from unclip_jax import export, unclip
from unclip_jax.artifacts import diffusers_folders
from unclip_jax.data import scenes
from unclip_jax.evaluation import oracle

_SHOWN = 12


def captions(count: int, seed: int = 1) -> list[str]:
    """Captions of scenes with one object, all told."""
    rng = np.random.default_rng(seed)
    words = (scenes.SIZES, scenes.COLOURS, scenes.SHAPES, scenes.BACKGROUNDS)
    drawn = ([str(rng.choice(list(kind))) for kind in words] for _ in range(count))
    return [f"a {size} {colour} {shape} on a {background} background" for size, colour, shape, background in drawn]


def noise(model: unclip.UnCLIP, count: int, seed: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """What `UnCLIP.generate` is given: of each part where it starts, and that of its steps."""
    rng = np.random.default_rng(seed)
    given = {}
    for name in ("prior_diffusion", "decoder", "upsampler_1"):
        part = model.parts[name]
        unet = part.config.unet if name == "upsampler_1" else part.config.model.get("unet")
        shape = (unet.image_size, unet.image_size, 3) if unet else (part.config.model.embed_dim,)
        steps = int(part.config.sampling.timesteps)
        start = rng.standard_normal((count, *shape)).astype(np.float32)
        given[name] = (start, rng.standard_normal((count, steps - 1, *shape)).astype(np.float32))
    return given


def drawn(pipeline: UnCLIPPipeline, model: unclip.UnCLIP, prompts: list[str], **options: object) -> np.ndarray:
    """Returns the pipeline's images, uint8, sampled as the configs say."""
    calls = {"prior_diffusion": "prior", "decoder": "decoder", "upsampler_1": "super_res"}
    for name, word in calls.items():
        sampling = model.parts[name].config.sampling
        options[f"{word}_num_inference_steps"] = int(sampling.timesteps)
        if name != "upsampler_1":
            options[f"{word}_guidance_scale"] = sampling.guidance_scale
    return np.round(pipeline(prompts, output_type="np", **options).images * 255).astype(np.uint8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", required=True, help="a folder with trained workdirs")
    parser.add_argument("--out", type=pathlib.Path, required=True, help="a folder that does not exist")
    parser.add_argument("--count", type=int, default=48, help="captions")
    options = parser.parse_args()
    record = {"workdir": options.models, "format": "diffusers", "weights": "ema", "dtype": "float32", "shard_mb": 4096}
    record |= dict.fromkeys(("clip", "license", "compute", "prior", "vocabulary", "evaluation"), "")
    record |= {"parts": [], "sampling": [], "pipeline": diffusers_folders.PIPELINES[0], "target": "local"}
    print(export.run(record, str(options.out / "diffusers"), command="", poll=lambda: None))
    pipeline = UnCLIPPipeline.from_pretrained(options.out / "diffusers", local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    model = unclip.UnCLIP.load(options.models, microbatch=16)
    prompts = captions(options.count)
    given = noise(model, len(prompts), seed=0)
    began = time.monotonic()
    ours = model.generate(prompts, noise=given).images["upsampler_1"]
    middle = time.monotonic()
    own_noise, scheduling_unclip.randn_tensor = scheduling_unclip.randn_tensor, tiny_karlo.steps_noise(given)
    theirs = drawn(pipeline, model, prompts, **tiny_karlo.latents(given))
    print(f"{len(prompts)} captions: {middle - began:.0f} s here, {time.monotonic() - middle:.0f} s in diffusers")
    scheduling_unclip.randn_tensor = own_noise
    free = drawn(pipeline, model, prompts, generator=torch.Generator().manual_seed(0))
    apart = np.abs(ours.astype(int) - theirs.astype(int))
    print(f"same noise: they differ by at most {apart.max()} of 255, in {(apart > 0).mean():.2%} of the numbers")
    for name, images in (("ours", ours), ("diffusers, same noise", theirs), ("diffusers, its own noise", free)):
        print(f"{name}: {json.dumps(oracle.score(images, prompts)['single'])}")
    rows = [np.concatenate(images[:_SHOWN], axis=1) for images in (ours, theirs, free)]
    picture = Image.fromarray(np.concatenate(rows))
    picture.resize((2 * picture.width, 2 * picture.height), Image.Resampling.NEAREST).save(options.out / "pictures.png")
    (options.out / "captions.txt").write_text("\n".join(prompts) + "\n")


if __name__ == "__main__":
    main()
