"""Karlo at its full size, in and out again: time and memory of `convert` and of `export`, and whether it is the same.

    python tests/benchmarks/karlo_full_size.py --folder=/tmp/karlo

The folder is laid out as diffusers lays it out (UnCLIPPipeline and the image encoder of the variations), its shapes
asked of diffusers' and transformers' own classes; each tensor's numbers are drawn from a seed of its own. What was
imported is exported again, to diffusers' layout and as safetensors, and every tensor of the former is compared with the
original, drawn again. To take 21 GB of disk and not 60, weights are deleted as soon as nobody needs them: the
original's when their part is imported, an export's when it is looked at. Memory is the most that a process had
resident; what it has before it begins, with all of JAX loaded, is measured apart. All is removed in the end. With
--small the networks are narrow and shallow, to see that it works.
"""

import argparse
import contextlib
import json
import os
import pathlib
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
import transformers
from diffusers import PriorTransformer, UnCLIPScheduler, UNet2DConditionModel, UNet2DModel
from diffusers.pipelines.deprecated.unclip.text_proj import UnCLIPTextProjModel

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

from unclip_jax.data.vocabulary import training as vocabulary_training

ROOT = pathlib.Path(__file__).resolve().parents[2]
_TEXT = ("SimpleCrossAttnDownBlock2D", "SimpleCrossAttnUpBlock2D")
_PLAIN = ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D")
# Part -> folders of the original that it is made of.
_SOURCES = {
    "clip": ("text_encoder", "image_encoder"), "prior_diffusion": ("prior",), "decoder": ("decoder", "text_proj"),
    "upsampler_1_last": ("super_res_last",), "upsampler_1": ("super_res_first",),
}  # fmt: skip
_BEFORE = """
from unclip_jax import convert, export, programs
programs.start_jax()
import jax
jax.numpy.zeros(3).block_until_ready()
"""


def networks(small: bool) -> dict[str, Any]:
    """Karlo's networks, without memory for their weights."""
    width, heads, layers = (64, 4, 2) if small else (320, 32, 0)
    channels = tuple(width * times for times in (1, 2, 3, 4))
    with torch.device("meta"):
        return {
            "text_encoder": transformers.CLIPTextModelWithProjection(
                transformers.CLIPTextConfig(
                    hidden_size=768, intermediate_size=3072, num_attention_heads=12, projection_dim=768,
                    num_hidden_layers=layers or 12,
                )
            ),
            "image_encoder": transformers.CLIPVisionModelWithProjection(
                transformers.CLIPVisionConfig(
                    hidden_size=1024, intermediate_size=4096, num_hidden_layers=layers or 24, num_attention_heads=16,
                    patch_size=14, projection_dim=768,
                )
            ),
            "prior": PriorTransformer(num_attention_heads=heads, num_layers=layers or 20),
            "text_proj": UnCLIPTextProjModel(time_embed_dim=4 * width, cross_attention_dim=1536),
            "decoder": UNet2DConditionModel(
                sample_size=64, in_channels=3, out_channels=6, layers_per_block=3, block_out_channels=channels,
                down_block_types=(_PLAIN[0], *[_TEXT[0]] * 3), mid_block_type="UNetMidBlock2DSimpleCrossAttn",
                up_block_types=(*[_TEXT[1]] * 3, _PLAIN[1]), cross_attention_dim=1536, attention_head_dim=64,
                resnet_time_scale_shift="scale_shift", class_embed_type="identity",
            ),
            **{name: _super_res(channels) for name in ("super_res_first", "super_res_last")},
        }  # fmt: skip


def _super_res(channels: tuple[int, ...]) -> UNet2DModel:
    return UNet2DModel(
        sample_size=256, in_channels=6, layers_per_block=3, block_out_channels=channels, add_attention=False,
        down_block_types=(_PLAIN[0],) * 4, up_block_types=(_PLAIN[1],) * 4,
    )  # fmt: skip


