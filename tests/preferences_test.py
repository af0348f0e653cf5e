"""The program of probes: from tables and pictures to probes, from probes to scores, and what it refuses."""

import csv
import json
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import untrained_models
from PIL import Image
from safetensors.numpy import save_file
from scipy import special

from unclip_jax import embed, preferences, programs
from unclip_jax.data import resize
from unclip_jax.errors import InputError
from unclip_jax.evaluation import affine_probes, judgements
from unclip_jax.stages import base

ROOT = pathlib.Path(__file__).resolve().parent.parent
COUNT = 24  # more than the 16 dimensions of the small CLIP


class Options:
    """The program's flags, with their defaults."""

    def __init__(self, **given):
        texts = ("table", "clip", "out", "weights", "probe", "images", "against")
        self.__dict__.update(dict.fromkeys(texts, ""), ridge=0.0, strength=None, seed=0)
        assert set(given) <= set(self.__dict__)
        self.__dict__.update({name: str(x) if name in texts else x for name, x in given.items()})


def nothing():
    pass


def run(command, **given):
    return " ".join(preferences.run(command, Options(**given), nothing))


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> str:
    return str(untrained_models.write(tmp_path_factory.mktemp("models"), "clip"))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> pathlib.Path:
    """Folders a and b of pictures that differ, of the same names, and the grid that is none of them."""
    root, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for folder in ("a", "b"):
        (root / folder).mkdir()
        for number in range(COUNT):
            pixels = rng.integers(0, 256, (4, 5, 3), np.uint8).repeat(8, 0).repeat(8, 1)
            Image.fromarray(pixels).save(root / folder / f"{number:02d}.png")
        Image.fromarray(pixels).save(root / folder / "grid.png")
        (root / folder / "manifest.json").write_text("{}")
    return root


@pytest.fixture(scope="module")
def frozen(clip) -> embed.Frozen:
    """The CLIP as the program that embeds data sets reads it."""
    return embed.read_clip(clip)


@pytest.fixture(scope="module")
def fingerprint(frozen) -> str:
    return frozen.fingerprint


@pytest.fixture(scope="module")
def z(frozen, pictures) -> dict[str, np.ndarray]:
    """Embeddings of the pictures."""
    made = jax.jit(lambda params, pixels: base.embed_images(frozen.network, params, pixels))
    found = {}
    for folder in ("a", "b"):
        files = sorted((pictures / folder).glob("[0-9]*.png"))
        pixels = [resize.square(np.asarray(Image.open(file)), size=frozen.network.image_size) for file in files]
        found[folder] = np.asarray(made(frozen.params, jnp.asarray(np.stack(pixels))), np.float64)
    return found


def write_csv(path, columns, rows):
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(rows)


def test_ratings_of_pictures_are_fit_and_said_again(clip, pictures, z, fingerprint, tmp_path):
    planted = 100 * np.random.default_rng(1).standard_normal(16)
    rated = z["a"] @ planted + 5
    table = pictures / "a" / "ratings.csv"  # files are named from the table's folder on
    write_csv(table, ("rating", "by", "image"), [(x, "all", f"{number:02d}.png") for number, x in enumerate(rated)])
    said = run("fit-ratings", table=table, clip=clip, out=tmp_path / "probe.json")
    probe = affine_probes.read(tmp_path / "probe.json")
    assert fingerprint in said and probe.clip == fingerprint and probe.kind == "ratings"
    assert probe.about["examples"] == COUNT and probe.about["held_out"]["explained_variance"] > 0.99
    out = tmp_path / "scores.jsonl"
    said = run("apply", probe=tmp_path / "probe.json", images=pictures / "a", clip=clip, out=out)
    rows = rows_of(out)
    assert [row["image"] for row in rows] == [f"{number:02d}.png" for number in range(COUNT)]
    np.testing.assert_allclose([row["score"] for row in rows], rated, atol=1e-3 * rated.std())
    error = rated.std(ddof=1) / np.sqrt(COUNT)
    assert f"mean score {rated.mean():.3f}"[:-1] in said and f"+- {error:.3f}"[:-1] in said


