"""Says what a run is before it runs: `python -m unclip_jax.plan --config=configs/decoder.py:paper --describe`.

Parameters and floating-point operations, counted on abstract shapes: nothing is allocated, compiled or downloaded, so
a laptop can describe the largest config in seconds. `--json` prints the same for machines.
"""

import json

import jax
from absl import flags
from ml_collections import config_flags
from rich import console as rich_console
from rich.table import Table

from unclip_jax import config as configs
from unclip_jax import programs
from unclip_jax.description import Description, describe
from unclip_jax.errors import InputError

_CONFIG = config_flags.DEFINE_config_file("config", None, "Which config, file:variant.", lock_config=True)
_DESCRIBE = flags.DEFINE_bool("describe", False, "Count parameters and operations of the config's networks.")
_JSON = flags.DEFINE_bool("json", False, "Print JSON in place of tables.")

_UNITS = ((1e21, "Z"), (1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def amount(value: float, unit: str = "") -> str:
    """Returns a number with four digits and a decimal prefix: 3.565 G."""
    for size, prefix in _UNITS:
        if value >= size:
            return f"{value / size:.4g} {prefix}{unit}"
    return f"{value:.4g} {unit}".rstrip()


def _modules(description: Description) -> Table:
    table = Table("module", title=f"{description.stage}: the trained network")
    table.add_column("parameters", justify="right")
    table.add_column("forward, an example", justify="right")
    for name, module in description.modules.items():
        table.add_row(name, amount(module.parameters), amount(module.forward_flops_per_example, "FLOP"))
    table.add_section()
    table.add_row("all", amount(description.parameters), amount(description.forward_flops_per_example, "FLOP"))
    return table


def _totals(description: Description) -> Table:
    table = Table("per example", show_header=False, title="the run")
    table.add_column("", justify="right")
    table.add_row("training, an example", amount(description.train_flops_per_example, "FLOP"))
    table.add_row("its frozen networks: parameters", amount(description.frozen_parameters))
    table.add_row("their forward pass, an example", amount(description.frozen_flops_per_example, "FLOP"))
    for name, count in description.sampling_flops_per_example.items():
        table.add_row(f"{name}, an example", amount(count, "FLOP"))
    table.add_row("batch x steps", f"{description.batch_size:,} x {description.steps:,}")
    table.add_row("training, the whole run", amount(description.train_flops, "FLOP"))
    return table


def main(argv) -> int:
    del argv
    if not _CONFIG.value or not _DESCRIBE.value:
        raise InputError("give --config=configs/STAGE.py:VARIANT and --describe")
    programs.start_logging()
    jax.config.update("jax_platforms", "cpu")  # shapes need no accelerator
    description = describe(configs.check(_CONFIG.value))
    if _JSON.value:
        print(json.dumps(description.as_dict(), indent=2))
    else:
        console = rich_console.Console()
        console.print(_modules(description), _totals(description))
    return programs.DONE


if __name__ == "__main__":
    programs.run(main)
