"""GLIDE's base and upsampler, imported and sampled as one chain, against `glide_oracle` on equal weights and noise."""

import json

import jax
import numpy as np
import pytest
import torch
from parity import glide_oracle

from unclip_jax import convert, unclip
from unclip_jax.data.tokenizer import Tokenizer
from unclip_jax.data.vocabulary import training
from unclip_jax.errors import InputError
from unclip_jax.importing import formats, glide
from unclip_jax.interop import glide_tables, names, tensors
from unclip_jax.models.decoder import Decoder

MERGES = [("r", "e"), ("re", "d"), ("Ġ", "red"), ("Ġ", "a"), ("c", "a"), ("ca", "t"), ("Ġ", "cat")]
LETTERS = list(training.byte_symbols())
SYMBOLS = [*LETTERS, *("".join(pair) for pair in MERGES), "<|endoftext|>"]
LENGTH = 8
TEXT = dict(rows=len(SYMBOLS), width=64, depth=2, length=LENGTH)
BASE = dict(in_channels=3, channels=64, mult=(1, 2), attends=(True, True), depth=1, text=TEXT)
UPSAMPLER = dict(in_channels=6, channels=32, mult=(1, 1, 2), attends=(False, False, True), depth=1, text=TEXT)
CAPTIONS = ["A red cat", "cat, cat, cat, cat, cat"]
STEPS = [999, 500, 0]


def ids(*symbols):
    return [SYMBOLS.index(symbol) for symbol in symbols]


# By hand: lower case, spaces belong to the word after them; the second is cut to the context, and no end is marked.
WORDS = [ids("a", "Ġred", "Ġcat"), ids("cat", ",", "Ġcat", ",", "Ġcat", ",", "Ġcat", ",")]


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vocabulary")
    (folder / "encoder.json").write_text(json.dumps({symbol: number for number, symbol in enumerate(SYMBOLS)}))
    (folder / "vocab.bpe").write_text("\n".join(["#version: 0.2", *(" ".join(pair) for pair in MERGES), ""]))
    return folder


def test_captions_are_bare_words(vocabulary):
    tokenizer = Tokenizer(str(vocabulary))
    end = len(SYMBOLS) - 1
    assert tokenizer.encode([*CAPTIONS, ""], LENGTH).tolist() == [
        WORDS[0] + [end] * (LENGTH - 3),
        WORDS[1],
        [end] * LENGTH,
    ]
    assert tokenizer.decode(tokenizer.encode(CAPTIONS[:1], LENGTH)[0]) == "a red cat" and tokenizer.bare


def noise(rng, side, steps):
    return rng.standard_normal((1, side, side, 3)), rng.standard_normal((1, steps, side, side, 3))


def theirs(x):
    return torch.tensor(np.moveaxis(np.asarray(x, np.float64), -1, -3))


def pixels(images):
    return np.moveaxis(((images.clamp(-1, 1) + 1) * 127.5).round().numpy(), 1, -1)


