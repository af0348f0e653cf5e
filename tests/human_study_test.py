"""Studies: balanced, blind, and scored as the paper scores them. The page itself is in human_study_page_test.py."""

import collections
import io
import itertools
import json
import re

import numpy as np
import pytest
from absl import flags
from compared_images import write_answers, write_folder
from PIL import Image

from unclip_jax.errors import InputError
from unclip_jax.human_study import __main__ as program
from unclip_jax.human_study import answers, captioned_images, elo, page, questions, scores

CAPTIONS = [f"a drawing, number {number}" for number in range(9)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Three models' images of nine captions, 16 of each."""
    root = tmp_path_factory.mktemp("models")
    return {
        name: str(write_folder(root / f"folder-of-{name}", CAPTIONS, seed=seed, samples=16))
        for seed, name in enumerate(("zebra", "heron", "otter"))
    }


@pytest.fixture(scope="module")
def images(folders):
    return {name: captioned_images.read(folder) for name, folder in folders.items()}


@pytest.fixture(scope="module")
def written(folders, images, tmp_path_factory):
    """A study of all kinds and models, and its folder."""
    out = tmp_path_factory.mktemp("written") / "study"
    drawn = questions.draw(images, kinds=list(questions.KINDS), captions=0, seed=5)
    return page.write(out, drawn, models=folders, seed=5, size=0), out


def shown(out):
    """What the page shows: its questions, by number."""
    text = (out / "page" / "index.html").read_text()
    content = json.loads(re.search(r'<script type="application/json" id="study">(.*?)</script>', text, re.S)[1])
    return {row["id"]: row for row in content["questions"]}


# What is asked.


@pytest.mark.parametrize("captions", [8, 9])
def test_each_two_models_are_compared_once_for_each_caption_and_kind_on_sides_in_balance(images, captions):
    drawn = questions.draw(images, kinds=list(questions.KINDS), captions=captions, seed=3)
    assert [question.kind for question in drawn] == sorted(
        (question.kind for question in drawn), key=list(questions.KINDS).index
    )
    for kind, (first, second) in itertools.product(questions.KINDS, itertools.combinations(images, 2)):
        own = [q for q in drawn if q.kind == kind and {q.left, q.right} == {first, second}]
        assert len({question.caption for question in own}) == len(own) == captions
        left = sum(question.left == first for question in own)
        assert abs(2 * left - captions) == captions % 2
        for question in own:
            count = 16 if kind == "diversity" else 1
            assert question.left_images == tuple(map(str, images[question.left][question.caption][:count]))
            assert question.right_images == tuple(map(str, images[question.right][question.caption][:count]))


def test_a_study_is_its_seed(images):
    first, again, other = (
        questions.draw(images, kinds=["photorealism"], captions=5, seed=seed) for seed in (1, 1, 2)
    )
    assert first == again != other
    # Neither the order of sides nor which of two has one more is always the same.
    odd = [questions.draw(images, kinds=["photorealism"], captions=1, seed=seed)[0].left for seed in range(20)]
    assert len(set(odd)) > 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(kinds=["photo_realism"]), "no question of 'photo_realism'; did you mean 'photorealism'"),
        (dict(kinds=[]), "at least one"),
        (dict(kinds=["diversity", "diversity"]), "each kind of question once"),
        (dict(captions=10), "--captions=10 are not there: zebra, heron, otter share 9"),
        (dict(only=["zebra"]), "at least two models"),
        (dict(kinds=["diversity"], samples=15), "0 captions have the 16 images by each of"),
        (dict(other={"elsewhere": []}), "there is no caption that zebra, heron, otter, other all have"),
    ],
)
def test_a_study_that_cannot_be_drawn(images, change, message):
    change = {"kinds": ["photorealism"], "captions": 0, "only": list(images), "samples": 16, "other": None} | change
    models = {name: {c: files[: change["samples"]] for c, files in images[name].items()} for name in change["only"]}
    if change["other"]:
        models["other"] = change["other"]
    with pytest.raises(InputError, match=re.escape(message)):
        questions.draw(models, kinds=change["kinds"], captions=change["captions"], seed=0)


