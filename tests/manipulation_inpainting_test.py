"""Images filled, continued, edited, ranked and led by CLIP: what must stay, in which order, and what is refused."""

import itertools
import json
import types

import jax
import numpy as np
import pytest
import untrained_models
from PIL import Image
from small_configs import small

from unclip_jax import parts, sharding, unclip
from unclip_jax.errors import InputError
from unclip_jax.manipulation import clip_guidance, edits, fillings, inpainting, masks, outpainting, reranking
from unclip_jax.manipulation.session import Session
from unclip_jax.stages import base

CAPTIONS = ["a small red star on a white background", "a large blue ring on a grey background"]
# One level in the U-Nets and no text encoder, for networks have tests of their own; images of 16, then of 32 pixels.
DECODER = {"model__unet__channel_mult": (1,), "model__unet__attention_resolutions": (), "model__text": None}


@pytest.fixture(scope="module")
def model():
    cases = {
        "clip": ("clip", {}),
        "clip_noised": ("clip_noised", {}),
        "decoder": ("decoder", DECODER),
        "upsampler_1": ("upsampler", {"unet__channel_mult": (1,)}),
    }
    everywhere = sharding.replicated(sharding.make_mesh({"data": -1}, jax.local_devices()))
    found = {}
    for name, (case, changes) in cases.items():
        config = small(case, **changes)
        stage = base.create(config)
        weights = jax.device_put(untrained_models.drawn(stage, 0), everywhere)
        found[name] = parts.Part(name, name, stage, config, weights, {}, 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts, "_check_weights", lambda *_: None)  # no run says what its decoder read
        yield unclip.UnCLIP(found, microbatch=8)


def pictures(count, height=32, width=32, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, height, width, 3), np.uint8)


def saved(path, mask):
    Image.fromarray(np.uint8(255 * mask)).save(path)
    return str(path)


def test_what_is_known_stays_bit_for_bit_at_every_size_and_the_rest_is_drawn(model):
    images = pictures(2)
    fill = np.stack([masks.box([8, 4, 32, 20], height=32, width=32), masks.box([1, 1, 3, 32], height=32, width=32)])
    made = inpainting.inpaint(model, images, fill, CAPTIONS, prior="none", ids=[3, 4])
    assert {name: x.shape[1] for name, x in made.images.items()} == {"decoder": 16, "upsampler_1": 32}
    np.testing.assert_array_equal(made.last[~fill], images[~fill])
    assert (made.last[fill] != images[fill]).mean() > 0.9
    # At 16 pixels a pixel is kept where all four that it covers are known, and is their mean.
    blocks = images.reshape(2, 16, 2, 16, 2, 3).astype(float)
    unknown = fill.reshape(2, 16, 2, 16, 2).any((2, 4))
    kept = np.abs(made.images["decoder"] - blocks.mean((2, 4)))[~unknown]
    assert kept.max() <= 0.5 and len(kept)
    # What was there before plays no part in what is drawn.
    other = np.where(fill[..., None], pictures(2, seed=9), images)
    again = inpainting.inpaint(model, other, fill, CAPTIONS, z_i=made.z_i, ids=[3, 4])
    np.testing.assert_array_equal(again.last, made.last)
    elsewhere = np.where(fill[..., None], images, pictures(2, seed=9))
    assert (inpainting.inpaint(model, elsewhere, fill, CAPTIONS, z_i=made.z_i, ids=[3, 4]).last != made.last)[
        fill
    ].any()


