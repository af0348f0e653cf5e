"""The report of runs: what is in the folder is on the page, whatever state it is in, and nothing else is needed."""

import base64
import datetime
import html.parser
import io
import json
import math
import xml.etree.ElementTree

import numpy as np
import pytest
from absl import flags
from goodput_test import THREE
from PIL import Image

from unclip_jax import goodput_sums, report, run_curves, run_report
from unclip_jax.errors import InputError

NASTY = "<script>alert('a & b')</script>"


class Page(html.parser.HTMLParser):
    """A page's words, and what its tags refer to; fails where tags do not close as they were opened."""

    def __init__(self, text):
        super().__init__()
        self.links, self.words, self.open = [], [], []
        self.feed(text)
        assert not self.open
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attributes):
        self.links += [value for name, value in attributes if name in ("src", "href", "srcset", "poster", "data")]
        if tag not in ("meta", "img", "br", "link", "input", "hr"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def write_run(folder, *, stage="clip", pictures=1):
    """A run's folder as training leaves it, with a last row that is half written."""
    folder.mkdir(parents=True)
    config = {"stage": stage, "batch_size": 16, "total_steps": 40, "note": NASTY}
    (folder / "config.json").write_text(json.dumps(config))
    lines = [
        {"step": step, "loss": 4.0 / step, "mean/loss": 5.0 / step, "grad_norm": 1.0, "mean/grad_norm": 2.0,
         "learning_rate": 0.1, "steps_per_second": 2.0, "skipped_steps": 3 * (step == 40), "streak": 0,
         "param_norm": 7.5, "seconds_left": "inf"}
        for step in range(2, 42, 2)
    ]  # fmt: skip
    lines += [{"step": 20, "evaluation/image_to_text_r1": 0.25}, {"step": 40, "evaluation/image_to_text_r1": 0.375}]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text + '{"step": 42, "lo')
    (folder / "goodput.jsonl").write_text("".join(json.dumps(line) + "\n" for line in THREE) + '{"run": 3')
    (folder / "pictures").mkdir()
    for number in range(pictures):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(folder / "pictures" / f"samples-{number + 1:08d}.png")
    return folder


def page_of(folder):
    path, _ = report.write(folder)
    return Page(path.read_text())


def test_a_run_is_on_its_page_and_the_page_needs_nothing_else(tmp_path):
    folder = write_run(tmp_path / "run")
    (folder / "pictures" / "samples-00000099.png").write_bytes(b"half a picture")
    text = report.write(folder)[0].read_text()
    page = Page(text)
    for words in (
        "Stage clip", "batch size 16", "on ? × ?", "of 40", "0.125", "image to text r1 0.375", "32", "step 1",
        "3 steps were skipped", "13 steps were done again", "43.6%", "2 min 36 s", "of 2 min 36 s went into",
        "start began lasted from step to step devices ended", "1 2026-11-21 12:00:00 UTC 60 s 0 30 4 × ? killed",
        "3 2026-11-21 12:01:45 UTC 51 s 22 40 ? × ? done",
    ):  # fmt: skip
        assert words in page.text, words
    # Four curves of training, one of evaluation, one of the norm of the weights, one timeline, one picture.
    assert len(page.links) == 4 + 1 + 1 + 1 + 1
    for link in page.links:
        kind, _, content = link.partition(",")
        raw = base64.b64decode(content)
        if kind == "data:image/png;base64":
            Image.open(io.BytesIO(raw)).verify()
            continue
        assert kind == "data:image/svg+xml;base64"
        drawing = xml.etree.ElementTree.fromstring(raw)
        assert drawing.tag.endswith("svg")
        referred = [value for node in drawing.iter() for name, value in node.attrib.items() if name.endswith("href")]
        assert all(value.startswith("#") for value in referred)
    assert "url(" not in text and "@import" not in text and "<script" not in text and "http" not in text


def test_words_from_outside_are_escaped(tmp_path):
    folder = write_run(tmp_path / "a<b>&c", stage=NASTY)
    (folder / "failures").mkdir()
    (folder / "failures" / "2.txt").write_text("x" * 50_000 + f"\nhung in next(): {NASTY}\n")
    with (folder / "goodput.jsonl").open("a") as file:
        file.write("\n" + json.dumps(THREE[-1] | {"how": NASTY, "run": 4}) + "\n")
        changed = {"run": 4, "kind": "start", "changed": {"optim.<b>": ["'old'", NASTY]}, "device": NASTY}
        file.write(json.dumps(THREE[0] | changed) + "\n")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write("\n" + json.dumps({"step": 40, f"evaluation/{NASTY}": 1.0}) + "\n")
    Image.new("RGB", (8, 8)).save(folder / "pictures" / "<b>&-00000007.png")
    text = report.write(folder)[0].read_text()
    assert NASTY not in text and "<b>&" not in text and "<script" not in text
    page = Page(text)
    for words in (
        "a<b>&c", f"Stage {NASTY}", "what host 2 failed of …", f"hung in next(): {NASTY}", f"start 4 failed: {NASTY}",
        f"optim.<b> 'old' {NASTY}", f"4 × {NASTY}", f'"note": "{NASTY}"', "<b>&",
    ):  # fmt: skip
        assert words in page.text, words
    assert len(text) < 2_000_000


