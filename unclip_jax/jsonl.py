"""JSON lines that a killed process leaves behind: appended whole, and read although the last one may be cut short."""

import json
from collections.abc import Iterable, Mapping
from typing import Any

from etils import epath


def mend(path: epath.PathLike) -> None:
    """Ends a last line that a kill cut short, so that what is appended next does not join it."""
    path = epath.Path(path)
    if path.exists() and (content := path.read_bytes()) and not content.endswith(b"\n"):
        with path.open("a") as file:
            file.write("\n")


def append(path: epath.PathLike, rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes rows at the end of a file, in one piece, and closes it: what was appended is there after any kill."""
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    with epath.Path(path).open("a") as file:
        file.write(lines)


def read(path: epath.PathLike) -> list[dict[str, Any]]:
    """Returns the rows of a file, [] where there is none; lines that are no JSON object were cut short: left out."""
    path = epath.Path(path)
    if not path.exists():
        return []
    rows = []
    for line in path.read_bytes().decode(errors="replace").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows
