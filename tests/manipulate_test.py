"""The program that changes pictures: what it writes, that it goes on where it was stopped, and what it refuses."""

import dataclasses
import json
import subprocess
import sys

import cv2
import numpy as np
import pytest
from absl import flags
from PIL import Image

from unclip_jax import manipulate, programs, provenance, unclip
from unclip_jax.data import resize
from unclip_jax.errors import InputError
from unclip_jax.manipulation import motion
from unclip_jax.manipulation.latents import Codec, Encoded, Latents
from unclip_jax.manipulation.results import Results
from unclip_jax.manipulation.session import Session

SIDE = 16


class Shades(Codec):
    """Without networks: z_i is a picture's mean colour, x_T what is left of it, and drawing adds both."""

    sides, microbatch = {"decoder": SIDE}, 2

    def __init__(self):
        self.model, self.drawers, self.asked = unclip.UnCLIP({}), ["decoder"], []

    def embed_images(self, images):
        return np.stack([image.reshape(-1, 3).mean(0) for image in images]).astype(np.float32)

    def embed_text(self, captions):
        colours = {"a photo": (1, 1, 1), "red": (255, 0, 0), "blue": (0, 0, 255)}
        return np.asarray([colours[caption] for caption in captions], np.float32)

    def encode(self, images, captions=None, **_):
        small = np.stack([resize.square(image, size=SIDE) for image in images])
        z_i = self.embed_images(small)
        noise = small.astype(np.float32) - z_i[:, None, None]
        latents = Latents(z_i, {"decoder": noise}, tuple(captions))
        return Encoded(latents, {"decoder": small}, self.draw(latents))

    def draw(self, latents, *, eta=0.0, seed=0, ids=None, progress=None):
        self.asked.append((eta, ids))
        drawn = [np.random.default_rng(number).normal(0, 40, (SIDE, SIDE, 3)) for number in ids or ()]
        noise = latents.x_T.get("decoder", np.asarray(drawn))
        made = latents.z_i[:, None, None] + noise + (eta * np.asarray(drawn) if eta else 0)
        return {"decoder": np.clip(np.round(made), 0, 255).astype(np.uint8)}


@dataclasses.dataclass
class StopAfter:
    """Says to stop after so many polls."""

    polls: int

    def poll(self):
        self.polls -= 1
        return self.polls < 0


