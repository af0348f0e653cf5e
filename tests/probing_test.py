"""What is measured of embeddings: ranks that were planted, components that give all back, words that stay in a picture,
attributes counted on scenes that are what they say; and the commands on networks that nobody trained."""

import json
import math
import pathlib
import subprocess
import sys
import types

import numpy as np
import pytest
import untrained_models
from PIL import Image

from unclip_jax import probe, unclip
from unclip_jax.data import scenes
from unclip_jax.errors import InputError
from unclip_jax.probing import binding, components, pictures, rank, typographic

ROOT = pathlib.Path(__file__).resolve().parent.parent


def planted(variances, *, n=400, d=24, seed=0):
    """Embeddings whose covariance has exactly these eigenvalues, the others 0, turned anyhow."""
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(n, len(variances)))
    rows = np.linalg.qr(rows - rows.mean(0))[0] * math.sqrt(n) * np.sqrt(variances)
    turned = np.linalg.qr(rng.normal(size=(d, d)))[0]
    return (rows @ turned[: len(variances)] + rng.normal(size=d)).astype(np.float32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for name in ("clip", "decoder"):
        untrained_models.write(folder, name)
    return folder


@pytest.fixture(scope="module")
def model(folder):
    return unclip.UnCLIP.load(str(folder), microbatch=8)


@pytest.mark.parametrize("dimensions", [1, 5, 12])
def test_a_planted_rank_comes_back(dimensions):
    found = rank.of(planted(np.ones(dimensions)))
    assert (found.numerical, found.components) == (dimensions, dimensions)
    assert found.effective == pytest.approx(dimensions, rel=1e-5)
    assert found.participation == pytest.approx(dimensions, rel=1e-5)


def test_a_spectrum_is_counted_by_hand():
    found = rank.of(planted([0.5, 0.3, 0.195, 0.004, 0.001]))
    assert (found.components, found.numerical) == (3, 5)  # three lose 0.5%, two 20%
    shares = (0.5, 0.3, 0.195, 0.004, 0.001)
    assert found.effective == pytest.approx(math.prod(share**-share for share in shares), rel=1e-4)
    assert found.participation == pytest.approx(1 / sum(share**2 for share in shares), rel=1e-4)
    assert rank.of(planted([0.5, 0.3, 0.195, 0.004, 0.001]), lost=0.3).components == 2
    with pytest.raises(InputError, match="all the same"):
        rank.of(np.ones((8, 4), np.float32))
    with pytest.raises(InputError, match="no share of the variance"):
        rank.of(planted([1.0]), lost=1.0)


def test_the_error_of_a_rank_is_its_spread_over_samples():
    rng = np.random.default_rng(0)
    scale = np.sqrt(np.linspace(1, 0.01, 6))
    several = [(rng.normal(size=(200, 6)) * scale).astype(np.float32) for _ in range(60)]
    spread = np.std([rank.of(z).effective for z in several], ddof=1)
    said = np.mean([rank.measured(z)["effective"].standard_error for z in several[:12]])
    assert 0.7 < said / spread < 1.4


def test_all_components_give_an_embedding_back_and_fewer_lose_the_last_eigenvalues():
    z = planted([1.0, 0.5, 0.2, 0.1, 0.05])
    fitted = components.fit([z[:150], z[150:]])
    np.testing.assert_allclose(components.rebuilt(fitted, z, 24), z, atol=2e-6)
    _, singular, axes = np.linalg.svd(z - z.mean(0, dtype=np.float64), full_matrices=False)
    for kept in (1, 3):
        made = components.rebuilt(fitted, z, kept)
        best = z.mean(0) + (z - z.mean(0)) @ axes[:kept].T @ axes[:kept]
        np.testing.assert_allclose(made, best, atol=1e-5)
        missing = np.square(z - made).sum(1)
        assert missing.mean() == pytest.approx((singular[kept:] ** 2).sum() / len(z), rel=1e-4)
        np.testing.assert_allclose(components.lost(fitted, z, kept), missing / np.square(z).sum(1), rtol=1e-4)
    unit = components.rebuilt(fitted, z, 2, unit=True)
    np.testing.assert_allclose(np.linalg.norm(unit, axis=1), 1, atol=1e-5)


def test_counts_are_the_papers_where_there_are_so_many_dimensions():
    assert components.counts(1024) == components.counts(320) == (20, 30, 40, 80, 120, 160, 200, 320)
    assert components.counts(64) == (4, 6, 8, 16, 24, 32, 40, 64)
    assert components.counts(2) == (1, 2)
    assert components.counts(64, (64, 3, 3)) == (3, 64)
    for asked in ((65,), (0,)):
        with pytest.raises(InputError, match=f"{asked[0]} components were asked for.* 1 to 64"):
            components.counts(64, asked)


def test_reconstructions_differ_by_the_embedding_alone(model):
    z_i = model.embed_images(np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8))
    fitted = components.fit([np.random.default_rng(1).normal(size=(40, 16)).astype(np.float32)])
    made = components.drawn(model, fitted, z_i, (2, 16), seed=3)
    assert made.shape == (2, 3, 16, 16, 3)
    # All components are all of z_i, drawn from the same noise; two are something else.
    assert np.abs(made[:, 1].astype(int) - made[:, 2]).max() <= 1
    assert (made[:, 0] != made[:, 2]).any()
    np.testing.assert_array_equal(made[1, 2], pictures.drawn(model, z_i[1:], seed=3, ids=[1])[0])