# Where images come from.


def test_images_are_found_by_a_manifest_or_a_list_of_captions(tmp_path):
    found = []
    for listed in ("", "captions.csv", "captions.jsonl"):
        folder = write_folder(tmp_path / f"f{listed}", ["a  cat", "two, dogs"], seed=0, samples=2, listed=listed)
        by_folder = captioned_images.read(str(folder))
        assert by_folder == captioned_images.read(str(folder / (listed or "manifest.json")))
        found.append({caption: [file.name for file in files] for caption, files in by_folder.items()})
    assert found[0] == found[1] == found[2]
    assert found[0]["a cat"] == ["00000-diffusion-seed0.png", "00000-diffusion-seed1.png"]  # cleaned, as networks read


def test_images_of_one_prior_of_several(tmp_path):
    folder = write_folder(tmp_path / "both", ["a cat"], seed=0, priors=("diffusion", "ar"))
    assert [file.name for file in captioned_images.read(f"{folder}@ar")["a cat"]] == ["00000-ar-seed0.png"]
    with pytest.raises(InputError, match="by ar, diffusion; name one, as in .*both@ar"):
        captioned_images.read(str(folder))
    with pytest.raises(InputError, match="no images by the prior 'none', but by ar, diffusion"):
        captioned_images.read(f"{folder}@none")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("", "", "there is no folder .*nowhere"),
        ("notes.txt", "hello", "has no manifest.json and none of captions.jsonl"),
        ("manifest.json", "[]", "is no list of images by unclip_jax.generate"),
        ("manifest.json", '{"images": []}', "lists no images"),
        ("manifest.json", '{"images": [{"prompt": "a", "file": "gone.png", "prior": "ar"}]}', "gone.png, which is not"),
        ("manifest.json", '{"images": [{"prompt": "a", "file": "../x.png", "prior": "ar"}]}', "x.png, which is not"),
        ("manifest.json", '{"images": [{"prompt": " ", "file": "x.png", "prior": "ar"}]}', "has an empty caption"),
        ("captions.csv", "file_name,caption\ngone.png,a cat\n", "captions.csv, line 2: 'gone.png' cannot be read"),
        ("captions.csv", "name,words\na.png,a cat\n", "has to name a column"),
    ],
)
def test_folders_that_are_none(tmp_path, name, content, message):
    folder = tmp_path / "nowhere"
    (tmp_path / "x.png").write_bytes(b"outside")
    if name:
        folder.mkdir()
        (folder / name).write_text(content)
    with pytest.raises(InputError, match=message):
        captioned_images.read(str(folder))


# What is written.


def test_nothing_that_raters_get_names_a_model(written, folders):
    study, out = written
    files = [path for path in (out / "page").rglob("*") if path.is_file()]
    told = [path.relative_to(out).as_posix().encode() + path.read_bytes() for path in files]
    secrets = [*folders, *folders.values(), "folder-of", "manifest", "seed0", "made by", "diffusion", str(out.parent)]
    for secret in secrets:
        assert not any(secret.encode() in content for content in told), secret
    for path in (out / "page" / "images").iterdir():
        with Image.open(path) as picture:
            assert not picture.info
    # Captions stand only where raters are to read them.
    assert {row["kind"] for row in shown(out).values() if "caption" in row} == {"caption_similarity"}


