"""Runs a network of ours and a torch module on the same weights and inputs, and holds one to the other."""

from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from parity import comparison, torch_modules

from unclip_jax.interop import names
from unclip_jax.interop.tensors import Tensor

Arrays = dict[str, np.ndarray]


def agree(
    module: str,
    size: str,
    theirs: torch.nn.Module,
    call_theirs: Callable[[dict[str, torch.Tensor]], Mapping[str, torch.Tensor]],
    call_ours: Callable[[Any, Mapping[str, jax.Array]], Mapping[str, jax.Array]],
    table: names.Table,
    shapes: Mapping[str, Any],
    inputs: Arrays,
    *,
    without: Collection[str] = (),
) -> None:
    """Asserts equal outputs, and equal gradients of a random projection of them.

    Args:
      module, size: as in `comparison.agree`.
      theirs: the module, with all weights random.
      call_theirs: from inputs by name to outputs by name.
      call_ours: the same, of our weights and inputs.
      table: of their names and ours, which begin with "params".
      shapes: of all that the table makes of theirs.
      inputs: float32 arrays; gradients of all of them are compared as well.
      without: parameters of theirs that do not reach the outputs.
    """
    wanted, wanted_gradients, toward = _of_theirs(theirs, call_theirs, inputs, without)
    state = torch_modules.state(theirs)
    tree = names.imported(table, _lazy(state), shapes)
    back = names.exported(table, tree)
    assert set(back) == set(state), f"only on one side: {sorted(set(back) ^ set(state))}"
    assert all(np.array_equal(back[name].read(), state[name]) for name in back), "weights do not go back as they came"
    params = tree["params"]

    def projection(params: Any, inputs: dict[str, jax.Array]) -> tuple[jax.Array, Mapping[str, jax.Array]]:
        outputs = call_ours(params, inputs)
        return sum(((outputs[name] * toward[name]).sum() for name in toward), start=jnp.zeros(())), outputs

    differentiated = jax.jit(jax.value_and_grad(projection, (0, 1), has_aux=True))
    (_, outputs), (of_weights, of_inputs) = differentiated(params, jax.tree.map(jnp.asarray, inputs))
    comparison.agree(module, size, "forward", outputs, wanted, comparison.FORWARD)
    zeros = {name: np.zeros_like(state[name]) for name in without}
    of_theirs = names.imported(table, _lazy(wanted_gradients["weights"] | zeros), shapes)["params"]
    comparison.agree(
        module,
        size,
        "gradient",
        names.flattened(of_weights) | _as_inputs(of_inputs),
        names.flattened(of_theirs) | _as_inputs(wanted_gradients["inputs"]),
        comparison.GRADIENT,
    )


def _lazy(arrays: Arrays) -> dict[str, Tensor]:
    return {name: Tensor.of(array) for name, array in arrays.items()}


def _as_inputs(arrays: Mapping[str, Any]) -> dict[str, Any]:
    return {f"input {name}": array for name, array in arrays.items()}


def _of_theirs(
    theirs: torch.nn.Module,
    call: Callable[[dict[str, torch.Tensor]], Mapping[str, torch.Tensor]],
    inputs: Arrays,
    without: Collection[str],
) -> tuple[Arrays, dict[str, Arrays], Arrays]:
    """Outputs, gradients of their projection by weights and by inputs, and what they were projected on."""
    tensors = {name: torch.tensor(array, requires_grad=True) for name, array in inputs.items()}
    outputs = call(tensors)
    rng = np.random.default_rng(2)
    toward = {name: rng.standard_normal(out.shape).astype(np.float32) for name, out in outputs.items()}
    theirs.zero_grad()
    torch.stack([(out * torch.tensor(toward[name])).sum() for name, out in outputs.items()]).sum().backward()
    gradients = {
        "weights": torch_modules.gradients(theirs, without=without),
        "inputs": {name: tensor.grad.numpy() for name, tensor in tensors.items() if tensor.grad is not None},
    }
    return {name: out.detach().numpy() for name, out in outputs.items()}, gradients, toward
