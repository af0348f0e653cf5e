"""Folders of images as `generate` leaves them, and answers to a study, for the tests of human evaluation."""

import json

import numpy as np
from PIL import Image, PngImagePlugin


def write_folder(folder, captions, *, seed, samples=1, side=12, priors=("diffusion",), listed=""):
    """Writes noise for each caption with a manifest, or with `listed`, captions.csv or captions.jsonl."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    rows = []
    for index, caption in enumerate(captions):
        for prior in priors:
            for sample in range(samples):
                name = f"{index:05d}-{prior}-seed{sample}.png"
                text = PngImagePlugin.PngInfo()
                text.add_itxt("prompt", caption)
                text.add_itxt("unclip_jax", f"made by {folder.name}")
                pixels = rng.integers(0, 256, (side, side, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / name, pnginfo=text)
                rows.append({"file": name, "index": index, "prompt": caption, "seed": sample, "prior": prior})
    if listed == "captions.csv":
        lines = ["file_name,caption", *(f'{row["file"]},"{row["prompt"]}"' for row in rows)]
        (folder / listed).write_text("\n".join(lines) + "\n")
    elif listed:
        lines = [json.dumps({"file_name": row["file"], "caption": row["prompt"]}) for row in rows]
        (folder / listed).write_text("\n".join(lines) + "\n")
    else:
        (folder / "manifest.json").write_text(json.dumps({"record": {}, "images": rows, "timings": {}}))
    return folder


def write_answers(path, study, choices, *, rater="ann", changed=None):
    """Writes a file of answers: choices is {number of a question: choice}, or a list of pairs."""
    pairs = choices.items() if isinstance(choices, dict) else choices
    rows = [{"question": n, "choice": choice, "seconds": 1.5, "at": "2026-01-01T00:00:00Z"} for n, choice in pairs]
    content = {"format": 1, "study": study.study, "rater": rater, "answers": rows}
    path.write_text(json.dumps(content | (changed or {})))
    return path