@pytest.fixture
def pictures(tmp_path):
    rng = np.random.default_rng(0)
    for name, colour in (("red ring", (200, 40, 40)), ("sea", (30, 60, 180)), ("sun", (220, 200, 60))):
        pixels = np.clip(rng.normal(colour, 20, (24, 32, 3)), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
    return [tmp_path / f"{name}.png" for name in ("red ring", "sea", "sun")]


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs a command with other networks, and everything else of the program."""
    codec, options = Shades(), flags.FlagValues()
    with monkeypatch.context() as patch:
        patch.setattr(flags, "FLAGS", options)
        for kind in ("string", "integer", "float", "enum", "list", "multi_string"):
            define = getattr(flags, f"DEFINE_{kind}")
            patch.setattr(flags, f"DEFINE_{kind}", lambda *a, define=define, **k: define(*a, **k, flag_values=options))
        manipulate.define_flags()
    monkeypatch.setattr(Session, "model", lambda *_: unclip.UnCLIP({}))
    monkeypatch.setattr(Session, "codec", lambda *_: codec)

    def call(command, *words, stop=10**6, out="out"):
        options.unparse_flags()
        for name in options:
            options[name].unparse()
        options(["manipulate", "--models=some", f"--out={tmp_path / out}", *words])
        manipulate.check_flags(command, manipulate.COMMANDS[command], options)
        return manipulate.run(command, options, StopAfter(stop))

    call.codec, call.out = codec, tmp_path / "out"
    return call


def of(path):
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB")), dict(picture.text)


def given(pictures):
    return [f"--image={path}" for path in pictures]


def test_encode_says_how_well_pictures_come_back(run, pictures, capsys):
    assert run("encode", *given(pictures)) == programs.DONE
    rows = json.loads((run.out / "manifest.json").read_text())["pictures"]
    assert [row["image"] for row in rows] == [str(path) for path in pictures]
    for row, name in zip(rows, ("00000-red_ring", "00001-sea", "00002-sun"), strict=True):
        there, again = of(run.out / f"{name}-decoder-given.png")[0], of(run.out / f"{name}-decoder.png")[0]
        error = np.square(there.astype(float) - again).mean()
        wanted = "identical" if not error else f"{10 * np.log10(255**2 / error):.2f} dB"
        assert row["psnr_db"]["decoder"] == wanted
        assert Latents.load(run.out / f"{name}-latents.npz").x_T["decoder"].shape == (1, SIDE, SIDE, 3)
    assert "3 pictures come back at decoder" in capsys.readouterr().out
    assert (run.out / "sheet.png").exists()


def test_variations_carry_their_seeds_and_go_on_after_a_stop(run, pictures):
    words = [*given(pictures), "--eta=0,0.5", "--samples=3", "--seed=5"]
    assert run("variations", *words, stop=5) == programs.REQUEUE
    before = {path: path.stat().st_mtime_ns for path in run.out.glob("*-seed*.png")}
    assert 0 < len(before) < 18
    assert run("variations", *words) == programs.DONE
    assert all(path.stat().st_mtime_ns == then for path, then in before.items())
    assert len(list(run.out.glob("*-seed*.png"))) == 18
    assert run("variations", *words, out="at_once") == programs.DONE
    for path in run.out.glob("*-seed*.png"):
        np.testing.assert_array_equal(of(path)[0], of(run.out.parent / "at_once" / path.name)[0])
    pixels, text = of(run.out / "00001-sea-eta0.5-seed6.png")
    assert (text["seed"], text["eta"]) == ("6", "0.5") and provenance.KEYWORD in text
    assert json.loads(text["unclip_jax"])["options"]["samples"] == 3
    encoded = run.codec.encode([of(pictures[1])[0]], [""])
    np.testing.assert_array_equal(of(run.out / "00001-sea-eta0-seed6.png")[0], encoded.again["decoder"][0])
    assert (pixels != encoded.again["decoder"][0]).any()
    # One picture alone has the same variations: its noise is named by its content and the seed.
    assert run("variations", f"--image={pictures[1]}", "--seed=6", "--samples=1", out="alone") == programs.DONE
    np.testing.assert_array_equal(of(run.out.parent / "alone" / "00000-sea-eta0.5-seed6.png")[0], pixels)


def test_interpolate_ends_in_the_pictures_and_shows_motion(run, pictures):
    assert run("interpolate", *given(pictures), "--frames=4", "--format=sheet,gif,mp4", "--fps=5") == programs.DONE
    again = run.codec.encode([of(path)[0] for path in pictures], [""] * 3).again["decoder"]
    for number, pair in enumerate(("00000-red_ring-to-00001-sea", "00001-sea-to-00002-sun")):
        np.testing.assert_array_equal(of(run.out / f"{pair}-000.png")[0], again[number])
        np.testing.assert_array_equal(of(run.out / f"{pair}-003.png")[0], again[number + 1])
        with Image.open(run.out / f"{pair}.gif") as film:
            assert film.n_frames == 6 and film.size == (256, 256)  # there and back
        assert (run.out / f"{pair}.mp4").exists()
    assert run("interpolate", *given(pictures[:2]), "--noise=fixed", "--draws=2", "--frames=3", out="drawn") == 0
    names = sorted(path.name for path in (run.out.parent / "drawn").glob("*-to-*.png"))
    assert names == [f"00000-red_ring-to-00001-sea-{k:03d}-seed{seed}.png" for k in range(3) for seed in (0, 1)]
    ids = [number for _, asked in run.codec.asked[-3:] for number in asked]
    assert ids[:3] == [ids[0]] * 3 and ids[3:] == [ids[3]] * 3 and ids[0] != ids[3]  # one x_T for a path


def test_textdiff_begins_with_the_picture_and_turns_to_the_words(run, pictures):
    words = [f"--image={pictures[2]}", "--text=red", "--text=blue", "--frames=3"]
    assert run("textdiff", *words) == programs.DONE
    again = run.codec.encode([of(pictures[2])[0]], [""]).again["decoder"][0]
    frames = {k: [of(run.out / f"00000-sun-text0{k}-00{step}.png") for step in range(3)] for k in (0, 1)}
    for k in (0, 1):
        np.testing.assert_array_equal(frames[k][0][0], again)
    assert [float(text["theta"]) for _, text in frames[0]] == [0, 0.25, 0.5]
    assert frames[1][1][1]["text"] == "blue" and frames[1][1][1]["baseline"] == "a photo"
    blue = [pixels[..., 2].mean() for pixels, _ in frames[1]]
    assert blue[0] < blue[1] < blue[2]


def test_arithmetic_adds_and_takes_away_by_its_strength(run, pictures):
    words = [f"--image={pictures[0]}", "--plus=blue", f"--minus_image={pictures[0]}", "--strength=0,0.5,0.9"]
    assert run("arithmetic", *words) == programs.DONE
    images = [of(run.out / f"00000-red_ring-strength{strength}.png")[0] for strength in ("0", "0.5", "0.9")]
    np.testing.assert_array_equal(images[0], run.codec.encode([of(pictures[0])[0]], [""]).again["decoder"][0])
    assert images[0][..., 2].mean() < images[1][..., 2].mean() < images[2][..., 2].mean()


@pytest.mark.parametrize(("command", "words", "says"), [
    ("textdiff", ["--text=red", "--theta=1.2"], "--theta=1.2 is out of range"),
    ("textdiff", ["--text=red", "--theta=-0.2"], "--theta=-0.2 is out of range"),
    ("textdiff", [], "--text is missing"),
    ("textdiff", ["--text= "], "empty; describe an image in words"),
    ("variations", ["--eta=0.5,2"], "from 0 to 1"),
    ("variations", ["--eta=some"], "these are to be numbers"),
    ("variations", ["--theta=0.3"], "variations does not read --theta"),
    ("variations", ["--format=git"], "did you mean 'gif'"),
    ("variations", ["--caption=a", "--caption=b"], "2 captions were given for 1 pictures"),
    ("interpolate", [], "needs two pictures"),
    ("interpolate", ["--image=SAME", "--draws=2"], "use --noise=fixed"),
    ("arithmetic", [], "nothing to add or to take away"),
    ("arithmetic", ["--minus_image=SAME"], "cancel out"),
    ("textdiff", ["--text=red", "--baseline=red"], "caption 0 and its baseline have the same embedding"),
])  # fmt: skip
def test_what_is_wrong_is_said_before_anything_is_computed(run, pictures, command, words, says):
    with pytest.raises(InputError, match=says):
        run(command, f"--image={pictures[0]}", *(word.replace("SAME", str(pictures[0])) for word in words))
    assert not run.out.exists() and not run.codec.asked


def test_pictures_that_cannot_be_encoded_are_refused_by_name(run, tmp_path):
    Image.fromarray(np.zeros((40, 9, 3), np.uint8)).save(tmp_path / "thin.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "thin.png").read_bytes()[:50])
    for name, says in (("thin", "thin.png has 9 x 40 pixels, and decoder draws 16"), ("cut", "cut.png.*decoded"),
                       ("no", "no.png.*cannot be read")):  # fmt: skip
        with pytest.raises(InputError, match=says):
            run("encode", f"--image={tmp_path / name}.png")
    assert not run.out.exists()


def test_a_folder_of_something_else_is_refused(run, pictures, tmp_path):
    with pytest.raises(InputError, match="holds something else"):
        run("encode", *given(pictures), out=".")
    assert run("variations", *given(pictures[:1]), "--samples=1") == programs.DONE
    with pytest.raises(InputError, match="samples.*made otherwise|made otherwise.*samples"):
        run("variations", *given(pictures[:1]), "--samples=2")
    with pytest.raises(InputError, match="command was 'variations', is 'encode'"):
        run("encode", *given(pictures[:1]))


def test_a_damaged_picture_is_made_again(tmp_path):
    results = Results(str(tmp_path / "out"), record={"versions": {"unclip_jax": "0"}})
    results.save("a", np.zeros((8, 8, 3), np.uint8), {})
    assert results.has("a") and not results.has("b")
    path = tmp_path / "out" / "a.png"
    path.write_bytes(path.read_bytes()[:-30])
    assert not results.has("a")


def test_films_show_their_frames(tmp_path):
    """By other readers than what wrote them, as far as there are: the order and the colours of frames."""
    colours = [(200, 30, 30), (30, 200, 30), (30, 30, 200)]
    frames = [np.full((17, 31, 3), colour, np.uint8) for colour in colours]
    motion.write_gif(tmp_path / "a.gif", frames, fps=10)
    with Image.open(tmp_path / "a.gif") as film:
        assert film.n_frames == 3 and film.info["duration"] == 100 and film.info["loop"] == 0
        for number, frame in enumerate(frames):
            film.seek(number)
            np.testing.assert_allclose(np.asarray(film.convert("RGB"))[:17, :31], frame, atol=3)
    motion.write_mp4(tmp_path / "a.mp4", frames, fps=10)
    film = cv2.VideoCapture(str(tmp_path / "a.mp4"))
    assert film.get(cv2.CAP_PROP_FPS) == 10
    for frame in frames:
        there, pixels = film.read()
        assert there and pixels.shape == (136, 248, 3)
        np.testing.assert_allclose(pixels[..., ::-1].reshape(-1, 3).mean(0), frame[0, 0], atol=12)
    assert not film.read()[0]
    assert [int(frame[0, 0, 0]) for frame in motion.there_and_back(frames)] == [200, 30, 30, 30]
    with pytest.raises(InputError, match="at least one frame"):
        motion.write_gif(tmp_path / "b.gif", [])
    with pytest.raises(InputError, match="one size"):
        motion.write_mp4(tmp_path / "b.mp4", [frames[0], frames[0][:9]])
    assert not (tmp_path / "b.gif").exists() and not (tmp_path / "b.mp4").exists()


def test_without_an_encoder_a_film_is_refused(tmp_path, monkeypatch):
    class None_:
        fourcc = staticmethod(lambda *_: 0)
        isOpened = release = lambda self: False

        def __init__(self, *_):
            pass

    monkeypatch.setattr(motion.cv2, "VideoWriter", None_)
    with pytest.raises(InputError, match="writes no MP4 .*ask for a gif"):
        motion.write_mp4(tmp_path / "a.mp4", [np.zeros((8, 8, 3), np.uint8)])


def test_the_program_names_what_trains_a_missing_part(tmp_path):
    import untrained_models

    untrained_models.write(tmp_path, "clip")
    command = [sys.executable, "-m", "unclip_jax.manipulate", "encode", f"--models={tmp_path}", "--out=out"]
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(tmp_path / "a.png")
    done = subprocess.run([*command, f"--image={tmp_path / 'a.png'}"], capture_output=True, text=True, timeout=300)
    assert done.returncode == programs.FAILED and "Traceback" not in done.stderr
    assert "holds no trained decoder; train it: python -m unclip_jax.train" in done.stderr
