"""Karlo at its full size, imported: time and memory of `convert`, on weights that nobody trained.

    python tests/benchmarks/karlo_import.py --folder=/tmp/karlo

The folder is laid out as diffusers lays it out (UnCLIPPipeline and the image encoder of the variations), its shapes
asked of diffusers' and transformers' own classes; numbers are drawn from a seed, a piece at a time. It takes 28 GB of
disk, and is removed in the end unless `--keep` is given.
"""

import argparse
import json
import pathlib
import resource
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import transformers
from diffusers import PriorTransformer, UnCLIPScheduler, UNet2DConditionModel, UNet2DModel
from diffusers.pipelines.deprecated.unclip.text_proj import UnCLIPTextProjModel

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
_CHANNELS = (320, 640, 960, 1280)
_TEXT = ("SimpleCrossAttnDownBlock2D", "SimpleCrossAttnUpBlock2D")
_PLAIN = ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D")
# Numbers drawn at once: 64 MB.
_PIECE = 1 << 24


def networks() -> dict[str, Any]:
    """Karlo's networks, without memory for their weights."""
    with torch.device("meta"):
        return {
            "text_encoder": transformers.CLIPTextModelWithProjection(
                transformers.CLIPTextConfig(
                    hidden_size=768, intermediate_size=3072, num_attention_heads=12, projection_dim=768
                )
            ),
            "image_encoder": transformers.CLIPVisionModelWithProjection(
                transformers.CLIPVisionConfig(
                    hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16,
                    patch_size=14, projection_dim=768,
                )
            ),
            "prior": PriorTransformer(),
            "text_proj": UnCLIPTextProjModel(time_embed_dim=1280, cross_attention_dim=1536),
            "decoder": UNet2DConditionModel(
                sample_size=64, out_channels=6, layers_per_block=3, block_out_channels=_CHANNELS,
                down_block_types=(_PLAIN[0], *[_TEXT[0]] * 3), mid_block_type="UNetMidBlock2DSimpleCrossAttn",
                up_block_types=(*[_TEXT[1]] * 3, _PLAIN[1]), cross_attention_dim=1536, attention_head_dim=64,
                resnet_time_scale_shift="scale_shift", class_embed_type="identity",
            ),
            **{name: _super_res() for name in ("super_res_first", "super_res_last")},
        }  # fmt: skip


def _super_res() -> UNet2DModel:
    return UNet2DModel(
        sample_size=256, in_channels=6, layers_per_block=3, block_out_channels=_CHANNELS, add_attention=False,
        down_block_types=(_PLAIN[0],) * 4, up_block_types=(_PLAIN[1],) * 4,
    )  # fmt: skip


def write(path: pathlib.Path, shapes: Mapping[str, tuple[int, ...]], seed: int) -> None:
    """Writes a safetensors file of float32 numbers drawn from a seed: eight bytes of length, JSON, then the numbers."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + 4 * int(np.prod(shape))
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    rng = np.random.default_rng(seed)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for count in range(0, end // 4, _PIECE):
            numbers = rng.standard_normal(min(_PIECE, end // 4 - count), np.float32)
            numbers *= np.float32(0.02)
            file.write(numbers.tobytes())


def lay_out(folder: pathlib.Path) -> tuple[int, int, int]:
    """Writes all folders; returns how many tensors and how many numbers there are, and those of the largest tensor."""
    tensors, total, largest = 0, 0, 0
    for number, (name, network) in enumerate(networks().items()):
        (folder / name).mkdir(parents=True)
        shapes = {key: tuple(tensor.shape) for key, tensor in network.state_dict().items()}
        sizes = [int(np.prod(shape)) for shape in shapes.values()]
        tensors, total, largest = tensors + len(sizes), total + sum(sizes), max(largest, *sizes)
        theirs = name.endswith("_encoder")
        write(folder / name / f"{'model' if theirs else 'diffusion_pytorch_model'}.safetensors", shapes, number)
        (network.config.save_pretrained if theirs else network.save_config)(folder / name)
    prior: dict[str, Any] = {"prediction_type": "sample", "clip_sample_range": 5.0}
    kinds: dict[str, dict[str, Any]] = {"prior": prior, "decoder": {"variance_type": "learned_range"}, "super_res": {}}
    for name, options in kinds.items():
        UnCLIPScheduler(**options).save_config(folder / f"{name}_scheduler")
    return tensors, total, largest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=pathlib.Path, required=True, help="an empty one, for 28 GB")
    parser.add_argument("--keep", action="store_true", help="leave the folder")
    options = parser.parse_args()
    began = time.monotonic()
    tensors, total, largest = lay_out(options.folder / "karlo")
    gb = 4 / 1e9
    print(f"{tensors} tensors, {total} numbers ({total * gb:.1f} GB), the largest {largest * gb:.2f} GB; "
          f"laid out in {time.monotonic() - began:.0f} s", flush=True)  # fmt: skip
    began = time.monotonic()
    command = [sys.executable, "-m", "unclip_jax.convert", "--from=karlo", f"--path={options.folder / 'karlo'}"]
    done = subprocess.run([*command, f"--workdir={options.folder / 'models'}"], cwd=ROOT, check=False)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds, cpu = time.monotonic() - began, used.ru_utime + used.ru_stime
    memory = used.ru_maxrss * 1024 / 1e9
    print(f"exit code {done.returncode}, {seconds:.0f} s ({cpu:.0f} s of CPU), peak resident memory {memory:.2f} GB")
    if not options.keep:
        shutil.rmtree(options.folder)


if __name__ == "__main__":
    main()