def drawn(name: str, tensor: str, shape: tuple[int, ...]) -> np.ndarray:
    """The numbers of one tensor of a network."""
    seed = np.frombuffer(f"{name} {tensor}".encode(), np.uint8)
    numbers = np.random.default_rng(seed.tolist()).standard_normal(shape, np.float32)
    numbers *= np.float32(0.02)
    return numbers


def write(path: pathlib.Path, name: str, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Writes a network's safetensors file: eight bytes of length, JSON, then the numbers."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor, shape in shapes.items():
        begin, end = end, end + 4 * int(np.prod(shape))
        header[tensor] = {"dtype": "F32", "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor, shape in shapes.items():
            file.write(drawn(name, tensor, shape).tobytes())


def lay_out(folder: pathlib.Path, *, small: bool) -> dict[str, dict[str, tuple[int, ...]]]:
    """Writes all folders; returns the shapes of their tensors."""
    found: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, network in networks(small).items():
        (folder / name).mkdir(parents=True)
        found[name] = {key: tuple(tensor.shape) for key, tensor in network.state_dict().items()}
        write(folder / name / weights_of(name), name, found[name])
        (network.config.save_pretrained if name.endswith("_encoder") else network.save_config)(folder / name)
    prior: dict[str, Any] = {"prediction_type": "sample", "clip_sample_range": 5.0}
    kinds: dict[str, dict[str, Any]] = {"prior": prior, "decoder": {"variance_type": "learned_range"}, "super_res": {}}
    for name, options in kinds.items():
        UnCLIPScheduler(**options).save_config(folder / f"{name}_scheduler")
    write_vocabulary(folder / "tokenizer")
    return found


def weights_of(name: str) -> str:
    """The file of a component's weights."""
    return f"{'model' if name.endswith('_encoder') else 'diffusion_pytorch_model'}.safetensors"


def write_vocabulary(folder: pathlib.Path) -> None:
    """A vocabulary of CLIP's size that gives its known answers; all other words are two letters, one beyond ASCII."""
    letters = vocabulary_training.byte_symbols()
    pairs = ((one, f"{two}</w>") for one in letters for two in letters if not (one + two).isascii())
    # Rank -> merge: the ids of "of", "photo", "dog" and "cat" are 512 more.
    known = {
        27: ("o", "f</w>"), 610: ("p", "h"), 611: ("ph", "o"), 612: ("pho", "t"), 613: ("phot", "o</w>"),
        1416: ("d", "o"), 1417: ("do", "g</w>"), 1855: ("a", "t</w>"), 1856: ("c", "at</w>"),
    }  # fmt: skip
    merges = [known.get(rank) or next(pairs) for rank in range(49408 - 2 - 2 * len(letters))]
    words = [*letters, *(f"{letter}</w>" for letter in letters), *map("".join, merges)]
    symbols = {word: number for number, word in enumerate([*words, *vocabulary_training.SPECIALS])}
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps(symbols), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, merges), ""]), encoding="utf-8")


def run(what: str, command: list[str], look: Callable[[], None] = lambda: None) -> float:
    """Runs a program, calling `look` each second; prints time and memory, and returns the latter in GB."""
    began = time.monotonic()
    process = subprocess.Popen([sys.executable, *command], cwd=ROOT)
    while True:
        done, status, used = os.wait4(process.pid, os.WNOHANG)
        if done:
            break
        look()
        time.sleep(1)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{what} ended with exit code {process.returncode}")
    memory, seconds = used.ru_maxrss * 1024 / 1e9, time.monotonic() - began
    print(f"{what}: {seconds:.0f} s ({used.ru_utime + used.ru_stime:.0f} s of CPU), peak memory {memory:.2f} GB",
          flush=True)  # fmt: skip
    return memory


