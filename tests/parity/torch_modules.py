"""torch modules as the tests use them: weights drawn anew, plain arrays in and out."""

from collections.abc import Mapping

import numpy as np
import torch


def redraw(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Draws every parameter of the module anew, norms and what starts at zero included, and returns it for evaluation.

    Matrices and convolutions keep the size of what goes through them; scales of norms lie about 1.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in module.named_parameters():
            drawn = torch.randn(weight.shape, generator=generator)
            if weight.ndim > 1:
                weight.copy_(drawn / np.sqrt(np.prod(weight.shape[1:])))
            else:
                weight.copy_(0.2 * drawn + ("norm" in name and name.endswith("weight")))
    return module.eval()


def state(module: torch.nn.Module) -> dict[str, np.ndarray]:
    """The module's parameters by name, float32 copies."""
    return {name: weight.detach().numpy().copy() for name, weight in module.named_parameters()}


def gradients(module: torch.nn.Module) -> dict[str, np.ndarray]:
    """The parameters' gradients by name, after a backward pass that reached all of them."""
    found = {}
    for name, weight in module.named_parameters():
        assert weight.grad is not None, f"no gradient reached {name}"
        found[name] = weight.grad.numpy().copy()
    return found


def inputs(arrays: Mapping[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """Tensors of the arrays; those of floating point ask for a gradient."""
    return {
        name: torch.tensor(array, requires_grad=bool(np.issubdtype(array.dtype, np.floating)))
        for name, array in arrays.items()
    }
