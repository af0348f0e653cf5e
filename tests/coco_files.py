"""COCO in miniature, in the files that users have: an annotation file and a folder of JPEG pictures."""

import json
import pathlib

import numpy as np

from unclip_jax.data import images

WORDS = ("a man on a horse", "two dogs in the snow", "a red bus", "a plate of food", "a cat asleep on a bed")


def pixels(number: int) -> np.ndarray:
    """A picture of soft blobs, wider or higher than it is high or wide, uint8."""
    rng = np.random.default_rng(number)
    height, width = (48, 72) if number % 2 else (80, 56)
    y, x = np.mgrid[:height, :width]
    waves = [np.sin(x / rng.uniform(3, 20) + y / rng.uniform(3, 20) + rng.uniform(0, 6)) for _ in range(3)]
    return (127.5 + 120 * np.stack(waves, -1)).astype(np.uint8)


def image_id(number: int) -> int:
    """Ids as COCO's are: neither from 0 nor without gaps, and not in the order of the file."""
    return 42 + 1009 * ((number * 7) % 101)


def write(folder: pathlib.Path, count: int) -> tuple[str, str]:
    """Writes `count` images with five captions each; returns the annotation file and the folder of images."""
    pictures = folder / "val2014"
    pictures.mkdir(parents=True)
    listed, captions = [], []
    for number in range(count):
        name = f"COCO_val2014_{image_id(number):012d}.jpg"
        (pictures / name).write_bytes(images.encode_jpeg(pixels(number)))
        listed.append({"id": image_id(number), "file_name": name, "height": 48, "width": 72, "license": 3})
        for which in range(5):
            text = f"{WORDS[(number + which) % 5].capitalize()}, picture {number}.\n"
            captions.append({"id": 100_000 + 37 * (5 * number + which), "image_id": image_id(number), "caption": text})
    order = np.random.default_rng(0).permutation(len(captions))
    value = {
        "info": {"year": 2014},
        "images": listed,
        "licenses": [],
        "annotations": [captions[place] for place in order],
    }
    path = folder / "captions_val2014.json"
    path.write_text(json.dumps(value))
    return str(path), str(pictures)