def test_preferences_between_pictures_are_fit_and_foretold(clip, pictures, z, fingerprint, tmp_path):
    planted = 300 * np.random.default_rng(2).standard_normal(16)
    apart = (z["a"] - z["b"]) @ planted
    table = tmp_path / "answers.jsonl"
    lines = [
        {"first": str(pictures / "a" / f"{row:02d}.png"), "second": str(pictures / "b" / f"{row:02d}.png"),
         "preferred": float(special.expit(apart[row]))}
        for row in range(COUNT)
    ]  # fmt: skip
    table.write_text("\n".join(map(json.dumps, lines)) + "\n")
    run("fit-pairs", table=table, clip=clip, out=tmp_path / "probe.json", strength=1e-9)
    probe = affine_probes.read(tmp_path / "probe.json")
    assert (probe.kind, probe.bias, probe.clip) == ("pairs", 0.0, fingerprint)
    out = tmp_path / "wins.jsonl"
    sides = {"images": pictures / "a", "against": pictures / "b"}
    said = run("apply", probe=tmp_path / "probe.json", clip=clip, out=out, **sides)
    forth = np.array([row["probability"] for row in rows_of(out)])
    np.testing.assert_allclose(forth, special.expit(apart), atol=0.01)
    assert f"mean probability {forth.mean():.4f}" in said


def pairs_of_embeddings(path, *, clip="some CLIP", count=400, seed=3):
    """Writes pairs whose answers follow a planted preference; returns that."""
    rng = np.random.default_rng(seed)
    planted = 8 * rng.standard_normal(5)
    first, second = (rng.standard_normal((count, 5)) for _ in range(2))
    sides = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (first, second)]
    said = (rng.uniform(size=count) < special.expit((sides[0] - sides[1]) @ planted)).astype(np.float32)
    said[::10] = 0.5
    np.savez(path, first=first.astype(np.float16), second=second, preferred=said, clip=clip)
    return planted


