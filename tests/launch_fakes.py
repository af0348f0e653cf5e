"""Stand-ins for gcloud, kubectl, xpk, sbatch and others: they note how they are called and answer as they are told.

A launcher sees them and the system's plain tools, and nothing else: no test can reach a real cloud or cluster.
"""

import os
import pathlib
import re
import shlex
import shutil
import subprocess
from collections.abc import Sequence

ROOT = pathlib.Path(__file__).resolve().parent.parent
PLAIN = (
    "awk", "basename", "bash", "cat", "chmod", "cksum", "cp", "cut", "date", "dirname", "env", "find", "git", "grep",
    "gzip", "head", "mkdir", "mv", "rm", "sed", "seq", "sort", "tail", "tar", "tee", "touch", "tr", "uname",
)  # fmt: skip
FAKED = ("gcloud", "kubectl", "xpk", "sbatch", "squeue", "srun", "scancel", "scontrol", "docker", "sleep", "helm")

# In bash, for it starts in a tenth of Python's time. A record of the log is the words of a call and what was piped in,
# in one write, for calls are made side by side.
_FAKE = r"""#!/bin/bash
folder=@FOLDER@
piped=
[[ "$*" != *"-f -" ]] || piped=$(/bin/cat)
printf -v words '%s\x1f' "${0##*/}" "$@"
printf '%s%s\x1e' "$words" "$piped" >> "$folder/calls"
line="${0##*/} $*"
for pattern in "$folder"/answers/*/pattern; do
  [ -e "$pattern" ] || exit 0
  expression=$(< "$pattern")
  [[ "$line" =~ $expression ]] || continue
  cd "${pattern%/pattern}"
  count=$(($(< count) + 1))
  [ -e "$count" ] || count=$((count - 1))
  echo "$count" > count
  { read -r status; text=$(/bin/cat); } < "$count"
  if [ "$status" = 0 ]; then printf '%s\n' "$text"; else printf '%s\n' "$text" >&2; fi
  exit "$status"
done
"""

Answer = tuple[int, str]


class Machine:
    """A home folder, a checkout of its own and a PATH with fakes; `run` starts a launcher there."""

    def __init__(self, folder: pathlib.Path, checkout: pathlib.Path, *, without: Sequence[str] = ()):
        self.folder, self.checkout = folder, checkout
        (folder / "bin").mkdir(parents=True)
        (folder / "home").mkdir()
        for name in PLAIN:
            found = shutil.which(name)
            assert found, f"this system has no {name}"
            (folder / "bin" / name).symlink_to(found)
        for name in set(FAKED) - set(without):
            fake = folder / "bin" / name
            fake.write_text(_FAKE.replace("@FOLDER@", shlex.quote(str(folder))))
            fake.chmod(0o755)
        self.answer()

    def answer(self, *answers: tuple[str, Sequence[Answer]]) -> None:
        """Sets what calls print: (pattern of the whole call, [(exit status, text), …]), the last one for ever."""
        shutil.rmtree(self.folder / "answers", ignore_errors=True)
        for number, (pattern, texts) in enumerate(answers):
            place = self.folder / "answers" / f"{number:02}"
            place.mkdir(parents=True)
            (place / "pattern").write_text(pattern)
            (place / "count").write_text("0")
            for count, (status, text) in enumerate(texts, 1):
                (place / str(count)).write_text(f"{status}\n{text}\n")

    def run(self, *command: str, **environment: str) -> subprocess.CompletedProcess:
        """Runs `launch/SCRIPT.sh …`, or another command, in the checkout."""
        plain = {"PATH": str(self.folder / "bin"), "HOME": str(self.folder / "home"), "USER": "somebody"}
        return subprocess.run(
            ["bash", *command] if command[0].endswith(".sh") else command,
            cwd=self.checkout,
            env=plain | environment,
            capture_output=True,
            text=True,
            timeout=120,
            stdin=subprocess.DEVNULL,
        )

    @property
    def calls(self) -> list[list[str]]:
        """Every call of a fake, in order, each the list of its words."""
        return [call for call, _ in self._logged()]

    @property
    def manifests(self) -> list[str]:
        """What was piped into `kubectl … -f -`."""
        return [piped for _, piped in self._logged() if piped]

    def _logged(self) -> list[tuple[list[str], str]]:
        log = self.folder / "calls"
        records = [record.split("\x1f") for record in log.read_text().split("\x1e")[:-1]] if log.exists() else []
        return [(words, piped) for *words, piped in records]

    def verbs(self, *known: str) -> list[str]:
        """The calls in short: of each, the first pattern of `known` that it matches; none, and it is left out."""
        lines = [" ".join(call) for call in self.calls]
        found = (next((word for word in known if re.search(word, line)), "") for line in lines)
        return [word for word in found if word]


def make_checkout(folder: pathlib.Path) -> pathlib.Path:
    """A checkout with the launchers and configs of this one, and programs that are only names."""
    shutil.copytree(ROOT / "launch", folder / "launch")
    shutil.copytree(ROOT / "configs", folder / "configs", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "unclip_jax").mkdir()
    programs = {path.name for path in (ROOT / "unclip_jax").glob("*.py")} | {"evaluate.py"}
    for name in programs:
        (folder / "unclip_jax" / name).touch()
    environment = {**os.environ, "GIT_CONFIG_GLOBAL": "/dev/null", "GIT_CONFIG_SYSTEM": "/dev/null"}
    for command in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "--message=a checkout"]):
        git = ["git", "-c", "user.name=Somebody", "-c", "user.email=somebody@example.com", *command]
        subprocess.run(git, cwd=folder, check=True, env=environment, capture_output=True)
    return folder


def commands(text: str) -> list[list[str]]:
    """The commands of a dry run, as a shell reads them."""
    lines = text.replace("\\\n", " ").splitlines()
    return [shlex.split(line) for line in lines if line and not line.startswith("#")]
