"""What every program does around its main: exit codes, sentences, logs. Each case is a process of its own."""

import subprocess
import sys

import pytest

PROGRAM = """
import sys
from absl import flags
from unclip_jax import programs
from unclip_jax.errors import InputError

flags.DEFINE_integer("size", 1, "A size.")

def main(argv):
    {body}

programs.run(main{options})
"""


def run(body: str, *arguments: str, options: str = "") -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", PROGRAM.format(body=body, options=options), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    ("body", "status"), [("return programs.DONE", 0), ("return None", 0), ("return programs.REQUEUE", 42)]
)
def test_what_main_returns_is_the_status(body, status):
    done = run(body)
    assert (done.returncode, done.stdout, done.stderr) == (status, "", "")


def test_bad_input_is_one_sentence_without_a_traceback():
    done = run('raise InputError("the picture is empty; give another")')
    assert (done.returncode, done.stderr) == (1, "error: the picture is empty; give another\n")


def test_a_bug_keeps_its_traceback():
    done = run('raise ValueError("a bug")')
    assert done.returncode == 1
    assert "Traceback" in done.stderr and "ValueError: a bug" in done.stderr


@pytest.mark.parametrize(
    ("argument", "says"),
    [("--sise=2", "size"), ("--size=two", "size"), ("two", "unexpected argument 'two'")],
)
def test_a_wrong_flag_is_bad_input(argument, says):
    done = run("return 0", argument)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ") and says in line


def test_flags_reach_main():
    assert run("print(flags.FLAGS.size)", "--size=3").stdout == "3\n"


def test_one_command_may_come_first():
    def asked(*arguments):
        return run("print(argv[1:], flags.FLAGS.size)", *arguments, options=', commands=("fit", "apply")')

    assert asked("apply", "--size=3").stdout == "['apply'] 3\n"
    assert asked().stdout == "[] 1\n"
    assert asked("aply").stderr == "error: there is no command 'aply'; did you mean 'apply'?\n"
    assert "unexpected argument 'more'" in asked("apply", "more").stderr


def test_the_log_has_this_package_and_of_libraries_only_warnings():
    body = "; ".join(
        [
            "import logging",
            "from absl import logging as absl_logging",
            "programs.start_logging()",
            'logging.getLogger("unclip_jax.part").info("ours")',
            'absl_logging.info("chatter")',
            'logging.getLogger("library").info("chatter")',
            'absl_logging.warning("mind this")',
        ]
    )
    done = run(body)
    assert done.returncode == 0
    assert done.stderr.count("ours") == 1 and "mind this" in done.stderr and "chatter" not in done.stderr
