"""What a config's networks are: parameters, and operations of training and sampling, counted on abstract shapes."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
from ml_collections import ConfigDict

from unclip_jax import config as configs
from unclip_jax import flops
from unclip_jax.stages import base

# Examples that are traced; counts are per example, and what examples do to each other is small beside the networks.
_TRACED = 2
# A backward pass is two more forward passes' worth; SAM does both twice.
_TRAINING = 3


@dataclasses.dataclass(frozen=True)
class Module:
    """One top-level module of the trained network.

    Attributes:
      parameters: numbers that it learns.
      forward_flops_per_example: of its forward pass.
    """

    parameters: int
    forward_flops_per_example: int


@dataclasses.dataclass(frozen=True)
class Description:
    """A stage in numbers.

    Attributes:
      stage: name of the stage.
      parameters: numbers that are learned.
      forward_flops_per_example: of the trained network, in training (crops, one timestep), frozen networks excepted.
      train_flops_per_example: three times that, six with SAM; what is recomputed to save memory is not counted.
      frozen_parameters, frozen_flops_per_example: of the frozen networks that training reads.
      sampling_flops_per_example: function -> operations of one example, the frozen networks excepted.
      batch_size, steps: of the run.
      train_flops: of the whole run, frozen networks excepted.
      modules: name -> the network's top-level modules.
    """

    stage: str
    parameters: int
    forward_flops_per_example: int
    train_flops_per_example: int
    frozen_parameters: int
    frozen_flops_per_example: int
    sampling_flops_per_example: dict[str, int]
    batch_size: int
    steps: int
    train_flops: int
    modules: dict[str, Module]

    def as_dict(self) -> dict[str, Any]:
        """Returns numbers, names and dictionaries alone, for JSON."""
        return dataclasses.asdict(self)


def describe(config: ConfigDict) -> Description:
    """Counts a config's stage; allocates and compiles nothing.

    Raises:
      InputError: the config does not make a network.
    """
    stage: Any = base.create(config)
    key = jax.eval_shape(lambda: jax.random.key(0))
    params = nn.meta.unbox(jax.eval_shape(stage.init, key))
    frozen = nn.meta.unbox(jax.eval_shape(stage.init_frozen, key))
    tree = params["params"]
    frozen_class = type(stage.clip).__name__ if "clip" in frozen else ""
    loss = functools.partial(stage.loss, train=True)
    trained, others = _split(flops.count(loss, params, frozen, stage.batch_spec(_TRACED), key), frozen_class, tree)
    sampling = {}
    for name, fn in stage.predict_fns().items():
        if name.startswith("sample"):
            spec = stage.predict_specs(1)[name]
            sampling[name] = sum(_split(flops.count(fn, params, frozen, spec, key), frozen_class, tree)[0].values())
    forward = sum(trained.values()) // _TRACED
    sam = config.get("sam")
    train = _TRAINING * forward * (2 if sam and sam.rho else 1)
    steps = configs.total_steps(config)
    return Description(
        stage=config.stage,
        parameters=_size(tree),
        forward_flops_per_example=forward,
        train_flops_per_example=train,
        frozen_parameters=sum(_size(part) for name, part in frozen.items() if name != "statistics"),
        frozen_flops_per_example=others // _TRACED,
        sampling_flops_per_example=sampling,
        batch_size=config.batch_size,
        steps=steps,
        train_flops=train * config.batch_size * steps,
        modules={name: Module(_size(part), trained[name] // _TRACED) for name, part in tree.items()},
    )


def _size(tree: Any) -> int:
    return sum(x.size for x in jax.tree.leaves(tree))


def _split(counts: Mapping[flops.Scope, int], frozen: str, tree: Mapping[str, Any]) -> tuple[dict[str, int], int]:
    """Returns top-level module -> operations of the trained network, "" for those of none; and of the frozen one.

    A scope begins with the class of its network, or with a method of it: "Decoder", "CLIP.encode_image".
    """
    trained = dict.fromkeys([*tree, ""], 0)
    others = 0
    for scope, operations in counts.items():
        if frozen and scope and scope[0].partition(".")[0] == frozen:
            others += operations
        else:
            trained[next((part for part in scope if part in tree), "")] += operations
    return trained, others
