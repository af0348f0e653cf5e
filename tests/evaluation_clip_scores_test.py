"""CLIP scores against loops and the published definitions; R-precision's draw and its counting."""

import math

import numpy as np
import pytest

from unclip_jax.errors import InputError
from unclip_jax.evaluation import clip_scores


def embeddings(count, width=6, *, seed=0):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((count, width)).astype(np.float32), rng.standard_normal((count, width))


def cosines(images, texts):
    return [
        sum(float(a) * float(b) for a, b in zip(x, y, strict=True)) / math.sqrt(sum(x * x) * sum(y * y))
        for x, y in zip(images.astype(np.float64), texts, strict=True)
    ]


# Factor, whether negative cosines are 0, and prefix, as their publishers have them.
PUBLISHED = {
    "glide": (100, False, ""),
    "karlo": (1, False, ""),
    "t2ib": (1, False, ""),
    "hessel": (2.5, True, "A photo depicts "),
    "gigagan": (1, False, "A photo depicts "),
    "torchmetrics": (100, True, ""),
    "mlperf": (1, False, ""),
}


@pytest.mark.parametrize("name", clip_scores.DEFINITIONS)
def test_each_definition_is_its_publishers(name):
    images, texts = embeddings(40)
    scale, floor, prefix = PUBLISHED[name]
    values = [scale * (max(cosine, 0) if floor else cosine) for cosine in cosines(images, texts)]
    definition = clip_scores.named(name)
    found = definition.measured(images, texts)
    assert found.value == pytest.approx(np.mean(values), rel=1e-6)
    assert found.standard_error == pytest.approx(np.std(values, ddof=1) / math.sqrt(40), rel=1e-6)
    assert min(cosines(images, texts)) < 0  # so that the floor shows
    assert definition.captions(["a fox"]) == [prefix + "a fox"]
    longer = definition.measured(3 * images, 0.1 * texts).value
    assert longer == pytest.approx(found.value, rel=1e-6)


def test_a_definitions_name_says_what_it_is():
    names = {definition.name for definition in clip_scores.DEFINITIONS.values()}
    assert len(names) == len(clip_scores.DEFINITIONS) == 7
    assert clip_scores.named("glide").name == "CLIP score (OpenAI ViT-B/16, no prefix, 100 cos)"
    hessel = clip_scores.named("hessel").of_model("runs/clip")
    assert hessel.name == "CLIP score (runs/clip, 'A photo depicts ', 2.5 max(cos, 0))"
    assert clip_scores.named("karlo").name.endswith("no prefix, cos)")


def test_a_plain_score():
    images = np.eye(3)
    assert clip_scores.score(images, 5 * images, 100.0) == pytest.approx(100)
    assert clip_scores.score(images, -images, 2.0) == -2
    assert clip_scores.score(images, -images, 2.0, floor=True) == 0


CAPTIONS = [f"caption {number % 130}" for number in range(200)]  # 130 different ones


def test_the_draw_is_of_other_captions():
    drawn = clip_scores.draw(CAPTIONS)
    assert drawn.shape == (200, 99)
    for row, others in enumerate(drawn):
        texts = {CAPTIONS[other] for other in others}
        assert len(texts) == 99 and CAPTIONS[row] not in texts
    assert not np.array_equal(drawn[0], drawn[130])  # images of one caption have draws of their own
    np.testing.assert_array_equal(drawn, clip_scores.draw(CAPTIONS))
    np.testing.assert_array_equal(drawn[:150], clip_scores.draw(CAPTIONS[:150]))  # the same distinct captions
    assert not np.array_equal(drawn, clip_scores.draw(CAPTIONS, seed=1))
    few = clip_scores.draw(["a", "b", "a", "c"], others=2)
    assert [sorted(row) for row in few.tolist()] == [[1, 3], [0, 3], [1, 3], [0, 1]]
    counts = np.bincount(drawn.reshape(-1), minlength=130)
    assert counts.max() - counts.min() < 70 and np.all(counts[130:] == 0)  # of 152 each, on average


@pytest.mark.parametrize("gathered", [1, 1 << 24])
def test_r_precision_is_the_share_of_own_captions_that_win(monkeypatch, gathered):
    monkeypatch.setattr(clip_scores, "_GATHERED", gathered)
    images, texts = embeddings(60, seed=1)
    texts[:20] = images[:20] + 0.5 * texts[:20]
    drawn = clip_scores.draw([str(number) for number in range(60)], others=9)
    hits = []
    for row, image in enumerate(images):
        everything = [row, *drawn[row]]
        likeness = cosines(np.stack([image] * 10), texts[everything])
        hits.append(max(likeness) == likeness[0])
    found = clip_scores.measured_r_precision(images, texts, drawn)
    assert found.value == clip_scores.r_precision(images, texts, drawn) == np.mean(hits)
    assert 0.1 < found.value < 0.9
    assert found.standard_error == pytest.approx(math.sqrt(found.value * (1 - found.value) / 59), rel=1e-9)


def test_perfect_and_constant_models():
    images = np.random.default_rng(2).standard_normal((150, 8))
    drawn = clip_scores.draw([str(number) for number in range(150)])
    assert clip_scores.r_precision(images, images, drawn) == 1
    assert clip_scores.r_precision(images, -images, drawn) == 0
    assert clip_scores.r_precision(images, np.ones((150, 8)), drawn) == pytest.approx(0.01)
    assert clip_scores.r_precision(np.ones((150, 8)), images, drawn) < 0.05  # at chance, but for one caption or two


Z = np.random.default_rng(3).standard_normal((5, 4))
DRAWN = np.zeros((5, 2), np.int64)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: clip_scores.named("glid"), "no CLIP score 'glid'; did you mean 'glide'"),
        (lambda: clip_scores.score(Z, Z[:4]), "5 images and 4 captions are no pairs"),
        (
            lambda: clip_scores.score(Z, Z[:, :3]),
            "embeddings have 4 dimensions, the captions' 3: they are of two CLIPs",
        ),
        (lambda: clip_scores.score(Z * 0, Z), "images' embeddings are zeros in row 0"),
        (lambda: clip_scores.score(Z, Z * np.nan), "captions' embeddings are not finite"),
        (lambda: clip_scores.draw(["a"] * 300), "99 others, but there are 1 different captions"),
        (lambda: clip_scores.r_precision(Z, Z, DRAWN[:4]), "not those of 5 images"),
        (lambda: clip_scores.r_precision(Z, Z, DRAWN + 5), "not those of 5 images"),
    ],
)
def test_bad_input_gets_a_sentence(call, says):
    with pytest.raises(InputError, match=says):
        call()