def test_the_chain_draws_what_theirs_draws(tmp_path, vocabulary, monkeypatch):
    monkeypatch.setattr(glide, "_ATTENDS_FROM", 8)  # pixels, not 32: small images
    weights = {}
    for name, sizes in (("decoder", BASE), ("upsampler_1", UPSAMPLER)):
        weights[name] = glide_oracle.random_weights(**sizes, seed=len(name))
        weights[name]["out.2.weight"] *= 0.2  # or nearly all pixels would be black or white
        path = tmp_path / f"{name}.pt"
        torch.save({key: torch.tensor(array) for key, array in weights[name].items()}, path)
        request = formats.Request("glide", str(path), vocabulary=str(vocabulary))
        assert convert.convert(request, str(tmp_path / "models" / name)) == {name: str(tmp_path / "models" / name)}
    fewer = {name: {"timesteps": str(len(STEPS))} for name in weights}
    model = unclip.UnCLIP.load(str(tmp_path / "models"), sampling=fewer)
    assert model.parts["upsampler_1"].config.sampling.temperature == 0.997
    rng = np.random.default_rng(0)
    given = {"decoder": noise(rng, 8, 2), "upsampler_1": noise(rng, 32, 2)}
    fed = {name: (x_T.astype(np.float32), steps.astype(np.float32)) for name, (x_T, steps) in given.items()}
    made = model.generate(CAPTIONS[1:], prior="dropped", noise=fed).images

    doubled = {name: {key: torch.tensor(w).double() for key, w in w.items()} for name, w in weights.items()}
    base, upsampler = doubled["decoder"], doubled["upsampler_1"]
    said, unsaid = glide_oracle.read(base, WORDS[1:]), glide_oracle.read(base, [[]])

    def guided(x, t):
        told, free = (glide_oracle.unet(base, x, torch.tensor([float(t)]).double(), c) for c in (said, unsaid))
        return free[:, :3] + 3.0 * (told[:, :3] - free[:, :3]), told[:, 3:]

    x_T, steps = theirs(given["decoder"][0]), theirs(given["decoder"][1]).transpose(0, 1)
    small = pixels(glide_oracle.sample(guided, x_T, steps, timesteps=STEPS, schedule="cosine"))
    again = glide_oracle.read(upsampler, WORDS[1:])
    low_res = theirs(made["decoder"] / 127.5 - 1)
    enlarged = torch.nn.functional.interpolate(low_res, (32, 32), mode="bilinear", align_corners=False)

    def plain(x, t):
        out = glide_oracle.unet(upsampler, torch.cat([x, enlarged], 1), torch.tensor([float(t)]).double(), again)
        return out[:, :3], out[:, 3:]

    x_T = 0.997 * theirs(given["upsampler_1"][0])
    large = pixels(glide_oracle.sample(plain, x_T, None, timesteps=STEPS, schedule="linear"))
    for found, wanted in ((made["decoder"], small), (made["upsampler_1"], large)):
        apart = np.abs(found - wanted)
        assert apart.max() <= 1 and apart.mean() < 0.01
        assert wanted.std() > 20 and np.mean((wanted > 0) & (wanted < 255)) > 0.01, "images that say nothing"