def test_zero_shot_is_the_softmax_of_scaled_cosines(model):
    z_i = np.array([[2.0, 0.0], [0.6, 0.8]], np.float32)  # of any length
    z_t = np.array([[1.0, 0.0], [0.0, 3.0], [-1.0, 0.0]], np.float32)
    cosines = [(1.0, 0.0, -1.0), (0.6, 0.8, -0.6)]
    by_hand = [[math.exp(5 * c) / sum(math.exp(5 * other) for other in row) for c in row] for row in cosines]
    np.testing.assert_allclose(typographic.zero_shot(z_i, z_t, scale=5.0), by_hand, rtol=1e-6)
    assert np.isfinite(typographic.zero_shot(z_i, z_t, scale=1e5)).all()


@pytest.mark.parametrize("centre", [(0.0, 0.0), (1.0, 1.0), (0.5, 0.02), (0.97, 0.5)])
def test_a_note_stays_in_the_picture_whole(centre):
    grey = np.full((48, 64, 3), 120, np.uint8)
    plain = typographic.written(grey, "pizza", width=0.7)
    moved = typographic.written(grey, "pizza", width=0.7, centre=centre)
    boxes = []
    for image in (plain, moved):
        rows, columns = np.nonzero((image != 120).any(-1))
        box = slice(rows.min(), rows.max() + 1), slice(columns.min(), columns.max() + 1)
        assert len(rows) >= 0.98 * image[box][..., 0].size and (image[box][[0, -1]] == 255).all()
        assert image[box].shape[1] <= 0.7 * 64
        boxes.append(image[box])
    np.testing.assert_array_equal(*boxes)  # the same note, with nothing cut off
    assert (boxes[0] < 60).all(-1).sum() > 20  # written in ink
    assert (grey == 120).all()


def test_words_that_cannot_be_written_are_refused():
    small = np.zeros((16, 16, 3), np.uint8)
    with pytest.raises(InputError, match="does not fit into"):
        typographic.written(small, "Granny Smith apples")
    with pytest.raises(InputError, match="nothing to write"):
        typographic.written(small, "  ")
    with pytest.raises(InputError, match="no share of the picture"):
        typographic.written(small, "i", width=1.5)