def test_a_table_of_embeddings_needs_no_clip_and_the_penalty_is_chosen(tmp_path):
    """As a program, which is what users start."""
    planted = pairs_of_embeddings(tmp_path / "pairs.npz")
    command = [sys.executable, "-m", "unclip_jax.preferences", "fit-pairs", f"--table={tmp_path}/pairs.npz"]
    command += [f"--out={tmp_path}/probe.json", "--compile_cache="]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == programs.DONE, done.stderr
    probe = affine_probes.read(tmp_path / "probe.json")
    cosine = probe.weights @ planted / np.linalg.norm(probe.weights) / np.linalg.norm(planted)
    assert cosine > 0.95 and probe.clip == "some CLIP"
    assert 1e-6 <= probe.about["strength"] <= 1e6
    assert probe.about["held_out"]["agreement"] > 0.8 and probe.about["held_out"]["log_likelihood"] > -np.log(2)
    assert probe.about["held_out"]["examples"] == 80
    pairs_of_embeddings(tmp_path / "other.npz", clip="another CLIP")
    with pytest.raises(InputError, match="fit to embeddings of the CLIP 'some CLIP', and these are of 'another CLIP'"):
        run("apply", probe=tmp_path / "probe.json", table=tmp_path / "other.npz", out=tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()
    with pytest.raises(InputError, match=r"say what to do: .* fit-ratings\|fit-pairs\|import\|apply"):
        preferences.main(["preferences"])


def test_embeddings_are_scored_by_row(tmp_path):
    pairs_of_embeddings(tmp_path / "pairs.npz", count=30)
    run("fit-pairs", table=tmp_path / "pairs.npz", out=tmp_path / "probe.json", strength=1.0)
    run("apply", probe=tmp_path / "probe.json", table=tmp_path / "pairs.npz", out=tmp_path / "out.jsonl")
    rows = rows_of(tmp_path / "out.jsonl")
    assert [(row["first"], row["second"]) for row in rows] == [(number, number) for number in range(30)]
    assert all(0 < row["probability"] < 1 for row in rows)
    rng = np.random.default_rng(4)
    np.savez(tmp_path / "rated.npz", embeddings=rng.standard_normal((40, 5)), rating=np.arange(40), clip="some CLIP")
    run("fit-ratings", table=tmp_path / "rated.npz", out=tmp_path / "ratings.json", ridge=0.1)
    about = affine_probes.read(tmp_path / "ratings.json").about
    assert about["ridge"] == 0.1 and about["held_out"]["mean_squared_error"] > 0
    np.savez(tmp_path / "plain.npz", embeddings=rng.standard_normal((3, 5)), clip="some CLIP")
    run("apply", probe=tmp_path / "ratings.json", table=tmp_path / "plain.npz", out=tmp_path / "out.jsonl")
    assert [row["image"] for row in rows_of(tmp_path / "out.jsonl")] == [0, 1, 2]


def test_laions_predictor_is_imported(clip, fingerprint, tmp_path):
    rng = np.random.default_rng(5)
    weight, bias = rng.standard_normal((1, 16)).astype(np.float32), np.array([3.0], np.float32)
    save_file({"weight": weight, "bias": bias}, tmp_path / "one.safetensors")
    run("import", weights=tmp_path / "one.safetensors", clip=clip, out=tmp_path / "probe.json")
    probe = affine_probes.read(tmp_path / "probe.json")
    np.testing.assert_array_equal(probe.weights, weight[0])
    assert (probe.bias, probe.clip, probe.about) == (3.0, fingerprint, {"file": "one.safetensors"})
    save_file({"weight": weight[:, :9].copy(), "bias": bias}, tmp_path / "narrow.safetensors")
    with pytest.raises(InputError, match="reads embeddings of 9 numbers, this CLIP makes 16"):
        run("import", weights=tmp_path / "narrow.safetensors", clip=clip, out=tmp_path / "probe.json")


def test_options_that_do_not_do_are_refused_before_anything_is_read(pictures, tmp_path):
    affine_probes.AffineProbe("ratings", np.ones(5), 0.0, "c", {}).write(tmp_path / "probe.json")
    probe, out = tmp_path / "probe.json", tmp_path / "out.jsonl"
    write_csv(tmp_path / "rated.csv", ("image", "rating"), [("none.png", 3)])
    (tmp_path / "a").mkdir()
    for command, given, says in (
        ("fit-pairs", {"out": out}, "fit-pairs needs --table"),
        ("import", {"weights": "x", "out": out}, "import needs --clip"),
        ("apply", {"probe": probe, "out": tmp_path / "none" / "x"}, "there is no folder"),
        ("apply", {"probe": probe, "out": out}, "give what the probe is to look at"),
        ("apply", {"probe": probe, "out": out, "images": "a", "table": "b"}, "give what the probe is to look at"),
        ("apply", {"probe": probe, "out": out, "table": "b", "against": "a"}, "--against is a second folder"),
        ("apply", {"probe": probe, "out": out, "images": tmp_path / "a"}, "holds no picture; give one with .jpeg"),
        ("apply", {"probe": probe, "out": out, "images": tmp_path / "no"}, "holds no picture"),
        ("apply", {"probe": probe, "out": out, "images": pictures / "a"}, "the table has images, which a CLIP reads"),
        ("fit-ratings", {"table": tmp_path / "rated.csv", "out": out}, "the table has images, which a CLIP reads"),
        ("apply", {"probe": tmp_path / "rated.csv", "out": out, "images": "a"}, "cannot be read"),
    ):
        with pytest.raises(InputError, match=says):
            run(command, **given)
    Image.new("RGB", (9, 9)).save(tmp_path / "a" / "other.png")
    with pytest.raises(InputError, match="compared file by file, but '00.png' is in one of them only"):
        run("apply", probe=probe, out=out, images=pictures / "a", against=tmp_path / "a")
    assert not out.exists()


def test_an_image_that_cannot_be_read_is_named(clip, tmp_path):
    write_csv(tmp_path / "rated.csv", ("image", "rating"), [("none.png", 3)])
    with pytest.raises(InputError, match=r"the image '.*none.png' cannot be read: .*No such file"):
        run("fit-ratings", table=tmp_path / "rated.csv", clip=clip, out=tmp_path / "probe.json")
    np.savez(tmp_path / "rated.npz", embeddings=np.ones((4, 5)), rating=np.arange(4), clip="some CLIP")
    with pytest.raises(InputError, match="the table's embeddings are of the CLIP 'some CLIP', --clip="):
        run("fit-ratings", table=tmp_path / "rated.npz", clip=clip, out=tmp_path / "probe.json")
    np.savez(tmp_path / "rated.npz", embeddings=np.ones((4, 5)), rating=np.arange(4))
    with pytest.raises(InputError, match="does not say which CLIP made its embeddings"):
        run("fit-ratings", table=tmp_path / "rated.npz", out=tmp_path / "probe.json")


# ---------------------------------------------------------------- tables


def written(tmp_path, name, content):
    (tmp_path / name).write_text(content) if isinstance(content, str) else np.savez(tmp_path / name, **content)
    return str(tmp_path / name)


def test_tables_say_the_same_in_every_format(tmp_path):
    lines = '{"first": "x.png", "second": "y/z.png", "preferred": 0.5, "who": 3}\n\n'
    lines += '{"first": "u.png", "second": "v", "preferred": 1}\n'
    found = judgements.read(written(tmp_path, "a.jsonl", lines), "pairs")
    again = judgements.read(
        written(tmp_path, "a.csv", "\ufeffpreferred,second,first\n0.5,y/z.png,x.png\n1,v,u.png\n"), "pairs"
    )
    for table in (found, again):
        assert table.files == ([tmp_path / "x.png", tmp_path / "u.png"], [tmp_path / "y" / "z.png", tmp_path / "v"])
        assert table.values is not None and table.values.tolist() == [0.5, 1] and not table.embedded
    unsaid = judgements.read(written(tmp_path, "b.csv", "image\nx.png\n"), "ratings", answered=False)
    assert unsaid.values is None and unsaid.files == ([tmp_path / "x.png"],)


TWO = np.ones((2, 3))


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.txt", "", "has to be a .csv, .jsonl or .npz file"),
        ("a.csv", "image,rating\n", "has no rows"),
        ("a.csv", "image,ratings\nx.png,3\n", "row 1 .*no 'rating'; did you mean 'ratings'"),
        ("a.csv", "image,rating\nx.png,3\ny.png,\n", "row 2 .*has no 'rating'$"),
        ("a.csv", "image,rating\nx.png,good\n", "row 1 of .*: rating is 'good', no number"),
        ("a.csv", "image,rating\nx.png,nan\n", "rating is 'nan', no number"),
        ("a.jsonl", '{"image": "x.png", "rating": 3}\n[1]\n', "line 2 of .* is no JSON object"),
        ("a.jsonl", '{"image": "x.png", "rat', "line 1 of .* is no JSON object"),
        ("a.npz", {"embedding": TWO, "rating": np.ones(2)}, "no array 'embeddings'; did you mean 'embedding'"),
        ("a.npz", {"embeddings": TWO}, "no array 'rating'"),
        ("a.npz", {"embeddings": TWO, "rating": np.ones(3)}, r"'rating' of .* is float64 \[3\]"),
        ("a.npz", {"embeddings": np.ones(2), "rating": np.ones(2)}, r"'embeddings' of .* is float64 \[2\]"),
        ("a.npz", {"embeddings": TWO, "rating": np.array(["a", "b"])}, "'rating' of .*numbers are needed"),
        ("a.npz", {"embeddings": TWO, "rating": np.array([{}, {}])}, "cannot be read: Object arrays"),
        ("a.npz", "no archive", "cannot be read"),
    ],
)
def test_a_table_that_does_not_do_gets_a_sentence(name, content, says, tmp_path):
    with pytest.raises(InputError, match=says):
        judgements.read(written(tmp_path, name, content), "ratings")


def test_a_table_that_is_not_there(tmp_path):
    with pytest.raises(InputError, match="cannot be read: .*No such file"):
        judgements.read(str(tmp_path / "none.csv"), "ratings")
