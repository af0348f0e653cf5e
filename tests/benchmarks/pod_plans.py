"""Plans every `:paper` stage on pods, and writes the table of docs/pods.md from the plans.

  python tests/benchmarks/pod_plans.py                                   all that has no plan yet, then the table
  python tests/benchmarks/pod_plans.py --only=decoder --topologies=v5p-512
  python tests/benchmarks/pod_plans.py --table                           only writes the table anew

Each plan is a process of its own, `python -m unclip_jax.plan … --json`, whose time and peak memory are taken down
beside what it says. Plans are kept in a folder, one JSON file each, so that the script goes on where it was stopped; a
plan whose command has changed is made anew. Paper-size plans take minutes and gigabytes each: one runs at a time.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import time
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "pods.md"
BEGIN, END = "<!-- plans: begin -->", "<!-- plans: end -->"

STAGES = {
    "clip": "clip.py:paper",
    "prior_ar": "prior_ar.py:paper",
    "prior_diffusion": "prior_diffusion.py:paper",
    "decoder": "decoder.py:paper",
    "upsampler_1": "upsampler.py:paper_1",
    "upsampler_2": "upsampler.py:paper_2",
}
TOPOLOGIES = ("v5p-512", "v6e-256", "v5e-256", "v4-512")
# Options besides. CLIP's embeddings come from `python -m unclip_jax.embed`, which a run of the paper's size makes once.
# Of transformers a full compilation takes two minutes; of U-Nets it takes too long.
OPTIONS = {
    "clip": ("--effort=full",),
    "prior_ar": ("--config.data.embeddings=auto", "--effort=full"),
    "prior_diffusion": ("--config.data.embeddings=auto", "--effort=full"),
    "decoder": ("--config.data.embeddings=auto",),
}


def command(stage: str, topology: str) -> list[str]:
    """Returns the arguments of the plan, as somebody would type them after `python`."""
    more = OPTIONS.get(stage, ())
    return ["-m", "unclip_jax.plan", f"--config=configs/{STAGES[stage]}", f"--topology={topology}", *more]


def make(arguments: list[str], file: pathlib.Path, *, limit: float) -> dict[str, Any]:
    """Runs one plan and keeps what it says; a plan that fails is kept with its error.

    Args:
      arguments: of `command`.
      file: where it is kept.
      limit: seconds until it is stopped.
    """
    began = time.monotonic()
    with open(file.with_suffix(".log"), "w") as log, open(file.with_suffix(".out"), "w+") as out:
        process = subprocess.Popen([sys.executable, *arguments, "--json"], cwd=ROOT, stdout=out, stderr=log)
        try:
            status, usage = wait(process, began + limit)
        except TimeoutError:
            process.kill()
            status, usage = wait(process, float("inf"))
        out.seek(0)
        said = out.read()
    kept: dict[str, Any] = {
        "command": " ".join(["python", *arguments]),
        "seconds": time.monotonic() - began,
        "plan": json.loads(said) if status == 0 else None,
        "error": "" if status == 0 else file.with_suffix(".log").read_text()[-2000:] or f"status {status}",
    }
    # The plan compiles in a process of its own: the larger of both is what a machine must have for one of them.
    peak = usage.ru_maxrss * 1024
    kept["peak_bytes"] = max(peak, kept["plan"]["host_peak_bytes"]) if kept["plan"] else peak
    file.write_text(json.dumps(kept, indent=1))
    file.with_suffix(".out").unlink()
    return kept


def wait(process: subprocess.Popen, deadline: float) -> tuple[int, Any]:
    """Returns a process's status and resources when it has ended; TimeoutError after the deadline."""
    while True:
        ended, status, usage = os.wait4(process.pid, os.WNOHANG)
        if ended:
            process.returncode = os.waitstatus_to_exitcode(status)
            return process.returncode, usage
        if time.monotonic() > deadline:
            raise TimeoutError
        time.sleep(0.5)


