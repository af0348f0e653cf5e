"""A stablehlo export, checked and loaded: prompts and seeds become images, by this package's own copy of its script.

Python files that lie in the export are not run. They are compared with ours, so that a difference is known.
"""

import hashlib
import logging
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt8

from unclip_jax import provenance
from unclip_jax.artifacts import bpe, consumer, folders, png, tensors
from unclip_jax.data import captions
from unclip_jax.errors import InputError

_LOG = logging.getLogger(__name__)
# What decides how a prompt is read. The export carries both files, as they were when it was made.
_READERS = {"bpe.py": bpe, "captions.py": captions}


class Artifact:
    """An export that is ready to draw.

    Attributes:
      name: of its folder.
      manifest: what it says of itself.
      steps: parts that draw one after the other, such as ("prior_diffusion", "decoder", "upsampler_1").
      size: of an image's side, in pixels.
      tokens: that the part with the shortest context reads of a prompt, without the two marks around them.
    """

    def __init__(self, folder: str):
        """Checks every hash and the date, then loads.

        Args:
          folder: what `unclip_jax.export --format=stablehlo` wrote.

        Raises:
          InputError: it is another kind of folder, was altered, has expired, or draws no images.
        """
        path = pathlib.Path(folder).expanduser()
        self.manifest = _verified(path, folders.read_manifest(folder))
        self.name = path.absolute().name
        chain = self.manifest["chain"]
        self.steps = tuple(step["function"].split(".")[0] for step in chain)
        self.size = _size(self.manifest, folder)
        lengths = [length for step in chain for length in step["reads"].values() if isinstance(length, int)]
        self.tokens = min(lengths) - 2 if lengths else None
        self._encode = bpe.Encoder(path)
        self._functions, self._weights = consumer.load(path, self.manifest, tensors.read)
        for name, module in _READERS.items():
            ours = hashlib.sha256(pathlib.Path(str(module.__file__)).read_bytes()).hexdigest()
            if ours != self.manifest["files"].get(name, {}).get("sha256"):
                _LOG.warning("the export's own %s is of another version: its run.py may read prompts otherwise", name)

    def read(self, prompt: str, *, characters: int) -> str:
        """Returns a prompt as it is drawn: one clean line.

        Args:
          prompt: any text.
          characters: how many it may have.

        Raises:
          InputError: it is empty, or longer than what the networks read.
        """
        if len(prompt) > characters:
            raise InputError(f"the prompt has {len(prompt):,} characters; this server takes {characters:,} at most")
        clean = captions.clean(prompt)
        if not clean:
            raise InputError("the prompt is empty; describe an image in words")
        # Of a row that is longer by one, the last place is taken only where the shorter one loses something.
        if self.tokens is not None and self._encode([clean], self.tokens + 3)[0, -1]:
            raise InputError(
                f"the prompt is too long: this model reads {self.tokens} tokens, that is, words, parts of longer words "
                "and punctuation; shorten it, for the rest would be left out"
            )
        return clean

    def draw(self, prompts: Sequence[str], seeds: Sequence[int]) -> Iterator[np.ndarray]:
        """Yields what each step makes of n prompts, each with its own seed; the last is uint8 [n, size, size, 3]."""
        made = consumer.draw(self.manifest, self._functions, self._weights, self._encode, prompts, seeds)
        for _, result in made:
            yield result

    def png(self, pixels: UInt8[np.ndarray, "s s 3"], prompt: str, seed: int) -> bytes:
        """Returns the file that the export's own script writes: it says what was drawn, and that it was generated."""
        marks = provenance.marks(self.manifest.get("marks", {}).get("Software", "unclip_jax (export)"))
        return png.encode(pixels, {**marks, "prompt": prompt, "seed": str(seed)})


def _verified(path: pathlib.Path, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the manifest once all files have the hashes that it names."""
    kind = manifest.get("format")
    if kind != "stablehlo":
        raise InputError(f"{path} is an export as {kind}, which no server draws from; export --format=stablehlo")
    try:
        return consumer.verified(path)
    except OSError as error:
        raise InputError(f"{path} is not whole: {error}; fetch the export again") from error
    except ValueError as error:
        raise InputError(str(error)) from error
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path / folders.MANIFEST} is no manifest that this version reads: {error!r}") from error


def _size(manifest: Mapping[str, Any], folder: str) -> int:
    """Returns the side of the images; InputError where the last step makes none."""
    if not manifest["chain"]:
        raise InputError(f"{folder!r} has no decoder, so it draws nothing; export the decoder and its prior, too")
    output = manifest["functions"][manifest["chain"][-1]["function"]]["output"]
    if output["dtype"] != "uint8" or output["shape"][-1] != 3:
        raise InputError(f"the last step of {folder!r} makes {output['dtype']} {output['shape']}, which is no image")
    return int(output["shape"][1])
