"""Holds our arrays to another implementation's, and keeps the distances for the table of `table.py`."""

import json
import os
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from parity.table import TABLE

# What is asked of float32 networks on outputs of size about 1, and of their gradients.
FORWARD = 2e-5
GRADIENT = 1e-4

Quantity = Literal["forward", "gradient"]


def agree(module: str, size: str, quantity: Quantity, ours: Any, theirs: Any, bound: float) -> None:
    """Asserts that no element differs by more than `bound`, and notes the largest difference.

    Args:
      module, size: the row of the table, such as "PriorTransformer", "two layers".
      quantity: "forward" takes absolute differences, and wants outputs of size about 1, or the bound would say
        nothing; "gradient" takes them relative to the largest element of each of their tensors.
      ours, theirs: an array, or arrays by name, the same names on both sides. Gradients are best handed over in our
        layout, where q, k and v are one tensor: the bias of keys alone has no gradient but rounding.
      bound: largest difference allowed.
    """
    ours, theirs = _named(ours), _named(theirs)
    assert set(ours) == set(theirs), f"{module}, {size}: only on one side: {sorted(set(ours) ^ set(theirs))}"
    differences = {}
    for name, wanted in theirs.items():
        where = f"{module}, {size}, {quantity} of {name or 'the output'}"
        assert ours[name].shape == wanted.shape, f"{where}: shape {ours[name].shape}, theirs {wanted.shape}"
        assert np.isfinite(wanted).all() and np.abs(wanted).max() > 0, f"{where}: theirs is no measure of anything"
        difference = np.abs(ours[name] - wanted).max()
        if quantity == "gradient":
            difference /= np.abs(wanted).max()
        else:
            assert 0.1 < np.sqrt(np.mean(wanted**2)) < 10, f"{where}: not of size about 1"
        differences[name] = float(difference)
    # A NaN is larger than any number here, and no comparison with it holds.
    worst = max(differences, key=lambda name: (np.isnan(differences[name]), differences[name]))
    _note(module=module, size=size, quantity=quantity, difference=differences[worst], bound=bound)
    what = f"the {quantity} of {worst or 'the output'}"
    assert differences[worst] <= bound, f"{module}, {size}: {what} is off by {differences[worst]:.2g}, over {bound:g}"


def _named(value: Any) -> dict[str, np.ndarray]:
    arrays = value if isinstance(value, Mapping) else {"": value}
    return {name: np.asarray(array, np.float64) for name, array in arrays.items()}


def _note(**line: str | float) -> None:
    path = os.environ.get(TABLE)
    if path:
        # One write: several workers may share the file.
        with open(path, "a") as file:
            file.write(json.dumps(line) + "\n")
