"""The config that is in a workdir, to go on from it: `--config=configs/imported.py:runs/clip --workdir=runs/clip`.

So imported weights are trained further (`unclip_jax.convert`), with `--accept_changes` and whatever is to differ.
"""

import json
import pathlib

from ml_collections import ConfigDict, config_dict


def get_config(workdir):
    """Returns the config of `workdir/config.json`."""
    path = pathlib.Path(workdir).expanduser() / "config.json"
    try:
        values = json.loads(path.read_text())
    except OSError as error:
        raise ValueError(f"{workdir!r} is no workdir of a run: {error}") from error
    return ConfigDict(_frozen(values, "")).lock()


def _frozen(value, name):
    """Makes tuples of lists, and gives every None a type, so that the command line can set it."""
    if isinstance(value, dict):
        return {key: _frozen(inner, key) for key, inner in value.items()}
    if isinstance(value, list):
        return tuple(_frozen(inner, name) for inner in value)
    if value is None:
        return config_dict.placeholder(int if name.endswith(("_steps", "_examples")) else float)
    return value
