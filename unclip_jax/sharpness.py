"""Sharpness-aware minimisation, perturbed by each replica for itself (Foret et al., 2021; m-sharpness).

unCLIP's CLIP was trained so: "the perturbations are applied independently by the replicas, each of which uses batch
size 64" (Ramesh et al., 2022, appendix C). Replica r, which holds m examples, takes the gradient g_r of its own loss,
goes uphill to w + rho g_r / |g_r|, and the step uses the mean over replicas of the gradients found there. Under plain
`jit` a gradient is that of the whole batch, so the replicas are made explicit here.
"""

import contextlib
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, PartitionSpec
from ml_collections import ConfigDict

from unclip_jax import replicas, sharding
from unclip_jax.errors import InputError, nearest
from unclip_jax.sharding import AXES, BATCH_AXES

# fn(params, frozen, batch, rng) -> (loss, metrics), as Stage.loss.
LossFn = Callable[[Any, Any, Any, jax.Array], tuple[jax.Array, Any]]
NEGATIVES = ("replica", "global")
# Two dimensions of a device's batch: its replicas, and the examples of each.
_REPLICA = "replica"


def check(config: ConfigDict | Mapping[str, Any], *, batch_size: int, mesh: Mesh) -> None:
    """Raises InputError where `config.sam` cannot be met by a batch of this size on this mesh."""
    devices = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    if config["negatives"] not in NEGATIVES:
        raise InputError(f"config.sam.negatives={config['negatives']!r}; {nearest(config['negatives'], NEGATIVES)}")
    if batch_size // devices % config["pairs"]:
        raise InputError(
            f"config.sam.pairs={config['pairs']} does not divide the {batch_size // devices} examples that each of "
            f"{devices} devices holds of config.batch_size={batch_size}; a replica lies on one device"
        )


def value_and_grad(loss_fn: LossFn, config: ConfigDict | Mapping[str, Any], mesh: Mesh) -> Callable[..., Any]:
    """Returns fn(params, frozen, batch, rng) -> ((loss, metrics), gradient): means over the replicas, float32.

    Loss, metrics and gradient are those at the perturbed weights. Weights must be whole where they are perturbed: a
    device holds a copy of all of them, and a perturbed one for each of its replicas, but for what the mesh axis
    `model` splits.

    Args:
      loss_fn: a loss that calls `replicas.gather` where examples see each other.
      config: `rho`, length of the perturbation; `pairs`, examples of a replica; `negatives`, what a replica's loss is
        on the way uphill: "replica", of its own examples alone, or "global", of the whole batch as far as its own
        embeddings go (the paper does not say; downhill it is always the whole batch).
      mesh: the devices.
    """
    rho, pairs = config["rho"], config["pairs"]
    axes = (*BATCH_AXES, _REPLICA)
    uphill_axes = axes if config["negatives"] == "global" else ()

    def of_replica(params, frozen, batch, rng):
        with replicas.inside(uphill_axes):
            uphill, _ = jax.grad(loss_fn, has_aux=True)(params, frozen, batch, rng)
        length = rho / jnp.maximum(optax.tree.norm(uphill), 1e-12)
        perturbed = jax.tree.map(lambda w, g: w + length * g, params, uphill)
        with replicas.inside(axes):
            return jax.value_and_grad(loss_fn, has_aux=True)(perturbed, frozen, batch, rng)

    def of_device(params, frozen, batch, rng):
        here = len(jax.tree.leaves(batch)[0]) // pairs
        split = jax.tree.map(lambda x: x.reshape(here, pairs, *x.shape[1:]), batch)
        with replicas.inside(BATCH_AXES):
            numbers = replicas.first_row(here) + jnp.arange(here)
        keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(rng, numbers)
        mapped = jax.vmap(of_replica, in_axes=(None, None, 0, 0), axis_name=_REPLICA)
        found = mapped(params, frozen, split, keys)
        return jax.lax.pmean(jax.tree.map(lambda x: x.mean(0), found), BATCH_AXES)

    # A kernel can run only where all axes of the mesh are taken apart by hand; `model` is not where it splits layers.
    alone = mesh.shape["model"] == 1

    def of_one(*arguments):
        with contextlib.nullcontext() if alone else sharding.without_kernels():
            return of_device(*arguments)

    everywhere = PartitionSpec()
    return jax.shard_map(
        of_one,
        mesh=mesh,
        in_specs=(everywhere, everywhere, PartitionSpec(BATCH_AXES), everywhere),
        out_specs=everywhere,
        axis_names=set(AXES if alone else BATCH_AXES),
        # Gradients are taken inside, of each replica's own loss: JAX must not sum them over replicas by itself.
        check_vma=False,
    )
