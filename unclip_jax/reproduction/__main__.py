"""One experiment of `python -m unclip_jax.reproduce`, which trains what it needs and starts it:

    python -m unclip_jax.reproduction --workdir=runs/reproduction --models=runs/quickstart --experiment=prior

Exit codes: 0 done, 42 stopped by SIGTERM or Ctrl-C (cells that are made are kept; run it again), 1 error.
"""

import pathlib
from collections.abc import Sequence

from absl import flags

from unclip_jax import programs
from unclip_jax.ablation_cells import Plan
from unclip_jax.errors import InputError, nearest
from unclip_jax.reproduction import experiments
from unclip_jax.reproduction.studio import Studio
from unclip_jax.stopping import Stopping


def define_flags() -> None:
    """Defines the program's flags; only where it is the program, for others have flags of the same names."""
    flags.DEFINE_string("workdir", "runs/reproduction", "Folder of the plan and the results.")
    flags.DEFINE_string("models", "runs/quickstart", "Folder with the workdirs of the trained parts.")
    flags.DEFINE_string("experiment", "", "Which one.")
    flags.DEFINE_string("compile_cache", "~/.cache/unclip_jax", "Compiled programs, kept between runs; '' is off.")


def main(argv: Sequence[str]) -> int:
    del argv
    options = flags.FLAGS
    programs.start_logging()
    if options.experiment not in experiments.TABLE:
        raise InputError(f"--experiment={options.experiment}: {nearest(options.experiment, experiments.TABLE)}")
    stopping = Stopping()  # cells are written whole, so that no more than one is lost wherever it ends
    programs.start_jax(compile_cache=options.compile_cache)
    workdir, models = (pathlib.Path(folder).expanduser().absolute() for folder in (options.workdir, options.models))
    studio = Studio(workdir, models, Plan.read(workdir), stopping.now)
    record = experiments.run(studio, options.experiment)
    print(f"{record.title}: {record.verdict}")
    return programs.DONE


if __name__ == "__main__":
    define_flags()
    programs.run(main)