def test_masks_are_white_where_to_fill_and_of_their_pictures_size(tmp_path):
    mask = np.zeros((20, 30), bool)
    mask[3:9, 5:12] = True
    np.testing.assert_array_equal(masks.read(saved(tmp_path / "m.png", mask), height=20, width=30), mask)
    np.testing.assert_array_equal(masks.box(masks.parse_box("5,3,12,9"), height=20, width=30), mask)
    for path, says in (
        (saved(tmp_path / "small.png", mask[:10]), "has 30 x 10 pixels, its picture 30 x 20"),
        (saved(tmp_path / "none.png", mask & False), "is empty, so there is nothing to fill"),
        (saved(tmp_path / "all.png", mask | True), "covers the whole picture"),
        (str(tmp_path / "nowhere.png"), "cannot be read"),
    ):
        with pytest.raises(InputError, match=says):
            masks.read(path, height=20, width=30)
    for text, says in (
        ("1,2,3", "has 3 numbers"), ("a,b,c,d", "not four whole numbers"), ("5,3,5,9", "0 <= x0 < x1 <= 30"),
        ("0,0,31,9", "none in a picture of 30 x 20"), ("0,0,30,20", "covers the whole picture"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=says):
            masks.box(masks.parse_box(text), height=20, width=30)


@pytest.mark.parametrize("size", [7, 20, 33])
def test_a_mask_at_another_size_hides_all_that_it_hid(size):
    """Against the rule itself, in fractions of the picture, for every pair of pixels."""
    mask = np.zeros((20, 30), bool)
    mask[4, 8] = mask[10:13, 20:24] = True
    reduced = masks.square(mask, size=size)
    pixels = np.argwhere(mask[:, 5:25])
    for y, x in itertools.product(range(size), repeat=2):
        touched = any(
            a * size < (y + 1) * 20 and y * 20 < (a + 1) * size and b * size < (x + 1) * 20 and x * 20 < (b + 1) * size
            for a, b in pixels
        )
        assert reduced[y, x] == touched
    with pytest.raises(InputError, match="the mask, in the central square .* is empty"):
        masks.square(np.broadcast_to(np.arange(30) < 5, (20, 30)), size=size)


def test_what_does_not_fit_is_refused(model):
    image, fill = pictures(1), np.zeros((1, 32, 32), bool)
    fill[:, :4] = True
    for arguments, says in (
        ((image[:, :16, :16], fill, CAPTIONS[:1]), "16 x 16 pixels, the model fills those of 32 x 32"),
        ((image, fill[:, :16, :16], CAPTIONS[:1]), "the masks have 16 x 16 pixels, their images 32 x 32"),
        ((image, fill & False, CAPTIONS[:1]), "mask 0 is empty"),
        ((image, fill | True, CAPTIONS[:1]), "mask 0 covers the whole"),
        ((image, fill, CAPTIONS), "1 images, 1 masks and 2 captions"),
    ):
        with pytest.raises(InputError, match=says):
            inpainting.inpaint(model, *arguments, prior="none")


@pytest.mark.parametrize(
    ("start", "length", "size"), [(0, 32, 48), (16, 32, 48), (5, 40, 90), (30, 7, 64), (0, 64, 64)]
)
@pytest.mark.parametrize("stride", [8, 16, 29])
def test_windows_cover_the_canvas_and_each_begins_with_something_known(start, length, size, stride):
    side = 32
    columns = outpainting.places(start, length, size, side=side, stride=stride)
    assert columns[0] == 0 and columns[-1] == size - side and np.diff(columns).max(initial=0) <= stride
    known = np.zeros((40, size), bool)
    known[:, start : start + length] = True
    rows = outpainting.places(0, 40, 40, side=side, stride=stride)
    filled = known.copy()
    for window in outpainting.windows(known, rows, columns, side=side):
        assert filled[window].any() and not filled[window].all() and filled[window].shape == (side, side)
        filled[window] = True
    assert filled.all() and known.sum() == 40 * length


def test_an_outpainted_image_holds_the_image_bit_for_bit(model):
    images = pictures(2, 32, 24)
    made = outpainting.outpaint(model, images, CAPTIONS, left=10, bottom=8, right=3, prior="none", ids=[1, 2])
    assert made.shape == (2, 40, 37, 3)
    np.testing.assert_array_equal(made[:, :32, 10:34], images)
    assert made[:, :, :10].std() > 1 and made[:, 32:].std() > 1 and (made[0, :, :10] != made[1, :, :10]).any()
    for added, says in (({}, "nothing to add"), ({"left": -1}, "nothing to add"), ({"left": 4}, "28 x 32 pixels")):
        with pytest.raises(InputError, match=says):
            outpainting.outpaint(model, images, CAPTIONS, prior="none", **added)
    with pytest.raises(InputError, match="share from 0.1 to 0.9"):
        outpainting.outpaint(model, images, CAPTIONS, left=10, overlap=1, prior="none")


@pytest.mark.parametrize(("text", "pixels"), [("16", 16), ("0.5", 20), ("25%", 10), ("0", 0), ("1", 1), ("1.0", 40)])
def test_extents_are_pixels_or_shares(text, pixels):
    assert outpainting.extent(text, of=40) == pixels


@pytest.mark.parametrize("text", ["half", "-0.5", "-3", "inf", "nan", ""])
def test_an_extent_that_is_none_is_refused(text):
    with pytest.raises(InputError, match="give pixels"):
        outpainting.extent(text, of=40)


def test_edits_follow_one_another_and_leave_what_none_of_them_fills(model, tmp_path):
    images = pictures(2)
    saved(tmp_path / "right.png", np.arange(32)[None] + np.zeros((32, 1)) >= 20)
    entries = [{"prompt": CAPTIONS[0], "box": [0, 0, 12, 32]}, {"prompt": CAPTIONS[1], "mask": "right.png"}]
    lines, whole = tmp_path / "edits.jsonl", tmp_path / "edits.json"
    lines.write_text("\n".join(json.dumps(entry) for entry in entries) + "\n\n")
    whole.write_text(json.dumps(entries))
    read = edits.read(str(lines), height=32, width=32)
    for one, other in zip(read, edits.read(str(whole), height=32, width=32), strict=True):
        assert one.prompt == other.prompt and np.array_equal(one.mask, other.mask)
    first, second = edits.edit(model, images, read, prior="none", ids=[7, 8])
    np.testing.assert_array_equal(second[:, :, 12:20], images[:, :, 12:20])
    np.testing.assert_array_equal(second[:, :, :20], first[:, :, :20])
    assert (first[:, :, :12] != images[:, :, :12]).any() and (second[:, :, 20:] != images[:, :, 20:]).any()
    # As if the second alone were asked of what the first left.
    ids = [unclip.image_id("edit 1", number) for number in (7, 8)]
    again = inpainting.inpaint(model, first, np.stack([read[1].mask] * 2), [CAPTIONS[1]] * 2, prior="none", ids=ids)
    np.testing.assert_array_equal(again.last, second)
    with pytest.raises(InputError, match="no edit"):
        edits.edit(model, images, [])


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "holds no edit"),
        ("{", "is no JSON"),
        ('{"prompt": "x"}', "edit 1 of .* is not an object with a prompt, and either a box or a mask"),
        ('[{"prompt": "x", "box": [0, 0, 4, 4]}, {"prompt": 3, "box": [0, 0, 4, 4]}]', "edit 2 of .* is not an object"),
        ('{"prompt": " ", "box": [0, 0, 4, 4]}', "edit 1 of .* has an empty prompt"),
        ('{"prompt": "x", "box": "0,0,4,4"}', "edit 1 of .* not a list of four"),
        ('{"prompt": "x", "box": [0, 0, 40, 4]}', "edit 1 of .*none in a picture of 32 x 32"),
        ('{"prompt": "x", "box": [0, 0, 4, 4], "sed": 1}', "edit 1 of .* no key 'sed'"),
        ('{"prompt": "x", "mask": "nowhere.png"}', "edit 1 of .*nowhere.png.* cannot be read"),
    ],
)
def test_edits_that_cannot_be_read_are_named(text, says, tmp_path):
    path = tmp_path / "edits.json"
    path.write_text(text)
    with pytest.raises(InputError, match=says):
        edits.read(str(path), height=32, width=32)
    with pytest.raises(InputError, match="cannot be read"):
        edits.read(str(tmp_path / "nowhere"), height=32, width=32)