class Compared:
    """Compares the components of an export with the original, drawn again, and deletes them."""

    def __init__(self, folder: pathlib.Path, shapes: Mapping[str, Mapping[str, tuple[int, ...]]]):
        self._folders = (folder.with_name(f".{folder.name}.unfinished"), folder)
        self._left, self.same = dict(shapes), 0

    def __call__(self) -> None:
        for name, shapes in list(self._left.items()):
            for folder in self._folders:
                path = folder / name / weights_of(name)
                # Not begun; or the folder was renamed just now.
                with contextlib.suppress(FileNotFoundError):
                    if self._is_same(path, name, shapes):
                        path.unlink()
                        del self._left[name]
                        break

    def _is_same(self, path: pathlib.Path, name: str, shapes: Mapping[str, tuple[int, ...]]) -> bool:
        """False where it is still being written; an error where it is another."""
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8).ljust(8, b"\0"))
            if path.stat().st_size != 8 + length + 4 * sum(int(np.prod(shape)) for shape in shapes.values()):
                return False
            header = json.loads(file.read(length))
        assert header.pop("__metadata__") == {"format": "pt"} and set(header) == set(shapes), name
        for tensor, shape in shapes.items():
            about = header[tensor]
            assert about["dtype"] == "F32" and tuple(about["shape"]) == shape, tensor
            there = np.fromfile(path, "<u4", int(np.prod(shape)), offset=8 + length + about["data_offsets"][0])
            assert np.array_equal(there, drawn(name, tensor, shape).reshape(-1).view("<u4")), f"{name} {tensor}"
            self.same += 1
        return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=pathlib.Path, required=True, help="one that does not exist, for 21 GB")
    parser.add_argument("--small", action="store_true", help="a hundredth of the size")
    options = parser.parse_args()
    options.folder.mkdir(parents=True)
    try:
        measure(options.folder, small=options.small)
    finally:
        shutil.rmtree(options.folder)


def measure(folder: pathlib.Path, *, small: bool) -> None:
    began = time.monotonic()
    original, models, gb = folder / "karlo", folder / "models", 4 / 1e9
    shapes = lay_out(original, small=small)
    sizes = {name: [int(np.prod(shape)) for shape in found.values()] for name, found in shapes.items()}
    parts = {part: sum(sum(sizes[name]) for name in names) * gb for part, names in _SOURCES.items()}
    largest = max(max(found) for found in sizes.values()) * gb
    print(f"{sum(map(len, sizes.values()))} tensors, {sum(parts.values()):.2f} GB, the largest {largest:.2f} GB; parts "
          + ", ".join(f"{part} {size:.2f} GB" for part, size in parts.items())
          + f"; laid out in {time.monotonic() - began:.0f} s", flush=True)  # fmt: skip
    before = run("nothing", ["-c", _BEFORE])

    def imported() -> None:
        for part, names in _SOURCES.items():
            if (models / part).exists():
                for name in names:
                    (original / name / weights_of(name)).unlink(missing_ok=True)

    memory = run("import", ["-m", "unclip_jax.convert", "--from=karlo", f"--path={original}", f"--workdir={models}"],
                 imported)  # fmt: skip
    above = memory - before - max(parts.values())
    print(f"above the largest part {above:.2f} GB; twice the largest tensor {2 * largest:.2f} GB", flush=True)
    export = ["-m", "unclip_jax.export", f"--workdir={models}"]
    compared = Compared(folder / "diffusers", shapes)
    memory = run("export to diffusers", [*export, f"--out={folder / 'diffusers'}", "--format=diffusers"], compared)
    compared()
    print(f"{compared.same} tensors are the original's, bit by bit; above the largest part "
          f"{memory - before - max(parts.values()):.2f} GB", flush=True)  # fmt: skip
    written = folder / ".safetensors.unfinished"

    def looked_at() -> None:  # a part's file is whole when that of the next is begun
        for path in sorted(written.glob("*.safetensors"), key=lambda path: path.stat().st_mtime_ns)[:-1]:
            path.unlink()

    run("export to safetensors", [*export, f"--out={folder / 'safetensors'}", "--format=safetensors"], looked_at)


if __name__ == "__main__":
    main()
