"""What formats of others are read from: a request, and the networks that come of it, one after the other."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict

from unclip_jax import config as configs
from unclip_jax.errors import InputError
from unclip_jax.importing import workdirs
from unclip_jax.interop import names
from unclip_jax.interop.tensors import Tensor


@dataclasses.dataclass(frozen=True)
class Request:
    """What a user asks to import.

    Attributes:
      format: its name.
      path: a file or a folder of weights.
      variant: of the config that a further training of the network would have, as in configs/clip.py:VARIANT; "" is the
        format's own choice. What the weights determine is replaced in it.
      vocabulary: "tiny", or a folder with a vocabulary in CLIP's format; "" is what lies beside the weights.
      options: what else was given, such as "activation"; each format says which it knows.
    """

    format: str
    path: str
    variant: str = ""
    vocabulary: str = ""
    options: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def base(self, stage: str, variant: str) -> ConfigDict:
        """Returns an unlocked config of a stage, of the variant asked for or else `variant`."""
        config = configs.load(f"configs/{stage}.py:{self.variant or variant}")
        return ConfigDict(config.to_dict())

    def option(self, name: str, default: str = "") -> str:
        """Returns an option that may have been given."""
        return self.options.get(name) or default

    def check_options(self, known: tuple[str, ...] = ()) -> None:
        """Refuses options that were given and that this format does not read."""
        for name, value in self.options.items():
            if value and name not in known:
                raise InputError(f"--{name} means nothing to --from={self.format}")


# What reads a format: yields (name of the part as in a folder of models, network).
Reader = Callable[[Request], Iterator[tuple[str, workdirs.Imported]]]


def network(
    config: ConfigDict,
    table: names.Table,
    tensors: Mapping[str, Tensor],
    request: Request,
    *,
    statistics: names.Table | None = None,
) -> workdirs.Imported:
    """Returns the network of a config with the weights that a table finds among tensors.

    Args:
      config: complete; its network's sizes are those of the weights.
      table: of the network's weights, its own module at the top.
      tensors: of the file; none may be left over.
      request: for messages, and what the workdir remembers.
      statistics: of what the stage measures of its data, where that is in the file, too.
    """
    config = configs.from_json_value(config.to_dict())
    params, measured = workdirs.shapes(config)
    into: dict[str, Any] = {"params": params}
    table = table.under(ours="params/params/")
    if statistics is not None:
        # Those that are measured of the weights alone are nobody's but ours; a step without them reads as zeros.
        named = {piece.path for piece in statistics.pieces}
        into["statistics"] = {name: leaf for name, leaf in measured.items() if name in named}
        table = table + statistics.under(ours="statistics/")
    found = names.imported(table, tensors, into, where=request.path)
    about = {"format": request.format, "path": request.path, "tensors": len(tensors)}
    return workdirs.Imported(config, found["params"], found.get("statistics", {}), about)