def test_the_order_is_that_of_the_cosine_with_the_caption(model):
    rng = np.random.default_rng(0)
    z_t = rng.normal(size=(1, 8)).astype(np.float32)
    away = rng.normal(size=8)
    away -= away @ z_t[0] / (z_t @ z_t.T).item() * z_t[0]
    angles = np.array([1.0, 0.1, 3.0, 0.5, 2.0])  # planted, with lengths that must not matter
    unit = z_t[0] / np.linalg.norm(z_t), away / np.linalg.norm(away)
    lengths = np.array([[9], [1], [5], [2], [7]])
    z_i = lengths * (np.cos(angles)[:, None] * unit[0] + np.sin(angles)[:, None] * unit[1])
    ranking = reranking.rank(np.float32(z_i), z_t)
    assert ranking.order.tolist() == [1, 3, 0, 4, 2]
    np.testing.assert_allclose(ranking.similarity, np.cos(angles), atol=1e-5)
    assert reranking.rank(np.ones((4, 8), np.float32), z_t).order.tolist() == [0, 1, 2, 3]
    images = pictures(5, 48, 40)
    found = reranking.rerank(model, list(images), CAPTIONS[0])
    squares, words = model.embed_images(images), model.embed_text([CAPTIONS[0]])[0]
    brute = [float(z @ words / np.linalg.norm(z) / np.linalg.norm(words)) for z in squares]
    assert found.order.tolist() == sorted(range(5), key=lambda n: -brute[n])
    with pytest.raises(InputError, match="no image to rank"):
        reranking.rerank(model, [], CAPTIONS[0])


