"""Where a run's weights begin that goes on from those of a finished run: fine-tuning, `config.begin_from`.

    python -m unclip_jax.train --config=configs/decoder.py:tiny_inpaint --config.begin_from=runs/mine/decoder …

The moving average of that run becomes weights and moving average at step 0; the optimizer begins anew. A network that
reads four channels more than there, to inpaint, begins with zeros for them (`stages.inpainting`). What is not there at
all, such as what reads the timestep in a noised CLIP, begins as in any run.
"""

import logging
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
from ml_collections import ConfigDict

from unclip_jax import checkpoint, digests, sharding
from unclip_jax.errors import InputError
from unclip_jax.program import Program
from unclip_jax.stages import base, inpainting
from unclip_jax.state import of_data

_LOG = logging.getLogger(__name__)


class Beginning(NamedTuple):
    """What a run begins with.

    Attributes:
      params: weights by path (`digests.named`), on the run's devices; those that are missing begin as in any run.
      statistics: what the other run measured of its data.
    """

    params: dict[str, jax.Array]
    statistics: dict[str, Any]

    def put(self, params: Any) -> Any:
        """Returns a run's first weights with these in their places."""
        return jax.tree_util.tree_map_with_path(lambda path, x: self.params.get(jax.tree_util.keystr(path), x), params)


def read(program: Program, networks: Mapping[str, str]) -> Beginning | None:
    """Reads what `config.begin_from` names; None where it names nothing.

    Args:
      program: the run's.
      networks: fingerprint of each of its frozen networks, by name.

    Raises:
      InputError: no such run or checkpoint, one of another stage or network, or one that read another frozen network.
    """
    workdir = program.config.get("begin_from", "")
    if not workdir:
        return None

    def widen(config: ConfigDict) -> Callable[[Any], Any]:
        inpaints = program.config.get("inpaint", False) and not config.get("inpaint", False)
        return inpainting.widened if inpaints else lambda params: params

    def abstract(config: ConfigDict) -> tuple[Any, Any]:
        if config.stage != program.config.stage:
            raise InputError(
                f"config.begin_from={workdir!r} holds a {config.stage}, and this is a {program.config.stage}"
            )
        stage = base.create(config)
        key = jax.eval_shape(lambda: jax.random.key(0))
        trees = jax.eval_shape(stage.init, key), jax.eval_shape(stage.init_frozen, key).get("statistics", {})
        params, statistics = (_placed(tree, program) for tree in trees)
        _check_same(jax.eval_shape(widen(config), params), program)
        return params, statistics

    params, statistics, config, step = checkpoint.load(workdir, abstract)
    for name, fingerprint in networks.items():
        theirs = checkpoint.trained_on(workdir, step).get(f"frozen.{name}", fingerprint)
        if theirs != fingerprint:
            raise InputError(
                f"config.begin_from={workdir!r} was trained on another {name} than that in "
                f"{program.config.frozen[name]}; give the one it knows as config.frozen.{name}"
            )
    there, here = dict(digests.named(widen(config)(params))), dict(digests.named(program.state.params))
    new = [name for name in here if name not in there]
    _LOG.info("the weights begin as step %d of %s%s", step, workdir, f"; new are {', '.join(new)}" if new else "")
    return Beginning({name: jax.device_put(x, here[name].sharding) for name, x in there.items()}, of_data(statistics))


def _check_same(there: Any, program: Program) -> None:
    """Refuses weights that the program's network does not have."""
    here = dict(digests.named(program.state.params))
    for name, x in digests.named(there):
        wanted = here[name].shape if name in here else "missing"
        if x.shape != wanted:
            raise InputError(
                f"config.begin_from={program.config.begin_from!r} holds another network: {name} is {x.shape} there and "
                f"{wanted} here"
            )


def _placed(boxed: Any, program: Program) -> Any:
    where = sharding.shardings(boxed, program.config.sharding, program.mesh)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), nn.meta.unbox(boxed), where)
