"""Writes a report: one HTML page with everything it shows inside, and a summary in the terminal.

    python -m unclip_jax.report --workdir=runs/decoder

The folder may be a training run's (curves, pictures, where its time went), one that holds several runs, or a
quickstart's. It trains nothing, and a run that goes on is not disturbed.
"""

import pathlib
import sys
from collections.abc import Sequence

import rich.console
from absl import flags
from etils import epath

from unclip_jax import programs, quickstart_report, run_report
from unclip_jax.errors import InputError


def write(workdir: epath.PathLike, out: epath.PathLike = "") -> tuple[epath.Path, list[run_report.Run]]:
    """Writes a folder's page; returns its path and the runs it tells of, none for a quickstart.

    Raises:
      InputError: the folder is none of a run, or the page cannot be written.
    """
    folder = epath.Path(workdir).expanduser()
    path = epath.Path(out).expanduser() if out else folder / "report.html"
    if (folder / "report.json").exists():
        page = quickstart_report.write(pathlib.Path(folder))
        if out:
            _save(path, page.read_text(encoding="utf-8"))
        return path, []
    runs = run_report.find(folder)
    _save(path, run_report.render(runs, title=folder.resolve().name))
    return path, runs


def _save(path: epath.Path, page: str) -> None:
    try:
        path.write_text(page)
    except OSError as error:
        raise InputError(f"the page cannot be written: {error}; give another --out=FILE") from error


def define_flags() -> None:
    """Defines the program's flags; only where it is the program, for others have flags of the same names."""
    flags.DEFINE_string("workdir", "runs/quickstart", "Folder of a run, of several runs, or of a quickstart.")
    flags.DEFINE_string("out", "", "Where the page goes; by default report.html in the folder.")


def main(argv: Sequence[str]) -> int:
    del argv
    path, runs = write(flags.FLAGS.workdir, flags.FLAGS.out)
    console = rich.console.Console(file=sys.stdout)
    for table in run_report.tables(runs) if runs else ():
        console.print(table)
    for run in runs:
        for warning in run_report.warnings(run):
            console.print(f"{run.workdir.name}: {warning['title']}", style="yellow", markup=False, highlight=False)
    print(path)
    return programs.DONE


if __name__ == "__main__":
    define_flags()
    programs.run(main)
