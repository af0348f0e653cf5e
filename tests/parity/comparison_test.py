"""The measure itself: it passes what is near, refuses what is not, and says where."""

import json
import subprocess
import sys

import numpy as np
import pytest
from parity import comparison, table

ONES = np.ones(4)


@pytest.fixture(autouse=True)
def noted(monkeypatch, tmp_path):
    """The file of notes: of these tests, not of the run."""
    path = tmp_path / "lines"
    monkeypatch.setenv(table.TABLE, str(path))
    return path


def test_differences_are_absolute_or_relative_to_their_tensor(noted):
    comparison.agree("m", "s", "forward", ONES + 1e-5, ONES, 2e-5)
    theirs = {"small": np.array([1e-6, 0.0]), "large": np.array([1e6, 1.0])}
    ours = {"small": np.array([1e-6, 5e-11]), "large": np.array([1e6 + 20, 1.0])}
    comparison.agree("m", "s", "gradient", ours, theirs, 1e-4)
    lines = [json.loads(line) for line in noted.read_text().splitlines()]
    assert [line["quantity"] for line in lines] == ["forward", "gradient"]
    np.testing.assert_allclose([line["difference"] for line in lines], [1e-5, 5e-5], rtol=1e-5)


@pytest.mark.parametrize(
    "ours, theirs, said",
    [
        ({"a": ONES, "b": ONES + 3e-5}, {"a": ONES, "b": ONES}, "of b is off by 3e-05"),
        ({"a": ONES * np.nan, "b": ONES + 1}, {"a": ONES, "b": ONES}, "of a is off by nan"),
        (ONES, ONES[:2], "shape"),
        ({"a": ONES}, {"b": ONES}, "only on one side"),
        (ONES * 0, ONES * 0, "no measure"),
        (ONES * 1e-3, ONES * 1e-3, "size about 1"),
    ],
)
def test_what_differs_is_named(ours, theirs, said):
    with pytest.raises(AssertionError, match=said):
        comparison.agree("m", "s", "forward", ours, theirs, 2e-5)


def test_table_has_the_largest_of_each_row():
    lines = [
        {"module": "b", "size": "1", "quantity": "forward", "difference": 1e-6, "bound": 1},
        {"module": "a", "size": "2", "quantity": "forward", "difference": 2e-6, "bound": 1},
        {"module": "a", "size": "2", "quantity": "gradient", "difference": 4e-5, "bound": 1},
        {"module": "a", "size": "2", "quantity": "forward", "difference": 3e-6, "bound": 1},
    ]
    assert table.markdown(lines).splitlines()[2:] == ["| a | 2 | 3.0e-06 | 4.0e-05 |", "| b | 1 | 1.0e-06 |  |"]


def test_the_command_runs_pytest_and_passes_its_status_on():
    command = [sys.executable, table.__file__, "--collect-only", "-k", "no_test_has_this_name"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 5 and done.stdout.startswith("| module | size |")  # pytest's status for no tests
