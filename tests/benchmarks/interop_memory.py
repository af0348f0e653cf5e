"""How much memory imports and exports take above the model: `python tests/benchmarks/interop_memory.py [GB]`.

It writes a CLIP by OpenAI's names, of about so many GB as float32 (2 by default), imports it in a process of its own,
exports it as safetensors in another, and prints their memory: what they had before, their peak, and what lies between
beside the weights. Pages of files that are mapped count, as they do for the kernel. The numbers are random, for
those that compress well would hide what waits in memory for the disk.
"""

import json
import math
import pathlib
import struct
import subprocess
import sys
import tempfile
import threading
import time

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

WIDTH = 2048


def shapes(depth: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a CLIP whose image tower has almost all of its weights."""
    found: dict[str, tuple[int, ...]] = {
        "token_embedding.weight": (2048, 64),
        "positional_embedding": (16, 64),
        "text_projection": (64, 256),
        "ln_final.weight": (64,),
        "ln_final.bias": (64,),
        "logit_scale": (),
        "visual.conv1.weight": (WIDTH, 3, 16, 16),
        "visual.class_embedding": (WIDTH,),
        "visual.positional_embedding": (197, WIDTH),
        "visual.proj": (WIDTH, 256),
        **{f"visual.{norm}.{kind}": (WIDTH,) for norm in ("ln_pre", "ln_post") for kind in ("weight", "bias")},
    }
    for prefix, width, blocks in (("", 64, 1), ("visual.", WIDTH, depth)):
        for number in range(blocks):
            at = f"{prefix}transformer.resblocks.{number}"
            found |= {
                f"{at}.attn.in_proj_weight": (3 * width, width),
                f"{at}.attn.in_proj_bias": (3 * width,),
                f"{at}.attn.out_proj.weight": (width, width),
                f"{at}.attn.out_proj.bias": (width,),
                f"{at}.mlp.c_fc.weight": (4 * width, width),
                f"{at}.mlp.c_fc.bias": (4 * width,),
                f"{at}.mlp.c_proj.weight": (width, 4 * width),
                f"{at}.mlp.c_proj.bias": (width,),
                **{f"{at}.ln_{n}.{kind}": (width,) for n in "12" for kind in ("weight", "bias")},
            }
    return found


def write(path: pathlib.Path, named: dict[str, tuple[int, ...]]) -> None:
    """A safetensors file of random numbers."""
    header, end, rng = {}, 0, np.random.default_rng(0)
    for name, shape in named.items():
        size = 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for shape in named.values():
            file.write(rng.standard_normal(shape, np.float32).tobytes())


def status(key: str) -> float:
    """A line of /proc/self/status, in MB."""
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 1024


def measured(what: str, source: str, target: str) -> dict[str, float]:
    """Imports or exports, in this process; returns its memory in MB."""
    from unclip_jax import convert, export, programs
    from unclip_jax.importing import formats

    programs.start_jax()
    import jax

    jax.numpy.zeros(3).block_until_ready()
    before, private, done = status("VmRSS"), [0.0], threading.Event()

    def watch():
        while not done.wait(0.01):
            private[0] = max(private[0], status("RssAnon"))

    pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    anonymous, began = status("RssAnon"), time.monotonic()
    watching = threading.Thread(target=watch)
    watching.start()
    if what == "import":
        convert.convert(formats.Request("openai_clip", source, vocabulary="tiny"), target)
    else:
        record = {"workdir": source, "format": "safetensors", "weights": "ema", "dtype": "float32", "shard_mb": 4096}
        record |= dict.fromkeys(("clip", "license", "compute", "prior", "vocabulary", "evaluation"), "")
        export.run({**record, "parts": [], "sampling": []}, target, command="", poll=lambda: None)
    done.set()
    watching.join()
    peak = status("VmHWM")
    seconds = time.monotonic() - began
    return {"before": before, "peak": peak, "above": peak - before, "private": private[0] - anonymous, "s": seconds}


def main() -> None:
    if sys.argv[1:2] == ["--measure"]:
        print(json.dumps(measured(*sys.argv[2:5])))
        return
    size = float(sys.argv[1]) if len(sys.argv) > 1 else 2.0
    named = shapes(max(1, round(size * 1e9 / (48 * WIDTH * WIDTH))))
    sizes = [4 * math.prod(shape) / 2**20 for shape in named.values()]
    model = sum(sizes)
    print(f"model {model:.0f} MB in {len(sizes)} tensors, the largest {max(sizes):.0f} MB")
    with tempfile.TemporaryDirectory() as folder:
        places = [f"{folder}/{name}" for name in ("clip.safetensors", "workdir", "export")]
        write(pathlib.Path(places[0]), named)
        for what, source, target in zip(("import", "export"), places, places[1:], strict=False):
            command = [sys.executable, __file__, "--measure", what, source, target]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            found = json.loads(done.stdout.splitlines()[-1])
            print(f"{what}: memory before {found['before']:.0f} MB, peak {found['peak']:.0f} MB: "
                  f"{found['above'] - model:.0f} MB above the model, of it private {found['private'] - model:.0f} MB; "
                  f"{found['s']:.0f} s", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