def row(stage: str, topology: str, kept: dict[str, Any] | None) -> list[str]:
    """Returns a row of the table."""
    if kept is None:
        return [stage, topology, *["not planned yet"], *[""] * 9]
    plan = kept["plan"]
    took = f"{kept['seconds'] / 60:.1f} min, {kept['peak_bytes'] / 1e9:.1f} GB"
    if plan is None:
        return [stage, topology, "no plan: " + kept["error"].strip().splitlines()[-1][:80], *[""] * 8, took]
    mesh = " x ".join(f"{axis} {size}" for axis, size in plan["mesh"].items() if size > 1)
    remat = ", ".join(sorted({str(value) for name, value in plan["remat"].items() if not name.startswith("clip.")}))
    step = plan["step_seconds_estimate"]
    parts = f" in {plan['accumulation']} parts" if plan["accumulation"] > 1 else ""
    return [
        stage,
        topology,
        mesh or "1 chip",
        f"{plan['batch_size']:,}{parts}",
        remat or "-",
        f"{plan['bytes_per_chip'] / 2**30:.1f} of {plan['hbm_per_chip'] / 2**30:.1f} GiB",
        f"{plan['headroom']:.0%}" if plan["fits"] else "**does not fit**",
        f"{plan['collectives'].get('all-to-all', {}).get('count', 0):.0f}",
        f"{1e3 * step:.4g} ms" if step else "-",
        f"{plan['mfu_estimate']:.0%}" if plan["mfu_estimate"] is not None else "-",
        f"{plan['days']:.2g}" if plan["days"] is not None else "-",
        took,
    ]


COLUMNS = ("stage", "slice", "mesh", "batch", "remat", "memory of a chip", "left", "all-to-alls", "step", "MFU", "days",
           "the plan took")  # fmt: skip


def table(folder: pathlib.Path) -> str:
    """Returns the Markdown table of all plans that are kept, and the commands that made them."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    commands = []
    for stage in STAGES:
        for topology in TOPOLOGIES:
            kept = load(folder / f"{stage}_{topology}.json")
            lines.append("| " + " | ".join(row(stage, topology, kept)) + " |")
            if kept:
                commands.append(kept["command"])
    return "\n".join([*lines, "", "The commands:", "", "```", *commands, "```"])


def load(file: pathlib.Path) -> dict[str, Any] | None:
    """Returns what was kept, None where there is nothing."""
    return json.loads(file.read_text()) if file.exists() else None


def write(page: pathlib.Path, text: str) -> None:
    """Replaces what stands between the markers of a page."""
    before, found, rest = page.read_text().partition(BEGIN)
    _, closed, after = rest.partition(END)
    if not found or not closed:
        raise SystemExit(f"{page} lacks the markers {BEGIN} and {END}")
    page.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=STAGES, default=list(STAGES), help="stages")
    parser.add_argument("--topologies", nargs="*", default=list(TOPOLOGIES), help="slices")
    parser.add_argument("--folder", type=pathlib.Path, default=ROOT / "runs" / "plans", help="where plans are kept")
    parser.add_argument("--limit", type=float, default=3600.0, help="seconds until a plan is stopped")
    parser.add_argument("--again", action="store_true", help="make plans that are there anew")
    parser.add_argument("--table", action="store_true", help="only write the table")
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    for stage in () if given.table else given.only:
        for topology in given.topologies:
            file = given.folder / f"{stage}_{topology}.json"
            arguments = command(stage, topology)
            kept = load(file)
            if kept and kept["command"] == " ".join(["python", *arguments]) and not kept["error"] and not given.again:
                continue
            print(f"{stage} on {topology} …", flush=True)
            kept = make(arguments, file, limit=given.limit)
            print("  " + "; ".join(row(stage, topology, kept)[2:]), flush=True)
    write(PAGE, table(given.folder))


if __name__ == "__main__":
    main()
