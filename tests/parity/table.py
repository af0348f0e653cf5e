"""Runs the tests of this folder and prints what they measured as a Markdown table.

  python tests/parity/table.py          arguments go to pytest: -n 4, -k prior
"""

import json
import os
import pathlib
import subprocess
import sys
import tempfile

FOLDER = pathlib.Path(__file__).resolve().parent
# Names the file to which `comparison.agree` adds a line of JSON at each call; unset, nothing is written.
TABLE = "UNCLIP_PARITY_TABLE"
COLUMNS = {"forward": "largest forward difference", "gradient": "largest relative gradient difference"}


def rows(lines: list[dict]) -> dict[tuple[str, str], dict[str, float]]:
    """The largest difference of each quantity, for each module and size, in alphabetical order."""
    found: dict[tuple[str, str], dict[str, float]] = {}
    for line in sorted(lines, key=lambda line: (line["module"], line["size"])):
        row = found.setdefault((line["module"], line["size"]), {})
        quantity = line["quantity"]
        row[quantity] = max(row.get(quantity, 0.0), line["difference"])
    return found


def markdown(lines: list[dict]) -> str:
    table = [f"| module | size | {' | '.join(COLUMNS.values())} |", "|---|---|---|---|"]
    for (module, size), row in rows(lines).items():
        cells = [f"{row[quantity]:.1e}" if quantity in row else "" for quantity in COLUMNS]
        table.append(f"| {module} | {size} | {' | '.join(cells)} |")
    return "\n".join(table)


def main(arguments: list[str]) -> int:
    """Returns pytest's exit status; the table goes to stdout, pytest's own words to stderr."""
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "lines.jsonl"
        path.touch()
        command = [sys.executable, "-m", "pytest", "-q", str(FOLDER), *arguments]
        status = subprocess.run(
            command, cwd=FOLDER.parents[1], env=os.environ | {TABLE: str(path)}, stdout=sys.stderr
        ).returncode
        print(markdown([json.loads(line) for line in path.read_text().splitlines()]))
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
