"""Every command of launch/README.md runs: launchers as a dry run, the rest against stand-ins; what it names exists."""

import re
import shlex
import shutil

import pytest
from launch_fakes import ROOT, Machine

SCRIPTS = ("tpu_vm", "queued_resource", "jobset", "xpk", "slurm", "stages", "image")
README = (ROOT / "launch" / "README.md").read_text()
BLOCKS = re.findall(r"^```bash\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
COMMANDS = [line for block in BLOCKS for line in block.replace("\\\n", " ").splitlines() if line]
ELSEWHERE = ("python", "python3", "ssh-add")  # what the page runs besides launchers and the fakes of every test


def test_the_page_has_commands_for_every_launcher():
    words = {word for line in COMMANDS for word in line.split() if word.startswith("./launch/")}
    named = {word.removeprefix("./launch/") for word in words}
    scripts = {f"{name}.sh" for name in SCRIPTS}
    assert scripts <= named and scripts == set(re.findall(r"^\| `(\w+\.sh)`", README, re.MULTILINE))


@pytest.mark.parametrize("line", COMMANDS, ids=lambda line: re.sub(r"\s+", " ", line)[:60])
def test_every_command_of_the_page_runs(machine, line):
    for name in ELSEWHERE:
        shutil.copy(machine.folder / "bin" / "docker", machine.folder / "bin" / name)
    words = [word.replace("~", str(machine.folder / "home")) for word in shlex.split(line)]
    if words[0].startswith("./launch/"):
        dry = machine.run(words[0].removeprefix("./"), "--dry-run", *words[1:])
        assert dry.returncode == 0, dry.stderr
        assert dry.stdout and machine.calls == []
    elif words[0].startswith(".venv/"):
        assert words[1:3] == ["-m", "pip"]
        assert words[-1] == ".[cuda12]" and '"cuda12"' in (ROOT / "setup.py").read_text()
    else:
        assert machine.run(*words).returncode == 0
        assert machine.calls == [words], "the page runs a tool that these tests do not know"


def test_programs_and_files_that_the_page_names_exist():
    for name in re.findall(r"python -m unclip_jax\.(\w+)", README):
        assert name == "PROGRAM" or (ROOT / "unclip_jax" / f"{name}.py").exists(), name
    for path in re.findall(r"\]\((\.\./[^)#]+)", README):
        assert (ROOT / "launch" / path).exists(), path


def test_one_place_is_meant_throughout():
    """Zone, region and bucket of the page agree, so that nobody copies a command that costs egress."""
    assert set(re.findall(r"--zone=(\S+)", README)) == {"us-east5-a"}
    assert set(re.findall(r"--location=(\S+)", README)) == {"us-east5"}
    assert set(re.findall(r"gs://([a-z-]+)", README)) == {"my-bucket"}


def test_a_machine_without_the_real_tools_is_what_they_see(machine: Machine):
    """The stand-ins are all that launchers can reach: nothing else of these names is on their PATH."""
    found = machine.run("bash", "-c", "type -P gcloud kubectl xpk docker sbatch").stdout.split()
    assert found == [str(machine.folder / "bin" / name) for name in ("gcloud", "kubectl", "xpk", "docker", "sbatch")]


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_option_is_in_the_help_and_the_command_of_the_header_is_accepted(machine, script):
    text = (ROOT / "launch" / f"{script}.sh").read_text()
    sourced = [(ROOT / path).read_text() for path in re.findall(r"^\. (launch/\S+)", text, re.MULTILINE)]
    done = machine.run(f"launch/{script}.sh", "--help")
    shown = set(re.findall(r"^  --([a-z0-9-]+)", done.stdout, re.MULTILINE))
    define = re.compile(r'^ *define(?:_flag)? "?([a-z-]+)"? ', re.MULTILINE)
    declared = {name for each in (text, *sourced) for name in define.findall(each)}
    used = set(re.findall(r"\$\{option\[([a-z-]+)\]", text))
    assert done.returncode == 0 and used and used | declared <= shown
    assert not re.search(r"^  --\S+ +$", done.stdout, re.MULTILINE), "an option without a text"
    (command,) = re.findall(r"^#   \./((?:.*\\\n)*.*)", text, re.MULTILINE)
    words = shlex.split(command.replace("\\\n#", " "))
    dry = machine.run(words[0], "--dry-run", *words[1:])
    assert dry.returncode == 0, dry.stderr
    assert machine.calls == []
