"""Says what a run is, and what it would be on hardware that nobody has rented, before it runs.

    python -m unclip_jax.plan --config=configs/decoder.py:paper --describe
    python -m unclip_jax.plan --config=configs/decoder.py:paper --topology=v5p-512
    python -m unclip_jax.plan --config=configs/decoder.py:paper --topology=v5p-512 --search
    python -m unclip_jax.plan --config=configs/decoder.py:paper --topology=v5p-8 --program=sample --batch_per_chip=8

`--describe` counts parameters and operations on abstract shapes: nothing is compiled, so a laptop describes the largest
config in seconds. `--topology` has the TPU compiler (package libtpu, `pip install 'unclip_jax[plan]'`) compile the real
train step, or with `--program` a predict function, for a slice that need not exist; docs/pods.md says how to read the
answer. A program that does not fit is an answer as well: the exit code is 0, and `fits` is false. `--json` prints
JSON, and nothing else, on standard output.
"""

import json

from absl import flags
from ml_collections import config_flags
from rich import console as rich_console

from unclip_jax import config as configs
from unclip_jax import plan_search, plan_tables, planning, programs, topologies, tpu_compiler
from unclip_jax.description import describe
from unclip_jax.errors import InputError, nearest

_CONFIG = config_flags.DEFINE_config_file("config", None, "Which config, file:variant.", lock_config=True)
_DESCRIBE = flags.DEFINE_bool("describe", False, "Count parameters and operations of the config's networks.")
_TOPOLOGY = flags.DEFINE_string("topology", "", "Plan for this hardware: v5p-512, v6e-256, 2xv5e-256, h100-64, …")
_PROGRAM = flags.DEFINE_string("program", "train", "What to plan: train, sample, or a predict function of the stage.")
_BATCH = flags.DEFINE_integer("batch_per_chip", 0, "Examples on a chip in a step; 0: the config's batch, on all.")
_EFFORT = flags.DEFINE_string("effort", "quick", "The compiler's: quick or full.")
_SEARCH = flags.DEFINE_bool("search", False, "Try meshes, rematerialisation and accumulation, and rank them.")
_LIMIT = flags.DEFINE_integer("limit", 8, "Compilations of a search.")
_OPTIONS = flags.DEFINE_list("compiler_options", [], "Further options of the compiler, name=value,…")
_JSON = flags.DEFINE_bool("json", False, "Print JSON in place of tables.")


def main(argv) -> int:
    del argv
    if not _CONFIG.value or bool(_DESCRIBE.value) == bool(_TOPOLOGY.value):
        raise InputError("give --config=configs/STAGE.py:VARIANT and either --describe or --topology=NAME, say v5p-512")
    planning.start_jax()
    config = configs.check(_CONFIG.value)
    console = rich_console.Console()
    if _DESCRIBE.value:
        description = describe(config)
        if _JSON.value:
            print(json.dumps(description.as_dict(), indent=2))
        else:
            plan_tables.show_description(description, console)
    elif _SEARCH.value:
        _search(config, console)
    else:
        plan = planning.plan_apart(config, topologies.find(_TOPOLOGY.value), options=_compiler_options(), **_wanted())
        if _JSON.value:
            print(json.dumps(plan.as_dict(), indent=2))
        else:
            plan_tables.show(plan, console)
    return programs.DONE


def _wanted() -> dict:
    if _EFFORT.value not in tpu_compiler.EFFORTS:
        raise InputError(f"--effort={_EFFORT.value!r} is unknown; {nearest(_EFFORT.value, tpu_compiler.EFFORTS)}")
    if _BATCH.value < 0 or _LIMIT.value < 1:
        raise InputError("--batch_per_chip is 0 or more, and --limit 1 or more")
    return {"name": _PROGRAM.value, "effort": _EFFORT.value, "batch_per_chip": _BATCH.value or None}


def _compiler_options() -> dict[str, str]:
    options = {}
    for item in _OPTIONS.value:
        name, equals, value = item.partition("=")
        if not equals:
            raise InputError(f"--compiler_options: {item!r} has no value; write name=value")
        options[name] = value
    return options


def _search(config, console) -> None:
    topology = topologies.find(_TOPOLOGY.value)
    if not topology.is_tpu:
        raise InputError(f"--search compiles, and there is no compiler for {topology.chip.name} here; name a TPU slice")
    status = rich_console.Console(stderr=True)
    found = plan_search.search(
        config,
        topology,
        limit=_LIMIT.value,
        options=_compiler_options(),
        progress=lambda line: status.print(line, markup=False, highlight=False, soft_wrap=True),
        **_wanted(),
    )
    if _JSON.value:
        rows = [
            {"options": dict(one.candidate.changes), "plan": one.plan and one.plan.as_dict(), "word": one.word}
            for one in found
        ]
        print(json.dumps(rows, indent=2))
    else:
        console.print(plan_tables.ranking([(one.candidate.options(), one.plan, one.word) for one in found]))


if __name__ == "__main__":
    programs.run(main)
