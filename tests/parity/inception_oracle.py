"""The FID Inception network in float64 torch, from its description, on weights by the names of the published file.

Each convolution's padding is half of its kernel, but where the list of unpadded ones has it. The TensorFlow graph's
resize is written as two matrices.
"""

from collections.abc import Mapping

import numpy as np
import torch
from torch.nn import functional

# Convolutions that take every second pixel, and those that lose the border.
STRIDED = (
    "Conv2d_1a_3x3",
    "Mixed_6a.branch3x3",
    "Mixed_6a.branch3x3dbl_3",
    "Mixed_7a.branch3x3_2",
    "Mixed_7a.branch7x7x3_4",
)
UNPADDED = (*STRIDED, "Conv2d_2a_3x3", "Conv2d_4a_3x3")
# The convolutions of a block that stand in a row, in order; a star says that its last two stand beside each other.
CHAINS = {
    "5": ("branch1x1", "branch5x5_1 branch5x5_2", "branch3x3dbl_1 branch3x3dbl_2 branch3x3dbl_3", "pool"),
    "6a": ("branch3x3", "branch3x3dbl_1 branch3x3dbl_2 branch3x3dbl_3", "reduce"),
    "6": (
        "branch1x1",
        "branch7x7_1 branch7x7_2 branch7x7_3",
        "branch7x7dbl_1 branch7x7dbl_2 branch7x7dbl_3 branch7x7dbl_4 branch7x7dbl_5",
        "pool",
    ),
    "7a": ("branch3x3_1 branch3x3_2", "branch7x7x3_1 branch7x7x3_2 branch7x7x3_3 branch7x7x3_4", "reduce"),
    "7": (
        "branch1x1",
        "branch3x3_1 *branch3x3_2a *branch3x3_2b",
        "branch3x3dbl_1 branch3x3dbl_2 *branch3x3dbl_3a *branch3x3dbl_3b",
        "pool",
    ),
}
BLOCKS = ("5b", "5c", "5d", "6a", "6b", "6c", "6d", "6e", "7a", "7b", "7c")


def resize_matrix(length: int, size: int = 299) -> torch.Tensor:
    """[size, length]: row i weighs the two pixels between which i * length / size lies, computed in float32."""
    matrix = np.zeros((size, length))
    ratio = np.float32(length) / np.float32(size)
    for row in range(size):
        place = np.float32(row) * ratio
        below = int(place)
        above = np.float64(place - np.float32(below))
        matrix[row, below] += 1 - above
        matrix[row, min(below + 1, length - 1)] += above
    return torch.from_numpy(matrix)


class Oracle:
    """Reads images and keeps what each convolution gave, by name."""

    def __init__(self, tensors: Mapping[str, np.ndarray]):
        self._w = {name: torch.from_numpy(tensor).double() for name, tensor in tensors.items()}
        self.outputs: dict[str, torch.Tensor] = {}

    def _unit(self, x, name):
        kernel = self._w[f"{name}.conv.weight"]
        padding = [0, 0] if name in UNPADDED else [side // 2 for side in kernel.shape[2:]]
        x = functional.conv2d(x, kernel, stride=2 if name in STRIDED else 1, padding=padding)
        mean, var, scale, bias = (
            self._w[f"{name}.bn.{part}"].view(1, -1, 1, 1) for part in ("running_mean", "running_var", "weight", "bias")
        )
        self.outputs[name] = ((x - mean) / torch.sqrt(var + 0.001) * scale + bias).clamp(min=0)
        return self.outputs[name]

    def _block(self, x, block):
        name, parts = f"Mixed_{block}", []
        for chain in CHAINS.get(block, CHAINS[block[0]]):
            if chain == "reduce":
                parts.append(functional.max_pool2d(x, 3, stride=2))
                continue
            y = x
            if chain == "pool":
                pool = functional.max_pool2d if block == "7c" else _mean_of_what_is_there
                y, chain = pool(x, 3, stride=1, padding=1), "branch_pool"
            beside = [link for link in chain.split() if link.startswith("*")]
            for link in chain.split():
                y = y if link in beside else self._unit(y, f"{name}.{link}")
            parts += [self._unit(y, f"{name}.{link[1:]}") for link in beside] or [y]
        return torch.cat(parts, 1)

    def __call__(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """Six features, float64, of uint8 [b, h, w, 3]."""
        rows, columns = (resize_matrix(length) for length in images.shape[1:3])
        x = torch.einsum("yh,bhwc,xw->bcyx", rows, torch.from_numpy(images).double(), columns)
        x = (x - 128) / 128
        found = {}
        for name in ("Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3"):
            x = self._unit(x, name)
        x = functional.max_pool2d(x, 3, stride=2)
        found["64"] = x.mean((2, 3))
        x = self._unit(self._unit(x, "Conv2d_3b_1x1"), "Conv2d_4a_3x3")
        x = functional.max_pool2d(x, 3, stride=2)
        found["192"] = x.mean((2, 3))
        for block in BLOCKS:
            if block == "7a":
                found["768"] = x.mean((2, 3))
            x = self._block(x, block)
        found["2048"] = x.mean((2, 3))
        found["logits_unbiased"] = found["2048"] @ self._w["fc.weight"].T
        found["spatial"] = self.outputs["Mixed_6d.branch1x1"][:, :7].permute(0, 2, 3, 1).flatten(1)
        return {name: value.numpy() for name, value in found.items()}


def _mean_of_what_is_there(x, size, stride, padding):
    ones = torch.ones_like(x[:1, :1])
    sums = [functional.avg_pool2d(y, size, stride, padding, divisor_override=1) for y in (x, ones)]
    return sums[0] / sums[1]