def test_an_attack_asks_clip_before_and_after(model):
    images = [np.random.default_rng(0).integers(0, 256, (40, 36, 3), np.uint8)]
    labels, templates = ("star", "ring", "heart"), ("a {}", "one {}")
    found = typographic.attack(model, images, "star", labels, templates=templates, samples=2, width=0.9)
    np.testing.assert_array_equal(found.attacked[0], typographic.written(found.pictures[0], "star", width=0.9))
    for odds in (found.before, found.after):
        np.testing.assert_allclose(odds.sum(1), 1, rtol=1e-12)
    assert (found.before != found.after).all()
    scale = typographic.logit_scale(model)
    weights = model.part("clip").params["params"]
    assert scale == pytest.approx(min(math.exp(float(weights["logit_scale"])), 100.0))
    texts = model.embed_text(["a star", "one star"])
    star = typographic.label_embeddings(model, ("star", "ring"), templates=("a {}", "one {}"))[0]
    np.testing.assert_allclose(star, texts.sum(0) / np.linalg.norm(texts.sum(0)), atol=1e-6)
    assert found.drawn_before.shape == (1, 2, 16, 16, 3)
    assert (found.drawn_before[0, 0] != found.drawn_before[0, 1]).any()


def exchanged(caption):
    """The caption with its two objects in each other's place."""
    said = scenes.parse_caption(caption)
    return scenes.caption(scenes.Description(said.kinds[::-1], said.relation, said.background))


def test_the_oracle_counts_scenes_as_what_they_are():
    given = binding.problems(40, seed=1)
    found = binding.counted(given.pictures, given.captions)
    assert found["bound"].mean() >= 0.95
    np.testing.assert_array_equal(found["present"], found["bound"] + found["mixed"])
    # The same pictures under captions with the objects exchanged: all there, nothing bound.
    wrong = binding.counted(given.pictures, [exchanged(caption) for caption in given.captions])
    assert wrong["mixed"].mean() >= 0.95 and not wrong["bound"].any()
    assert found["colours"].mean() >= 0.95 and not found["exchanged"].any()
    np.testing.assert_array_equal(wrong["exchanged"], wrong["colours"])
    # And without one of the two objects nothing is present.
    other = binding.problems(40, seed=2)
    apart = [set(a.split()) != set(b.split()) for a, b in zip(given.captions, other.captions, strict=True)]
    assert not binding.counted(other.pictures, given.captions)["present"][apart].any()


def test_problems_come_in_pairs_that_differ_in_binding_alone():
    given = binding.problems(24, seed=3)
    said = [scenes.parse_caption(caption) for caption in given.captions]
    alike = 0
    for one, two in zip(said[::2], said[1::2], strict=True):
        assert [kind.colour for kind in one.kinds] == [kind.colour for kind in two.kinds][::-1]
        assert [kind.shape for kind in one.kinds] == [kind.shape for kind in two.kinds]
        assert (one.relation, one.background) == (two.relation, two.background)
        alike += one.kinds[0].shape == one.kinds[1].shape
    assert alike == 6
    asked = binding.of_captions(["a red square above a blue square"] * 2)
    assert binding.counted(asked.pictures, asked.captions)["bound"].all()
    with pytest.raises(InputError, match="binding needs two"):
        binding.of_captions(["a red square"])
    with pytest.raises(InputError, match="need two colours"):
        binding.of_captions(["a red square above a red ring"])
    with pytest.raises(InputError, match="cannot be drawn: say the size and colour"):
        binding.of_captions(["a square above a blue square"])


def test_shares_average_draws_before_they_count_scenes():
    """Two draws of four scenes: 8 images, but 4 independent ones."""
    present = np.array([[1.0, 1, 0, 0], [1, 1, 1, 0]])
    mixed = np.array([[1.0, 0, 0, 0], [0, 0, 1, 0]])
    verdicts = [
        {"present": p, "mixed": m, "bound": p - m, "colours": p, "exchanged": 0 * p}
        for p, m in zip(present, mixed, strict=True)
    ]
    found = binding.shares(verdicts)
    by_scene = present.mean(0)
    assert found["present"].value == pytest.approx(5 / 8)
    assert found["present"].standard_error == pytest.approx(np.std(by_scene, ddof=1) / 2)
    assert found["mixed_of_present"].value == pytest.approx(2 / 5)
    assert found["exchanged_of_colours"] == (0, 0)
    nothing = binding.shares([{name: np.zeros(4) for name in binding.VERDICTS}])
    assert math.isnan(nothing["mixed_of_present"].value)


