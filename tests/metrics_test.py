"""Metrics: rows that survive kills bit for bit, weighted means, and what a person is shown."""

import io
import json
import logging
import math

import numpy as np
import pytest
from PIL import Image

from unclip_jax import metrics


def test_rows_come_back_bit_for_bit_and_a_steps_last_row_counts(tmp_path):
    values = [float(np.float32(x)) for x in np.random.default_rng(0).normal(size=50)] + [1e-45, 3.4e38]
    writer = metrics.Writer(tmp_path / "run")
    for step, value in enumerate(values):
        writer.scalars(step, {"loss": value, "other": 1.0})
    writer.scalars(3, {"loss": 0.1})
    writer.close()
    rows = metrics.read(tmp_path / "run")
    values[3] = 0.1
    assert [row["loss"].hex() for row in rows.values()] == [value.hex() for value in values]
    assert rows[3]["other"] == 1.0  # a later row adds to a step's row, as an evaluation's does


def test_numbers_that_json_lacks_come_back(tmp_path):
    writer = metrics.Writer(tmp_path)
    writer.scalars(1, {"a": math.nan, "b": math.inf, "c": -math.inf})
    writer.close()
    for line in (tmp_path / metrics.JSONL).read_text().splitlines():
        json.loads(line, parse_constant=lambda constant: pytest.fail(f"{constant} is not JSON"))
    row = metrics.read(tmp_path)[1]
    assert math.isnan(row["a"]) and row["b"] == math.inf and row["c"] == -math.inf


@pytest.mark.parametrize("lost", [1, 2, 10, 33])
def test_a_row_cut_short_is_left_out_and_does_not_spoil_the_next(tmp_path, lost):
    writer = metrics.Writer(tmp_path)
    for step in (1, 2, 3):
        writer.scalars(step, {"loss": step / 3, "grad_norm": 1.5})
    writer.close()
    path = tmp_path / metrics.JSONL
    path.write_bytes(path.read_bytes()[:-lost])
    whole = {1, 2, 3} if lost == 1 else {1, 2}
    assert set(metrics.read(tmp_path)) == whole
    writer = metrics.Writer(tmp_path)
    writer.scalars(3, {"loss": 1.0})
    writer.scalars(4, {"loss": 4 / 3})
    writer.close()
    rows = metrics.read(tmp_path)
    assert [row["loss"] for row in rows.values()] == [1 / 3, 2 / 3, 1.0, 4 / 3]


def test_a_workdir_without_metrics_has_none(tmp_path):
    assert metrics.read(tmp_path) == {}


def test_means_weight_pairs_by_their_counts():
    window = [
        {"loss": np.float32(1.0), "q": (np.float32(6.0), np.float32(3.0)), "never": (0.0, 0.0)},
        {"loss": np.float32(2.0), "q": (np.float32(0.0), np.float32(0.0)), "never": (0.0, 0.0)},
        {"loss": np.float32(6.0), "q": (np.float32(4.0), np.float32(1.0)), "never": (0.0, 0.0)},
    ]
    assert metrics.average(window) == {"loss": 3.0, "q": 2.5}


def test_pictures_are_png_files(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    writer = metrics.Writer(tmp_path)
    writer.picture(12, "samples", pixels)
    writer.close()
    with Image.open(tmp_path / "pictures" / "samples-00000012.png") as image:
        assert image.format == "PNG" and np.array_equal(np.asarray(image), pixels)


class _Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_is_one_live_line_on_a_terminal(monkeypatch):
    now = iter([100.0, 102.0, 104.0])
    monkeypatch.setattr(metrics.time, "monotonic", lambda: next(now))
    stream = _Terminal()
    progress = metrics.Progress("clip", start=10, total=100, examples_per_step=16, stream=stream)
    rates = progress.report(20, {"loss": 0.25})
    assert rates["steps_per_second"] == 5 and rates["seconds_left"] == 16
    assert rates["examples_per_second_per_device"] * metrics.jax.device_count() == pytest.approx(80)
    progress.report(30, {"loss": 0.125})
    progress.close()
    shown = stream.getvalue()
    assert shown.count("\r") == 2 and shown.count("\n") == 1
    assert "clip 20/100 (20%)  loss 0.25  80 examples/s  0:16 left" in shown


def test_progress_is_one_line_a_report_in_a_log(monkeypatch, caplog):
    now = iter([0.0, 1.0, 3601.0])
    monkeypatch.setattr(metrics.time, "monotonic", lambda: next(now))
    stream = io.StringIO()
    progress = metrics.Progress("clip", start=0, total=100, examples_per_step=1, stream=stream)
    with caplog.at_level(logging.INFO, "unclip_jax.metrics"):
        progress.report(0, {})  # nothing done yet: no rate, no division by it
        progress.report(50, {"loss": 1})
    progress.close()
    assert stream.getvalue() == ""
    first, second = (record.message for record in caplog.records)
    assert first.endswith("? left") and second.endswith("1:00:00 left")
