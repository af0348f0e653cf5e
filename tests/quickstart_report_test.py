"""The quickstart's report: its numbers are those of the figures, and it needs nothing beside it."""

import base64
import html.parser
import io
import json
import math
import pathlib

import numpy as np
import pytest
from PIL import Image

from unclip_jax import captioned_grid, pages
from unclip_jax import quickstart_report as report
from unclip_jax.errors import InputError

CAPTION = "a <small> red star & more"
RATES = {"n": 96, "colour": 0.875, "shape": 0.75, "both": 0.625, "count": 1.0, "background": 1.0, "all": 0.5}


def _scores(value):
    single = {**RATES, "both": value}
    two = {**single, "relation": 0.25}
    chance = {**dict.fromkeys(RATES, 0.125), "relation": 0.25}
    return {"single": single, "two": two, "shuffled": {"single": chance, "two": chance}}


@pytest.fixture
def workdir(tmp_path):
    """A folder as the quickstart leaves it."""
    for name, side in (("render", 64), ("a", 64), ("b", 16), ("c", 32)):
        Image.fromarray(np.full((side, side, 3), 200, np.uint8)).save(tmp_path / f"{name}.png")
    drawn = {"image": "a.png", "decoder": "b.png", "upsampler_1": "c.png", "reads": "red <star>", "right": True}
    images = {name: drawn for name in ("diffusion", "ar", "none")}
    images["render"] = {"image": "render.png", "reads": "red star", "right": False}
    stage = {
        "stage": "clip", "steps": 4, "batch_size": 8, "seconds": 100.0, "config": {"stage": "clip"},
        "curve": {"step": [2, 4], "loss": [20.0, 1.0], "smoothed": [20.0, 10.0]},
        "evaluations": [{"step": 4, "loss": 2.5, "cosine": 0.75}],
    }  # fmt: skip
    figures = {
        "accuracy": {"validation": {name: _scores(share) for name, share in
                                    (("diffusion", 0.625), ("ar", 0.5), ("none", 0.375), ("render", 1.0))}},
        "goal": {"colour": 0.85, "shape": 0.7, "both": 0.6}, "side": 64, "oracle": {"single": RATES},
        "examples": [{"caption": CAPTION, "split": "validation", "kind": "single", "images": images}],
        "stages": dict.fromkeys(report.STAGES, stage), "scoring_seconds": 2.0,
        "sampling": {"decoder": {"images": 10, "seconds": 5.0, "compile_seconds": 3.0}},
        "machine": {"processor": "test", "cores": 2, "system": "x"}, "versions": {"jax": "0"},
        "variant": "tiny", "smoke": False, "seed": 0, "seconds": {"clip": 100.0, "samples": 4.0, "all": 754.0},
    }  # fmt: skip
    (tmp_path / "report.json").write_text(json.dumps(figures))
    return tmp_path


class _Page(html.parser.HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.links, self.text, self.open = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.links += [(tag, value) for name, value in attributes if name in ("src", "href", "srcset", "poster")]
        if tag not in ("meta", "img", "br", "link", "input", "hr"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_the_page_holds_all_it_shows(workdir):
    text = report.write(workdir).read_text()
    page = _Page(text)
    assert not page.open
    assert len(page.links) == 4 + 1  # four sources of one caption, and the curves
    for tag, link in page.links:
        assert tag == "img"
        kind, _, content = link.partition(",")
        assert kind == "data:image/png;base64"
        Image.open(io.BytesIO(base64.b64decode(content))).verify()
    assert "url(" not in text and "@import" not in text and "<script" not in text


def test_text_from_outside_is_escaped(workdir):
    words = " ".join(_Page(report.write(workdir).read_text()).text)
    assert CAPTION in words and "red <star>" in words


def test_shares_chance_and_times_are_on_the_page(workdir):
    words = " ".join(" ".join(_Page(report.write(workdir).read_text()).text).split())
    assert "goal 85% · chance 12%" in words  # 0.125, to even
    assert "12 min 34 s" in words
    assert "One object, kinds of objects seen in training (96 captions)" in words
    assert "chance (captions shuffled)" in words
    assert "cosine 0.75" in words


def test_grids_are_as_large_as_their_rows(workdir):
    report.write(workdir)
    assert {path.name for path in workdir.glob("*.png")} >= {
        "samples.png", "samples-diffusion.png", "samples-ar.png", "samples-none.png", "curves.png"
    }  # fmt: skip
    with Image.open(workdir / "samples.png") as four, Image.open(workdir / "samples-ar.png") as three:
        assert four.width - three.width == 128 + 6


@pytest.mark.parametrize("content", [None, "{", "{}"])
def test_a_report_json_that_is_not_there_or_not_whole_is_named(tmp_path, content):
    if content is not None:
        (tmp_path / "report.json").write_text(content)
    with pytest.raises(InputError, match="report.json .*quickstart"):
        report.write(tmp_path)


def test_intervals_cover_the_true_share():
    # Of all outcomes of 60 throws, those whose interval covers the truth have about 95% of the probability.
    n = 60
    for truth in (0.03, 0.3, 0.5, 0.9):
        covered = 0.0
        for hits in range(n + 1):
            share = hits / n
            centre = (hits + 1.96**2 / 2) / (n + 1.96**2)
            if abs(centre - truth) <= report.interval(share, n):
                covered += math.comb(n, hits) * truth**hits * (1 - truth) ** (n - hits)
        assert 0.93 < covered < 0.995


@pytest.mark.parametrize("seconds, words", [(3.25, "3.2 s"), (48, "48 s"), (200, "3 min 20 s"), (3661, "61 min 01 s"),
                                            (18_130, "5 h 02 min"), (273_600, "3 d 04 h")])
def test_durations_are_written_as_people_write_them(seconds, words):
    assert pages.duration(seconds) == words


def test_captions_are_wrapped_beside_their_images():
    image = np.zeros((64, 64, 3), np.uint8)
    one = captioned_grid.draw(["word"], [[image]])
    long = captioned_grid.draw(["word " * 60], [[image]])
    assert one.shape == long.shape
    left = slice(0, one.shape[1] - 96 - 16)
    assert (one[:, left] < 128).sum() < (long[:, left] < 128).sum()
    # Black pixels of the image stand where it was pasted, and nothing but paper is between it and the words.
    assert (long[10:106, -(96 + 16) : -16] == 0).all()
    assert (long[:, -(96 + 16) - 12 : -(96 + 16)] == 255).all()


def test_the_committed_template_is_found_by_an_installed_package():
    assert (pathlib.Path(report.__file__).parent / "templates" / "quickstart.html").is_file()