def test_a_noised_clip_leads_the_chain_and_keeps_what_is_known(model, monkeypatch):
    """One that likes red leads to red: in its place stands a similarity of which the gradient is known."""
    monkeypatch.setattr(
        model.part("clip_noised").stage, "logits", lambda params, x_t, t, toward: x_t[..., 0].mean((1, 2))
    )
    led = clip_guidance.guided(model)
    z_i = model.embed_text(CAPTIONS)
    images, fill = pictures(2), np.zeros((2, 32, 32), bool)
    fill[:, 8:24] = True
    red = []
    for scale in (0.0, 200.0, -200.0):
        extra = clip_guidance.towards(led, CAPTIONS[::-1], scale=scale)
        made = inpainting.inpaint(led, images, fill, CAPTIONS, z_i=z_i, ids=[1, 2], extra=extra)
        np.testing.assert_array_equal(made.last[~fill], images[~fill])
        red.append(made.images["decoder"][:, 4:12, :, 0].mean())
    assert red[1] > red[0] + 5 and red[2] < red[0] - 5
    # Scale 0 is the unguided model, but for the rounding of another program.
    plain = inpainting.inpaint(model, images, fill, CAPTIONS, z_i=z_i, ids=[1, 2]).images["decoder"]
    np.testing.assert_allclose(red[0], plain[:, 4:12, :, 0].mean(), atol=0.1)
    wanted = extra["decoder"]["toward"]
    tokens = model.tokenize(CAPTIONS[::-1], "clip_noised", context_length=24)
    np.testing.assert_array_equal(wanted, model.predictor.run("clip_noised", "z_t", {"clip_tokens": tokens}))
    with pytest.raises(InputError, match="3 scales of guidance were given for 2 images"):
        clip_guidance.to_embeddings(wanted, scale=[1.0, 2.0, 3.0])
    toward = clip_guidance.towards_images(led, list(images), scale=[1.0, 2.0])["decoder"]
    np.testing.assert_allclose(np.linalg.norm(toward["toward"], axis=1), 1, atol=1e-5)
    assert toward["clip_guidance_scale"].tolist() == [1, 2]


def test_without_a_noised_clip_the_command_that_trains_one_is_named(model):
    kept = {name: part for name, part in model.parts.items() if name != "clip_noised"}
    with pytest.raises(InputError, match="configs/clip.py:tiny_noised --workdir=.*/clip_noised$"):
        clip_guidance.guided(unclip.UnCLIP(kept, models="runs/mine"))


class Options:
    """Values of flags, as absl has them: attributes, and by name with whether they were given."""

    def __init__(self, out, /, **given):
        self._given = given
        self._values = {
            "models": "runs/mine", "out": str(out), "image": [], "caption": [], "mask": [], "box": [], "samples": 1,
            "seed": 0, "prior": "none", "negative_prompt": None, "clip_guidance_scale": 0.0, "last": None, "keep": None,
            "weights": "ema", "batch_size": 8, "devices_per_image": 1, "format": ["sheet"], "fps": 12.0, "overlap": 0.5,
            "folder": None, "edits": None, **dict.fromkeys(outpainting.SIDES, "0"), **dict.fromkeys(fillings.OVERRIDES),
            **given,
        }  # fmt: skip

    def __getattr__(self, name):
        return self._values[name]

    def __getitem__(self, name):
        return types.SimpleNamespace(value=self._values[name], present=name in self._given)


@pytest.fixture
def command(model, monkeypatch, tmp_path):
    """Runs a command on the model that is loaded already; returns the folder of its results."""
    loaded = {name: part for name, part in model.parts.items() if name != "clip_noised"}
    monkeypatch.setattr(unclip.UnCLIP, "load", lambda models, **options: model)
    monkeypatch.setattr(unclip, "names_for", lambda models, priors: list(loaded))

    def run(name, **given):
        session = Session(name, Options(tmp_path / name, **given), {}, types.SimpleNamespace(poll=lambda: False))
        getattr(fillings, name)(session)
        return tmp_path / name

    return run


def read(path):
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB")), dict(picture.text)


def written(path, pixels):
    Image.fromarray(pixels).save(path)
    return str(path)


