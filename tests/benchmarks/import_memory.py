"""How much memory an import takes above the model: `python tests/benchmarks/import_memory.py [GB]`, from the root.

It writes a CLIP by OpenAI's names, of zeros, of about so many GB as float32 (2 by default), imports it in a process of
its own, and prints that process's memory: what it had before, its peak, and what lies between beside the weights. Pages
of the file that are mapped count, as they do for the kernel.
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
    """A safetensors file of zeros, which the disk need not hold."""
    header, end = {}, 0
    for name, shape in named.items():
        size = 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)


def status(key: str) -> float:
    """A line of /proc/self/status, in MB."""
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 1024


def measured(source: str, workdir: str) -> dict[str, float]:
    """Imports, in this process; returns its memory in MB."""
    from unclip_jax import convert, programs
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
    convert.convert(formats.Request("openai_clip", source, vocabulary="tiny"), workdir)
    done.set()
    watching.join()
    peak = status("VmHWM")
    seconds = time.monotonic() - began
    return {"before": before, "peak": peak, "above": peak - before, "private": private[0] - anonymous, "s": seconds}


def main() -> None:
    if sys.argv[1:2] == ["--measure"]:
        print(json.dumps(measured(*sys.argv[2:4])))
        return
    size = float(sys.argv[1]) if len(sys.argv) > 1 else 2.0
    named = shapes(max(1, round(size * 1e9 / (48 * WIDTH * WIDTH))))
    with tempfile.TemporaryDirectory() as folder:
        source = pathlib.Path(folder) / "clip.safetensors"
        write(source, named)
        command = [sys.executable, __file__, "--measure", str(source), f"{folder}/workdir"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found = json.loads(done.stdout.splitlines()[-1])
        sizes = [4 * math.prod(shape) / 2**20 for shape in named.values()]
        kept = sum(path.stat().st_size for path in pathlib.Path(folder, "workdir").rglob("*") if path.is_file())
    model, largest = sum(sizes), max(sizes)
    print(f"model {model:.0f} MB in {len(sizes)} tensors, the largest {largest:.0f} MB; workdir {kept / 2**20:.0f} MB")
    print(f"memory before {found['before']:.0f} MB, peak {found['peak']:.0f} MB: {found['above'] - model:.0f} MB above")
    print(f"the model, of it private {found['private'] - model:.0f} MB; {found['s']:.0f} s")


if __name__ == "__main__":
    main()
