"""torch modules as the tests use them: weights drawn anew, and handed out as plain arrays."""

from collections.abc import Collection

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


def gradients(module: torch.nn.Module, *, without: Collection[str] = ()) -> dict[str, np.ndarray]:
    """The parameters' gradients by name, after a backward pass that reached all of them but those `without`."""
    found = {}
    for name, weight in module.named_parameters():
        assert (weight.grad is None) == (name in without), f"a gradient should reach all but {without}, see {name}"
        if weight.grad is not None:
            found[name] = weight.grad.numpy().copy()
    return found