def test_the_command_inpaint_fills_what_the_mask_marks_and_goes_on_where_it_was(command, tmp_path):
    given = np.kron(pictures(1, 32, 40)[0], np.ones((2, 2, 1), np.uint8))  # the square is 32 pixels, twice as large
    mask = np.zeros((64, 80), bool)
    mask[20:41, 24:50] = True
    paths = {"image": [written(tmp_path / "a.png", given)], "mask": [saved(tmp_path / "m.png", mask)]}
    folder = command("inpaint", **paths, caption=CAPTIONS[:1], samples=2, seed=5)
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["00000-a-seed5.png", "00000-a-seed6.png", "manifest.json", "sheet.png"]
    made, text = read(folder / names[0])
    kept = ~mask[:, 8:72].reshape(32, 2, 32, 2).any((1, 3))
    np.testing.assert_array_equal(made[kept], given[::2, 8:72:2][kept])
    assert (made != given[::2, 8:72:2])[~kept].any() and (made != read(folder / names[1])[0])[~kept].any()
    assert (text["seed"], text["caption"], text["prior"]) == ("5", CAPTIONS[0], "none")
    (folder / names[1]).unlink()
    before = (folder / names[0]).stat().st_mtime_ns
    command("inpaint", **paths, caption=CAPTIONS[:1], samples=2, seed=5)
    assert (folder / names[0]).stat().st_mtime_ns == before and (folder / names[1]).exists()


def test_the_commands_outpaint_edit_and_rerank(command, tmp_path):
    given = pictures(2)
    paths = [written(tmp_path / f"{name}.png", image) for name, image in zip("ab", given, strict=True)]
    folder = command("outpaint", image=paths[:1], caption=CAPTIONS[:1], right="50%", top="8")
    made, _ = read(folder / "00000-a-seed0.png")
    assert made.shape == (40, 48, 3)
    np.testing.assert_array_equal(made[8:, :32], given[0])
    lines = tmp_path / "edits.jsonl"
    lines.write_text("\n".join(json.dumps({"prompt": said, "box": [0, 0, 8, 32]}) for said in CAPTIONS))
    folder = command("edit", image=paths[:1], edits=str(lines), format=["sheet", "gif"])
    states = [read(folder / f"00000-a-seed0-edit0{number}.png") for number in (0, 1)]
    assert [text["caption"] for _, text in states] == CAPTIONS and (states[0][0] != states[1][0]).any()
    with Image.open(folder / "00000-a-seed0.gif") as film:
        assert film.n_frames == 3
    (tmp_path / "many").mkdir()
    for number, image in enumerate(pictures(3, seed=4)):
        written(tmp_path / "many" / f"{number}.png", image)
    folder = command("rerank", image=paths, folder=str(tmp_path / "many"), caption=CAPTIONS[:1], keep=4)
    ranked = json.loads((folder / "manifest.json").read_text())["ranking"]
    scores = [row["similarity"] for row in ranked]
    assert scores == sorted(scores, reverse=True) and len(scores) == 4
    for row in ranked:
        np.testing.assert_array_equal(read(folder / row["file"])[0], read(row["picture"])[0])


@pytest.mark.parametrize(
    ("name", "given", "says"),
    [
        ("inpaint", {}, "needs --mask=FILE or --box"),
        ("inpaint", {"box": ["1,1,9,9"], "mask": ["m.png"]}, "and not both"),
        ("inpaint", {"box": ["1,1,9,9"] * 2}, "2 masks or boxes were given for 1 pictures"),
        ("inpaint", {"box": ["1,1,9,9"], "prior": "difusion"}, "--prior=difusion is unknown; did you mean 'diffusion'"),
        ("inpaint", {"box": ["1,1,9,9"], "last": "upsampler_2"}, "there is no such part; did you mean 'upsampler_1'"),
        ("inpaint", {"box": ["1,1,9,9"], "negative_prompt": " "}, "--negative_prompt is empty"),
        ("inpaint", {"box": ["1,1,9,9"], "caption": []}, "--caption is missing"),
        ("inpaint", {"box": ["1,1,9,9"], "size": 24}, "has 24 x 24 pixels, and the model draws 32 x 32"),
        ("outpaint", {}, "nothing to add"),
        ("edit", {"prior": "image"}, "use a prior that reads them"),
        ("rerank", {"image": []}, "no picture to rank"),
        ("rerank", {"caption": CAPTIONS}, "2 captions were given"),
        ("rerank", {"caption": [" "]}, "is empty"),
    ],
)
def test_what_a_command_cannot_do_is_refused_before_anything_is_drawn(command, tmp_path, name, given, says):
    image = written(tmp_path / "a.png", pictures(1, *[given.pop("size", 32)] * 2)[0])
    with pytest.raises(InputError, match=says):
        command(name, **{"image": [image], "caption": CAPTIONS[:1], **given})
    assert not [path for path in tmp_path.rglob("*seed*")]
