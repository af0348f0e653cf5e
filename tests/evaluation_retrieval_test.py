"""Retrieval against a plain loop over sets, with captions and images that come more than once."""

import numpy as np
import pytest
from evaluated import Examples, create, run, unit

from unclip_jax.errors import InputError
from unclip_jax.evaluation import retrieval


def by_hand(queries, candidates, relevant):
    """Position, from 0, of the first relevant candidate in a stable order by likeness; rows are compared as a whole."""
    found = []
    for number, query in enumerate(queries):
        likeness = [float(np.dot(query.astype(np.float64), c.astype(np.float64))) for c in candidates]
        order = sorted(range(len(candidates)), key=lambda j: (-likeness[j], j))
        found.append(min(order.index(j) for j in relevant[number]))
    return np.array(found)


@pytest.mark.parametrize("block", [1, 7 * 13, 1 << 24])
def test_ranks_are_those_of_a_sorted_list(monkeypatch, block):
    monkeypatch.setattr(retrieval, "_BLOCK", block)
    rng = np.random.default_rng(0)
    # Whole numbers: products are exact, and many are equal.
    queries = rng.integers(-2, 3, (23, 4)).astype(np.float32)
    candidates = rng.integers(-2, 3, (13, 4)).astype(np.float32)
    relevant = [set(rng.choice(13, rng.integers(1, 4), replace=False)) for _ in queries]
    pairs = np.array([(number, j) for number, own in enumerate(relevant) for j in own])
    rng.shuffle(pairs)
    np.testing.assert_array_equal(retrieval.ranks(queries, candidates, pairs), by_hand(queries, candidates, relevant))


def test_what_is_no_number_is_never_found():
    nothing = np.full((3, 2), np.nan, np.float32)
    something = np.ones((3, 2), np.float32)
    pairs = np.stack([np.arange(3)] * 2, 1)
    assert retrieval.ranks(nothing, something, pairs).tolist() == [3, 3, 3]
    assert retrieval.ranks(something, np.concatenate([something[:2], nothing[:1]]), pairs).tolist() == [1, 2, 3]


def measured(pictures, captions, images, texts, **options):
    """Scores of pairs (number of an image, number of a caption)."""
    data = Examples(picture=pictures[images], caption=captions[texts])
    return run("retrieval", data, examples=len(images), recall_at=(1, 2, 5), **options)


def expected(queries, candidates, own):
    """Over numbered queries and candidates: R@1, R@2, R@5 and the median rank."""
    found = by_hand(queries, candidates, own)
    return [*((found < k).mean() for k in (1, 2, 5)), np.median(found + 1)]


KEYS = ("r1", "r2", "r5", "median_rank")


@pytest.mark.parametrize("masked", [(), (0, 10)])
def test_captions_and_images_may_repeat(masked):
    rng = np.random.default_rng(1)
    pictures, captions = unit(rng, 9), unit(rng, 8)
    captions[:4] = pictures[:4] + 0.3 * unit(rng, 4)
    # Image 0 has three captions; captions 1 and 5 belong to several images; one pair comes twice.
    images = np.array([0, 0, 1, 2, 3, 0, 4, 5, 6, 1, 7, 8, 8])
    texts = np.array([0, 4, 1, 1, 3, 5, 5, 5, 6, 1, 2, 7, 3])
    kept = [row for row in range(len(images)) if row not in masked]
    data = Examples(picture=pictures[images], caption=captions[texts], masked=masked)
    scores = run("retrieval", data, examples=len(images), recall_at=(1, 2, 5))
    order_i, order_t = list(dict.fromkeys(images[kept])), list(dict.fromkeys(texts[kept]))
    texts_of = [{order_t.index(texts[row]) for row in kept if images[row] == i} for i in order_i]
    images_of = [{order_i.index(images[row]) for row in kept if texts[row] == t} for t in order_t]
    ways = {
        "image_to_text": expected(pictures[order_i], captions[order_t], texts_of),
        "text_to_image": expected(captions[order_t], pictures[order_i], images_of),
    }
    assert scores == {f"{way}_{key}": pytest.approx(value) for way, values in ways.items()
                      for key, value in zip(KEYS, values, strict=True)}  # fmt: skip


def test_without_repetition_it_is_the_plain_share_of_own_captions_that_are_nearest():
    rng = np.random.default_rng(2)
    pictures, captions = unit(rng, 11), unit(rng, 11)
    captions[:6] = pictures[:6]  # these find their own first
    scores = measured(pictures, captions, np.arange(11), np.arange(11))
    likeness = pictures.astype(np.float64) @ captions.astype(np.float64).T
    own = np.diag(likeness)
    assert scores["image_to_text_r1"] == np.mean(likeness.max(1) == own) >= 6 / 11
    assert scores["text_to_image_r1"] == np.mean(likeness.max(0) == own) >= 6 / 11
    assert scores["image_to_text_median_rank"] == np.median((likeness >= own[:, None]).sum(1))


def test_equal_captions_cannot_be_told_apart_and_need_not_be():
    """A perfect model: plain R@1 would give it 3 of 12, the share of first among equals."""
    z = np.eye(3, dtype=np.float32)
    kinds = np.arange(12) % 3
    pictures = z[kinds] + 0.01 * unit(np.random.default_rng(0), 12)  # twelve images, three captions
    scores = measured(pictures, z, np.arange(12), kinds)
    assert scores["image_to_text_r1"] == scores["text_to_image_r1"] == 1
    assert scores["text_to_image_median_rank"] == 1


def test_a_model_that_says_always_the_same_is_at_chance():
    same = {name: lambda params, frozen, batch, rng: np.ones((4, 3), np.float32) for name in ("z_i", "z_t")}
    rng = np.random.default_rng(0)
    scores = measured(unit(rng, 10), unit(rng, 10), np.arange(10), np.arange(10), predict=same)
    for way in ("image_to_text", "text_to_image"):
        assert [scores[f"{way}_{key}"] for key in KEYS] == [0.1, 0.2, 0.5, 5.5]


def test_more_than_there_is_cannot_be_asked_for(caplog):
    rng = np.random.default_rng(0)
    data = Examples(picture=unit(rng, 9), caption=unit(rng, 3)[np.arange(9) % 3])
    with pytest.raises(InputError, match="recall_at has 10, but retrieval is among 9 pairs"):
        create("retrieval", data)
    with pytest.raises(InputError, match="recall_at has 5, but retrieval is among 4 pairs"):
        create("retrieval", data, examples=4, recall_at=(1, 5))
    # How many of the pairs are different is seen when they are read.
    scores = run("retrieval", data, recall_at=(1, 5))
    assert "image_to_text_r1" in scores and "text_to_image_r5" in scores and "image_to_text_r5" not in scores
    assert "image_to_text: no R@5, for the split has 3 different ones" in caplog.text