@pytest.mark.parametrize("name, sizes", [("decoder", BASE), ("upsampler_1", UPSAMPLER)])
def test_inpainting_is_theirs(tmp_path, vocabulary, monkeypatch, name, sizes):
    """Known pixels come back as they are; the network reads them and the mask between the noise and the small image."""
    monkeypatch.setattr(glide, "_ATTENDS_FROM", 8)
    arrays = glide_oracle.random_weights(**sizes | {"in_channels": sizes["in_channels"] + 4}, seed=5)
    arrays["out.2.weight"] *= 0.2
    torch.save({key: torch.tensor(array) for key, array in arrays.items()}, tmp_path / "x.pt")
    request = formats.Request("glide", str(tmp_path / "x.pt"), vocabulary=str(vocabulary))
    convert.convert(request, str(tmp_path / "models" / name))
    sampling = {"timesteps": "2", **({"guidance_scale": 1.0} if name == "decoder" else {})}
    model = unclip.UnCLIP.load(str(tmp_path / "models"), sampling={name: sampling})
    stage = model.parts[name].stage
    side, rng = stage.side, np.random.default_rng(1)
    known = rng.integers(0, 256, (1, side, side, 3), np.uint8)
    mask = np.zeros((1, side, side), np.uint8)
    mask[:, 1:5, 2:] = 1
    fields = {"known": known, "known_mask": mask, "tokens": Tokenizer(str(vocabulary)).encode(CAPTIONS[:1], LENGTH)}
    small = rng.integers(0, 256, (1, side // 4, side // 4, 3), np.uint8)
    if name == "upsampler_1":
        fields["low_res"] = small
    x_T, steps = (array.astype(np.float32) for array in noise(rng, side, 1))
    made = model.predictor.run(name, "sample", fields, noise={name: (x_T, steps)})

    weights = {key: torch.tensor(w).double() for key, w in arrays.items()}
    caption = glide_oracle.read(weights, WORDS[:1])
    there = torch.tensor(mask).double()[:, None]
    part = theirs(known / 127.5 - 1) * there
    enlarged = torch.nn.functional.interpolate(theirs(small / 127.5 - 1), (side, side), mode="bilinear")
    above = [enlarged] if name == "upsampler_1" else []

    def predict(x, t):
        read, time = torch.cat([x, part, there, *above], 1), torch.tensor([float(t)]).double()
        out = glide_oracle.unet(weights, read, time, caption)
        eps, bar = out[:, :3], glide_oracle.alpha_bars(schedule)[t]
        # The eps of the x_start that it would be with what is known put back.
        kept = torch.where(there > 0, part, (x - np.sqrt(1 - bar) * eps) / np.sqrt(bar))
        return (x - np.sqrt(bar) * kept) / np.sqrt(1 - bar), out[:, 3:]

    schedule, temperature = ("linear", 0.997) if above else ("cosine", 1.0)
    start, drawn = temperature * theirs(x_T), theirs(steps).transpose(0, 1)
    wanted = pixels(glide_oracle.sample(predict, start, drawn, timesteps=[999, 0], schedule=schedule))
    assert np.abs(made - wanted).max() <= 1
    assert np.array_equal(made[mask > 0], known[mask > 0]) and not np.array_equal(made[mask == 0], known[mask == 0])


def test_names_go_back_as_they_came():
    arrays = glide_oracle.random_weights(**BASE, seed=0)
    state = {name: tensors.Tensor.of(array) for name, array in arrays.items()}
    network = Decoder(unet=glide.unet_fields(state), text=glide.text_fields(state), embed_dim=0, clip_tokens=0)
    shapes = jax.eval_shape(
        lambda key: network.init(
            key, jax.numpy.zeros((1, 32, 32, 3)), jax.numpy.zeros(1, int), jax.numpy.zeros((1, LENGTH), int), None
        ),
        jax.random.key(0),
    )["params"]
    table = glide_tables.glide(network)
    back = names.exported(table, names.imported(table, state, shapes))
    assert set(back) == set(arrays) and all(np.array_equal(back[name].read(), arrays[name]) for name in arrays)


def test_published_sizes_are_read_off_the_weights():
    """Those of the published base and upsampler (glide_text2im/model_creation.py), from shapes alone."""
    text = dict(rows=50257, width=512, depth=16, length=128)
    published = {
        (3, (1, 2, 3, 4), (False, True, True, True), 3): dict(image_size=64, attention_resolutions=(32, 16, 8)),
        (6, (1, 1, 2, 2, 4, 4), (False,) * 3 + (True,) * 3, 2): dict(image_size=256, attention_resolutions=(32, 16, 8)),
    }
    for (in_channels, mult, attends, depth), wanted in published.items():
        sizes = dict(in_channels=in_channels, channels=2, mult=mult, attends=attends, depth=depth)
        arrays = glide_oracle.random_weights(**sizes, text=dict(text, rows=5, width=64, depth=1), seed=0)
        fields = glide.unet_fields({name: tensors.Tensor.of(array) for name, array in arrays.items()})
        assert fields["channel_mult"] == mult and fields["depth"] == depth
        assert {name: fields[name] for name in wanted} == wanted


def test_what_is_not_glides_is_refused(tmp_path, vocabulary):
    arrays = glide_oracle.random_weights(**BASE, seed=0)
    for change, says in (
        ({"input_blocks.0.0.weight": np.zeros((64, 5, 3, 3))}, "reads 5 channels"),
        ({"output_blocks.1.2.in_layers.0.weight": None}, "levels cannot be told apart"),
        ({"extra": np.zeros(3)}, "1 left over: extra"),
    ):
        changed = {name: torch.tensor(w) for name, w in (arrays | change).items() if w is not None}
        torch.save(changed, tmp_path / "x.pt")
        with pytest.raises(InputError, match=says):
            next(glide.glide(formats.Request("glide", str(tmp_path / "x.pt"), vocabulary=str(vocabulary))))
