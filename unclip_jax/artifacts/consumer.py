"""Draws with an export, without the code that made it: python run.py "a small red star" --out=star.png --seed=0"""

import argparse
import datetime
import hashlib
import json
import pathlib
import re
import sys

import jax.export
import jax.numpy as jnp
import numpy as np


def verified(folder):
    """Returns an export's manifest; ValueError where a file is not what it says. Nothing of them is loaded before."""
    manifest = json.loads((folder / "manifest.json").read_text())
    said = manifest.pop("digest", "")
    if hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest() != said:
        raise ValueError(f"{folder / 'manifest.json'} was altered or is damaged; fetch the export again")
    read = {about["file"] for about in manifest["functions"].values()}.union(*manifest["weights"].values())
    for name in sorted(read | {*manifest["files"]}):
        if not re.fullmatch(r"\w[\w.-]*", name):
            raise ValueError(f"{folder / 'manifest.json'} names {name!r}, which is no file of its own folder")
        with open(folder / name, "rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != manifest["files"].get(name, {}).get("sha256"):
                raise ValueError(f"{folder / name} was altered or is damaged; fetch the export again")
    if manifest["expires"] < datetime.datetime.now(datetime.UTC).isoformat():
        raise ValueError(f"the export expired on {manifest['expires']}; make it anew: {manifest['renewal']}")
    return manifest


def load(folder, manifest, read):
    """Returns functions by name, compiled when they are first called, and weights by part."""
    files = {name: (folder / about["file"]).read_bytes() for name, about in manifest["functions"].items()}
    functions = {name: jax.jit(jax.export.deserialize(bytearray(x)).call) for name, x in files.items()}
    weights = {}
    for part, names in manifest["weights"].items():
        weights[part] = {key: jnp.asarray(x) for name in names for key, x in read(folder / name)}
    return functions, weights


def draw(manifest, functions, weights, encode, prompts, seeds):
    """Yields what each function of the chain makes of n prompts: float32 [n, d], or uint8 images [n, s, s, 3]."""
    names = [f"{seed}\n{prompt}".encode() for seed, prompt in zip(seeds, prompts, strict=True)]
    made = {"id": np.array([int.from_bytes(hashlib.sha256(x).digest()[:4], "little") for x in names], np.uint32)}
    for step in manifest["chain"]:
        fields = {field: made[x] if x in made else encode(prompts, x) for field, x in step["reads"].items()}
        parts = manifest["functions"][step["function"]]["weights"]
        given = {role: weights[part] for role, part in parts.items()}
        made[step["makes"]] = np.asarray(functions[step["function"]](given, fields, np.uint32(0)))
        yield step["makes"], made[step["makes"]]


def main(folder):
    flags = argparse.ArgumentParser(description=__doc__)
    for name, default in (("prompt", ""), ("--out", "image.png"), ("--seed", 0)):
        flags.add_argument(name, default=default, type=type(default))
    options, manifest = flags.parse_args(), verified(folder)
    sys.path.insert(0, str(folder))
    import bpe  # these four are known to be whole by now
    import captions
    import png
    import tensors

    encode, prompt = bpe.Encoder(folder), captions.clean(options.prompt)
    *_, (_, images) = draw(manifest, *load(folder, manifest, tensors.read), encode, [prompt], [options.seed])
    text = {**manifest["marks"], "prompt": prompt, "seed": str(options.seed)}
    pathlib.Path(options.out).write_bytes(png.encode(images[0], text))


if __name__ == "__main__":
    try:
        main(pathlib.Path(__file__).parent)
    except ValueError as error:
        sys.exit(f"error: {error}")