def test_names_of_images_follow_no_model(written):
    study, out = written
    by_model = collections.defaultdict(set)
    for number, row in shown(out).items():
        question = study.questions[number - 1]
        for side in ("left", "right"):
            name = int(re.fullmatch(r"images/(\d{6})\.png", row[side])[1])
            by_model[getattr(question, side)].add(name)
    count = len(set.union(*by_model.values()))
    assert set.union(*by_model.values()) == set(range(1, count + 1)) and count == 3 * 2 * len(CAPTIONS)
    for numbers in by_model.values():  # 18 of 54 in random order: their mean is 27.5 ± 3
        assert abs(np.mean(list(numbers)) - (count + 1) / 2) < 10
        assert len({number % 3 for number in numbers}) == 3


def test_the_page_shows_the_pixels_of_the_key(written):
    study, out = written
    for number, row in shown(out).items():
        question = study.questions[number - 1]
        for side, files in (("left", question.left_images), ("right", question.right_images)):
            expected = [np.asarray(Image.open(file)) for file in files]
            pixels = np.asarray(Image.open(out / "page" / row[side]))
            if len(files) == 16:
                cells = [pixels[16 * (n // 4) :, 16 * (n % 4) :][:12, :12] for n in range(16)]
                assert pixels.shape == (60, 60, 3) and (pixels[12:16] == 255).all()
                np.testing.assert_array_equal(cells, expected)
            else:
                np.testing.assert_array_equal(pixels, expected[0])
    assert page.read_key(out / "key.json") == study


def test_large_images_are_small_in_a_grid():
    one = np.broadcast_to(np.linspace(0, 255, 320).astype(np.uint8)[:, None, None], (320, 320, 3))
    drawn = page.grid([one] * 16)
    assert drawn.shape == (4 * 160 + 3 * 4,) * 2 + (3,)
    np.testing.assert_allclose(drawn[2:158, 80].astype(int), one[::2][2:158, 160].astype(int), atol=1)


def test_images_of_two_sizes_are_shown_at_one(folders, images, tmp_path):
    small = captioned_images.read(str(write_folder(tmp_path / "small", CAPTIONS, seed=9, side=8)))
    drawn = questions.draw({"zebra": images["zebra"], "small": small}, kinds=["photorealism"], captions=2, seed=0)
    with pytest.raises(InputError, match=r"has (8x8|12x12) pixels and .* (8x8|12x12); give --size"):
        page.write(tmp_path / "study", drawn, models=folders, seed=0, size=0)
    assert not (tmp_path / "study").exists()
    page.write(tmp_path / "study", drawn, models=folders, seed=0, size=10)
    sizes = {np.asarray(Image.open(path)).shape for path in (tmp_path / "study" / "page" / "images").iterdir()}
    assert sizes == {(10, 10, 3)}


def test_a_study_is_never_overwritten_and_never_half_there(written, folders, images, tmp_path):
    drawn = questions.draw(images, kinds=["photorealism"], captions=2, seed=0)
    with pytest.raises(InputError, match="is there already; a study is never overwritten"):
        page.write(written[1], drawn, models=folders, seed=0, size=0)
    broken = tmp_path / "broken.png"
    encoded = io.BytesIO()
    Image.new("RGB", (12, 12)).save(encoded, format="PNG")
    broken.write_bytes(encoded.getvalue()[:40])
    damaged = questions.Question("photorealism", "a cat", "zebra", "heron", (str(broken),), (str(tmp_path / "none"),))
    with pytest.raises(InputError, match=r"broken\.png|none cannot be read"):
        page.write(tmp_path / "study", [damaged], models=folders, seed=0, size=0)
    assert not (tmp_path / "study").exists()


def test_a_damaged_key(written, tmp_path):
    path, text = tmp_path / "key.json", (written[1] / "key.json").read_text()
    for damaged in (text.replace("zebra", "heron", 1), text[:-9], ""):
        path.write_text(damaged)
        with pytest.raises(InputError, match="is missing, damaged or no key of a study"):
            page.read_key(path)


# What answers say.


def a_study(*pairs, kind="photorealism"):
    """A study of one kind: a question for each (left, right)."""
    names = dict.fromkeys(name for pair in sorted(pairs) for name in pair)
    asked = [questions.Question(kind, f"caption {n}", *pair, ("l",), ("r",)) for n, pair in enumerate(pairs)]
    return page.Study("0123456789abcdef", 0, 0, dict.fromkeys(names, "somewhere"), asked)


@pytest.mark.parametrize(
    ("probability", "error"),
    [(47.1, 3.1), (48.9, 3.1), (41.1, 3.0), (62.6, 3.0), (70.5, 2.8)],
)
def test_errors_of_table_1(probability, error):
    """The paper's Table 1, from 1,000 comparisons each; but for 45.3, where it has 3.0 and this formula 3.1."""
    assert round(100 * scores.half_width(probability / 100, 1000), 1) == error


def test_table_1_from_answers(tmp_path):
    """70.5 ± 2.8 and 48.9 ± 3.1 % out of 1,000 answers of which some are ties, whichever side a model was on."""
    sides = [("unCLIP", "GLIDE"), ("GLIDE", "unCLIP")] * 500
    study = a_study(*sides)
    study.models.clear()
    study.models.update({"unCLIP": "a", "GLIDE": "b"})
    for wins, ties, expected in ((680, 50, "70.5 ± 2.8 % (n = 1000)"), (400, 178, "48.9 ± 3.1 % (n = 1000)")):
        order = np.random.default_rng(wins).permutation(1000)
        choices = {}
        for place, question in enumerate(order.tolist()):
            on_left = sides[question][0] == "unCLIP"
            chosen = "left" if on_left == (place < wins) else "right"
            choices[question + 1] = "not_sure" if wins <= place < wins + ties else chosen
        path = write_answers(tmp_path / f"{wins}.json", study, choices)
        results = scores.score(study, answers.read([path], study, partial=False))
        [pair] = results["questions"]["photorealism"]["pairs"]
        assert [pair[key] for key in ("wins", "not_sure", "losses")] == [wins, ties, 1000 - wins - ties]
        assert f"| unCLIP beats GLIDE | {expected} |" in scores.markdown(results)
        share = (wins + ties / 2) / 1000
        gap = results["questions"]["photorealism"]["elo"]
        assert gap["unCLIP"] - gap["GLIDE"] == pytest.approx(400 * np.log10(share / (1 - share)), abs=1e-6)


def test_a_question_that_several_answer_counts_once(tmp_path):
    study = a_study(("a", "b"), ("b", "a"), ("a", "b"), ("b", "a"))
    by_rater = {
        "ann": {1: "left", 2: "right", 3: "right", 4: "not_sure"},  # for a: 1, 1, 0, ½
        "bob": {1: "left", 2: "left", 3: "right"},  # for a: 1, 0, 0
        "cat": {1: "not_sure", 2: "right", 3: "right"},  # for a: ½, 1, 0
    }
    paths = [write_answers(tmp_path / name, study, choices, rater=name) for name, choices in by_rater.items()]
    results = scores.score(study, answers.read(paths, study, partial=True))
    of_kind = results["questions"]["photorealism"]
    [pair] = of_kind["pairs"]
    assert pair["probability"] == pytest.approx((5 / 6 + 2 / 3 + 0 + 1 / 2) / 4)
    assert (pair["questions"], pair["votes"]) == (4, 10)
    assert pair["half_width"] == pytest.approx(1.959964 * 0.5 / 2, rel=1e-6)
    # Pairs of answers that agree: 1 of 3, 1 of 3, 3 of 3; the fourth has one answer.
    assert of_kind["agreement"]["same"] == pytest.approx(5 / 9) and of_kind["agreement"]["questions"] == 3
    assert results["raters"][1] == {"rater": "bob", "answers": 3, "not_sure": 0, "left": 2 / 3, "median_seconds": 1.5}


def test_agreement_of_krippendorffs_example():
    """Four observers and twelve units, of "Computing Krippendorff's Alpha-Reliability" (2011): 0.849 by intervals."""
    rows = ("123321412...", "1233224125.3", ".3332342251.", "12332441251.")
    table = np.array([[np.nan if value == "." else float(value) for value in row] for row in rows])
    assert scores.krippendorff_alpha(table) == pytest.approx(0.849, abs=5e-4)
    assert scores.krippendorff_alpha(np.ones((2, 3))) is None
    assert scores.krippendorff_alpha(np.array([[0.0, 1.0, 0.5], [0.0, 1.0, 0.5]])) == 1


def test_a_model_that_always_wins_has_no_interval_and_no_elo(tmp_path):
    study = a_study(("a", "b"), ("b", "a"))
    path = write_answers(tmp_path / "x.json", study, {1: "left", 2: "right"})
    results = scores.score(study, answers.read([path], study, partial=False))
    of_kind = results["questions"]["photorealism"]
    assert of_kind["elo"] is None and of_kind["pairs"][0]["half_width"] is None
    table = scores.markdown(results)
    assert "| a beats b | 100.0 % (n = 2) |" in table
    assert "no Elo, for a won every comparison with b, so the most likely Elo difference is infinite." in table
    assert "inf" not in json.dumps(results).replace("infinite", "")


# Elo.


def test_elo_of_two_models_in_closed_form():
    for wins, losses in ((1, 1), (705, 295), (999.5, 0.5)):
        found = elo.ratings(np.array([[0.0, wins], [losses, 0.0]]), ["a", "b"])
        assert found[0] - found[1] == pytest.approx(400 * np.log10(wins / losses), abs=1e-6)
        assert found.sum() == pytest.approx(0, abs=1e-9)


def test_elo_of_several_models_by_another_optimiser():
    """Zermelo's fixed-point iteration for the same likelihood, and GLIDE's sum written out."""
    wins = np.random.default_rng(0).integers(1, 40, (5, 5)).astype(float)
    wins[0, 3] = wins[3, 0] = 0  # never compared with one another
    found = elo.ratings(wins, list("abcde"))
    games = wins + wins.T
    np.fill_diagonal(games, 0)
    strength = np.ones(5)
    for _ in range(2000):
        strength = (wins.sum(1) - wins.diagonal()) / (games / (strength[:, None] + strength[None])).sum(1)
    expected = 400 * np.log10(strength)
    np.testing.assert_allclose(found, expected - expected.mean(), atol=1e-6)

    def loss(rating):
        return sum(
            wins[i, j] * np.log1p(10 ** ((rating[j] - rating[i]) / 400)) for i in range(5) for j in range(5) if i != j
        )

    for step in np.eye(5):
        assert loss(found) < min(loss(found + step), loss(found - step))


@pytest.mark.parametrize(
    ("wins", "message"),
    [
        ([[0, 7], [0, 0]], "a won every comparison with b, so the most likely Elo difference is infinite"),
        ([[0, 0, 0], [3, 0, 1], [2, 1, 0]], "b and c won every comparison with a"),
        ([[0, 1, 0], [1, 0, 0], [0, 0, 0]], "were never compared"),
    ],
)
def test_elo_that_is_not_finite(wins, message):
    with pytest.raises(InputError, match=message):
        elo.ratings(np.array(wins, float), list("abc")[: len(wins)])


# Answers that are none.


@pytest.mark.parametrize(
    ("choices", "changed", "message"),
    [
        ({1: "left"}, {}, "leaves 1 of 2 questions unanswered, the first is 2"),
        ([(1, "left"), (2, "left"), (1, "right")], {}, "answers question 1 twice"),
        ({1: "left", 2: "left", 3: "left"}, {}, "answers a question 3; the study has 1 to 2"),
        ({}, {"answers": [{"question": True, "choice": "left", "seconds": 1}]}, "question True"),
        ({1: "left", 2: "both"}, {}, "answers question 2 by 'both'; known are left, right, not_sure"),
        ({1: "left", 2: "left"}, {"study": "f00"}, "answers the study f00, and the key is of 0123456789abcdef"),
        ({1: "left", 2: "left"}, {"format": 2}, "has format 2, not 1"),
        ({1: "left", 2: "left"}, {"answers": [1]}, "is no file of answers"),
        ({}, {"rater": "zoe", "answers": []}, "leaves 2 of 2"),
    ],
)
def test_answers_that_cannot_be_scored(tmp_path, choices, changed, message):
    study = a_study(("a", "b"), ("b", "a"))
    path = write_answers(tmp_path / "x.json", study, choices, changed=changed)
    with pytest.raises(InputError, match=re.escape(message)):
        answers.read([path], study, partial=False)


def test_answers_of_nobody_and_of_one_rater_twice(tmp_path):
    study = a_study(("a", "b"))
    path = write_answers(tmp_path / "x.json", study, {1: "left"})
    for files, partial, message in (
        ([], False, "there are no answers"),
        ([path, path], False, "are both by the rater 'ann'; give the later one"),
        ([tmp_path / "gone.json"], False, "is no file of answers"),
        ([write_answers(tmp_path / "y.json", study, {})], True, "no question is answered"),
    ):
        with pytest.raises(InputError, match=message):
            answers.read(files, study, partial=partial)


# The program.


def call(monkeypatch, *arguments):
    """Runs the program's main on a command line."""
    values = flags.FlagValues()
    with monkeypatch.context() as patch:
        patch.setattr(flags, "FLAGS", values)
        for name in ("string", "multi_string", "list", "integer", "bool"):
            define = getattr(flags, f"DEFINE_{name}")
            patch.setattr(flags, f"DEFINE_{name}", lambda *a, define=define, **k: define(*a, flag_values=values, **k))
        program.define_flags()
        return program.main(values(["human_study", *arguments]))


def test_the_program_makes_a_study_and_scores_it(folders, tmp_path, monkeypatch, capsys):
    models = [f"--model={name}={folder}" for name, folder in folders.items() if name != "otter"]
    out = tmp_path / "study"
    made = [*models, "--questions=photorealism,diversity", "--captions=4", f"--out={out}"]
    assert call(monkeypatch, "make", *made) == 0
    assert "8 questions about 4 of 9 captions" in capsys.readouterr().out
    study = page.read_key(out / "key.json")
    assert list(study.models) == ["zebra", "heron"] and study.seed > 2**16  # drawn, or raters could know it
    for rater, model in (("ann", "zebra"), ("bob", "heron")):
        choices = {n: "left" if q.left == model else "right" for n, q in enumerate(study.questions, 1)}
        write_answers(tmp_path / f"{rater}.json", study, choices, rater=rater)
    given = [f"--answers={tmp_path / name}.json" for name in ("ann", "bob")]
    assert call(monkeypatch, "score", f"--key={out / 'key.json'}", *given) == 0
    text = capsys.readouterr().out
    assert "| zebra beats heron | 50.0 ± 49.0 % (n = 4) | 50.0 ± 49.0 % (n = 4) |" in text
    assert (out / "results.md").read_text() in text
    results = json.loads((out / "results.json").read_text())
    assert results["questions"]["diversity"]["elo"] == pytest.approx({"zebra": 0, "heron": 0}, abs=1e-6)
    assert results["questions"]["diversity"]["agreement"]["same"] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "say what to do"),
        (["make"], "--out is missing"),
        (["make", "--out=x", "--model=a"], "--model=a is not NAME=FOLDER"),
        (["make", "--out=x", "--model=a=f", "--model=a=g"], "two models are named 'a'"),
        (["score"], "--key is missing"),
    ],
)
def test_command_lines_that_say_too_little(arguments, message, monkeypatch):
    with pytest.raises(InputError, match=message):
        call(monkeypatch, *arguments)