def options(folder, data_dir, out, **changes):
    values = {
        "models": str(folder), "out": str(out), "seed": 5, "batch_size": 8, "steps": None, "guidance_scale": None,
        "weights": "ema", "image": [], "pictures": 2, "data": "captioned_shapes", "data_dir": data_dir,
        "variant": "smoke", "split": "train", "examples": 64, "components": [], "text": "star",
        "width": 0.9,
        "labels": ["star", "ring"], "template": ["a {}"], "samples": 1, "caption": [], "scenes": 4, "seeds": 2,
        "prior": "none", "clip": [], "lost": 0.01,
    }  # fmt: skip
    return types.SimpleNamespace(**{**values, **changes})


def run(command, *arguments, **changes):
    return probe.COMMANDS[command][0](options(*arguments, **changes), lambda: None)


@pytest.mark.parametrize("command", list(probe.COMMANDS))
def test_each_command_leaves_numbers_and_a_sheet_with_its_seed(folder, model, data_dir, tmp_path, monkeypatch, command):
    asked = []
    # The models that are compiled already, whatever sampling is asked for.
    monkeypatch.setattr(unclip.UnCLIP, "load", lambda models, **how: asked.append(how) or model)
    run(command, folder, data_dir, tmp_path / "out")
    drawn = {"pca": {"decoder": {"method": "ddim", "eta": 0.0}}}.get(command, {"decoder": {}})
    assert [how.get("sampling", {"decoder": {}}) for how in asked] == [drawn]
    written = json.loads((tmp_path / "out" / "results.json").read_text())
    assert written["record"]["command"] == command
    if command == "rank":
        ((_, numbers),) = written["rank"].items()
        assert 1 <= numbers["effective"]["value"] <= 16 and numbers["components"]["value"] <= 16
    else:
        with Image.open(tmp_path / "out" / f"{command}-seed5.png") as sheet:
            assert sheet.text["seed"] == "5" and "trainedAlgorithmicMedia" in sheet.text["XML:com.adobe.xmp"]
            assert sheet.width > 300 and np.asarray(sheet).std() > 5
    if command == "binding":
        assert set(written["shares"]) == {binding.OWN, binding.PRIOR, binding.BOTH, "renders"}
        assert written["shares"]["renders"]["bound"]["value"] == 1
    with pytest.raises(InputError, match="was made with another seed"):
        run(command, folder, data_dir, tmp_path / "out", seed=6)


@pytest.mark.parametrize("command, changes, says", [
    ("pca", {"components": ["17"]}, "17 components were asked for, and embeddings of this CLIP have 1 to 16"),
    ("pca", {"components": ["many"]}, "is no number of components"),
    ("pca", {"models": ""}, "--models is missing"),
    ("pca", {"image": ["nowhere.png"]}, "cannot be read"),
    ("typographic", {"labels": ["star"]}, "--labels, two or more"),
    ("typographic", {"text": "a very long sentence"}, "does not fit"),
    ("binding", {"prior": "dropped"}, "makes no embedding"),
    ("binding", {"prior": "ar"}, "holds no trained prior_ar; train it"),
    ("binding", {"caption": ["a red square above a blue square"]}, "one scene gives no error bar"),
    ("rank", {"models": ""}, "no CLIP is named"),
    ("rank", {"lost": 2.0}, "no share of the variance"),
])  # fmt: skip
def test_what_is_wrong_is_said_before_anything_is_written(folder, data_dir, tmp_path, command, changes, says):
    with pytest.raises(InputError, match=says):
        run(command, folder, data_dir, tmp_path / "out", **changes)
    assert not (tmp_path / "out").exists()


def test_as_a_program_it_knows_its_commands():
    asked = subprocess.run(
        [sys.executable, "-m", "unclip_jax.probe", "typografic", "--out=nowhere"],
        cwd=ROOT, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert asked.returncode == 1 and "did you mean 'typographic'" in asked.stderr
    assert "Traceback" not in asked.stderr