def test_damaged_checkpoints_and_other_hosts_are_named(tmp_path):
    folder = write_run(tmp_path / "run")
    (folder / "checkpoints" / "damaged-12-0").mkdir(parents=True)
    slow = [row | {"host": 1, "seconds": 40.0} if row["kind"] == "data" else row for row in THREE]
    (folder / "goodput-1.jsonl").write_text("".join(json.dumps(row) + "\n" for row in slow))
    page = page_of(folder)
    assert "damaged checkpoints were passed over: damaged-12-0" in page.text
    assert "1 40 s 23.0%" in page.text  # of 129 s + 38 s of rows and 7 s between starts


def test_a_folder_of_runs_has_them_all_with_links(tmp_path):
    for name in ("clip", "decoder"):
        write_run(tmp_path / "runs" / name, stage=name)
    (tmp_path / "runs" / "notes").mkdir()
    path, runs = report.write(tmp_path / "runs", tmp_path / "out.html")
    assert path == tmp_path / "out.html" and not (tmp_path / "runs" / "report.html").exists()
    assert [run.workdir.name for run in runs] == ["clip", "decoder"]
    text = path.read_text()
    page = Page(text)
    assert [link for link in page.links if link.startswith("#")] == ["#run-1", "#run-2"]
    assert text.count('<section id="run-') == 2
    assert "clip clip done 40 of 40 0.125 43.6% 2 min 36 s 1 decoder decoder done" in page.text


def test_a_run_that_has_just_begun_has_a_page(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("")
    (tmp_path / "goodput.jsonl").write_text(json.dumps(THREE[0]) + "\n")
    page = page_of(tmp_path)
    assert "No step has been reported yet" in page.text and "state killed 1 start" in page.text


def test_a_run_that_goes_on_is_told_from_one_that_fell_silent(tmp_path):
    folder = write_run(tmp_path / "run")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write("\n" + json.dumps({"step": 41, "loss": 1.0, "seconds_left": 12_345.0}) + "\n")
    for age, words in ((20, "state running 4 starts"), (3600, "state killed 4 starts")):
        began = datetime.datetime.now(datetime.UTC) - datetime.timedelta(seconds=age + 30)
        alive = THREE[1] | {"run": 4, "began": began.isoformat(), "seconds": 30.0}
        (folder / "goodput.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*THREE, alive]))
        page = page_of(folder)
        assert words in page.text
        assert ("of 40 · 3 h 25 min left" in page.text) == (age == 20)


def test_a_run_from_before_goodput_has_a_page(tmp_path):
    folder = write_run(tmp_path / "run")
    (folder / "goodput.jsonl").unlink()
    page = page_of(folder)
    assert "done there is no goodput.jsonl" in page.text and "Where the time went" not in page.text


def test_a_wrong_folder_is_one_sentence(tmp_path):
    with pytest.raises(InputError, match="nowhere does not exist; give the folder of"):
        report.write(tmp_path / "nowhere")
    with pytest.raises(InputError, match="holds neither metrics.jsonl of a training run"):
        report.write(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"epoch": 3}\n')
    with pytest.raises(InputError, match="is not the folder of a training run"):
        report.write(tmp_path)
    with pytest.raises(InputError, match="cannot be written.*--out"):
        report.write(write_run(tmp_path / "run"), tmp_path / "no" / "such" / "folder.html")
    assert not (tmp_path / "report.html").exists()


def test_many_steps_are_thinned_and_no_peak_is_lost():
    values = np.random.default_rng(0).normal(size=100_000)
    values[61_803], values[27_182] = 40.0, -50.0
    points = [(3 * i, float(value)) for i, value in enumerate(values)]
    thin = run_curves.thinned(points, 500)
    assert len(thin) <= 500 and set(thin) <= set(points) and thin == sorted(thin)
    assert {points[0], points[-1], (3 * 61_803, 40.0), (3 * 27_182, -50.0)} <= set(thin)
    assert run_curves.thinned(points[:500], 500) == points[:500]


def test_pictures_are_the_first_the_last_and_some_between(tmp_path):
    folder = write_run(tmp_path / "run", pictures=40)
    (group,) = run_report.pictures(run_report.read(folder))
    steps = [picture["step"] for picture in group["shown"]]
    assert group["count"] == 40 and steps[0] == 1 and steps[-1] == 40 and len(steps) == 6
    assert max(np.diff(steps)) - min(np.diff(steps)) <= 1


def test_losses_that_are_not_finite_break_no_curve(tmp_path):
    folder = write_run(tmp_path / "run")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write("\n" + json.dumps({"step": 41, "loss": "inf", "mean/loss": "nan", "grad_norm": "nan"}) + "\n")
    run = run_report.read(folder)
    assert math.isinf(run.rows[41]["loss"])
    assert "the loss was not finite at step 41" in page_of(folder).text


def test_what_the_terminal_shows_adds_up(tmp_path, capsys):
    """The whole program: flags, page, tables."""
    folder = write_run(tmp_path / "run")
    values = flags.FlagValues()
    flags.DEFINE_string("workdir", str(folder), "", flag_values=values)
    flags.DEFINE_string("out", "", "", flag_values=values)
    values.mark_as_parsed()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report.flags, "FLAGS", values)
        assert report.main([]) == 0
    printed = capsys.readouterr().out
    assert "43.6%" in printed and str(folder / "report.html") in printed and "3 steps were skipped" in printed
    shares = [row["share"] for row in run_report.time_rows(goodput_sums.read(folder)[0])]
    assert sum(shares) == pytest.approx(1)
