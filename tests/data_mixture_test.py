"""Data sets mixed by weights: exact proportions, each set's own epochs, and no difference by host, worker or resume."""

import collections
import fractions
import io

import jax
import numpy as np
import pytest
import scipy.stats
from ml_collections import ConfigDict
from PIL import Image

from unclip_jax import config as configs
from unclip_jax import inputs, program, sharding
from unclip_jax.data import order, pipeline, sources
from unclip_jax.errors import InputError

BATCH = 8
SPEC = {
    "image": jax.ShapeDtypeStruct((BATCH, 8, 8, 3), np.uint8),
    "low_res": jax.ShapeDtypeStruct((BATCH, 4, 4, 3), np.uint8),
    "id": jax.ShapeDtypeStruct((BATCH,), np.uint32),
}


def records(level, count, *, broken=()):
    """Flat pictures of (level, index, 0)."""
    made = []
    for index in range(count):
        buffer = io.BytesIO()
        Image.new("RGB", (16, 16), (level, index, 0)).save(buffer, format="PNG")
        picture = b"\x89PNG\r\n\x1a\n no picture" if index in broken else buffer.getvalue()
        made.append({"image": picture, "caption": b"flat", "id": index})
    return made


def mixture(*weights, broken=()):
    """Sets "a", "b" and "c" of 7, 12 and 5 examples."""
    sizes = {"a": 7, "b": 12, "c": 5}
    members = [
        sources.Member(name, records(100 + number, size, broken=broken if name == "b" else ()), weight)
        for number, ((name, size), weight) in enumerate(zip(sizes.items(), weights, strict=False))
    ]
    return sources.Mixture(members)


def training(source, count, **options):
    options = {"spec": SPEC, "tokenizer": None, "seed": 3, "batch_size": BATCH, "max_bad_fraction": 0.2, **options}
    batches = pipeline.training_batches(source, **options)
    taken = [next(batches) for _ in range(count)]
    batches.close()
    return taken


def assert_same(left, right):
    for a, b in zip(left, right, strict=True):
        for name in SPEC:
            np.testing.assert_array_equal(a[name], b[name])


# Proportions.


@pytest.mark.parametrize(
    "weights", [(1,), (1, 1), (1, 1, 1), (1, 2), (0.3, 0.7), (1e-3, 0.5, 0.25), (3.7, 2.2, 9.1, 0.02), (7,) * 13]
)
def test_a_thousand_positions_are_shared_out_by_largest_remainder(weights):
    exact = [fractions.Fraction(weight) / sum(map(fractions.Fraction, weights)) * 1000 for weight in weights]
    wanted = [int(share) for share in exact]
    for number in sorted(range(len(weights)), key=lambda number: wanted[number] - exact[number])[: 1000 - sum(wanted)]:
        wanted[number] += 1
    assert order.BLOCK == 1000
    assert sources.quotas([(f"set {number}", weight) for number, weight in enumerate(weights)]) == tuple(wanted)


@pytest.mark.parametrize("quotas", [(500, 500), (1, 999), (334, 333, 333), (20, 980)])
@pytest.mark.parametrize("first_block", [0, 10**9])
def test_every_block_has_the_proportions_and_every_set_its_own_stream(quotas, first_block):
    blocks = 7
    positions = np.arange(first_block * 1000, (first_block + blocks) * 1000, dtype=np.int64)
    numbers, places = order.mixed(positions, quotas=quotas, seed=4)
    for block in numbers.reshape(blocks, 1000):
        assert tuple(np.bincount(block, minlength=len(quotas))) == quotas
    for number, quota in enumerate(quotas):
        # The next positions of its own stream, every one of them once.
        own = np.arange(first_block * quota, (first_block + blocks) * quota)
        np.testing.assert_array_equal(np.sort(places[numbers == number]), own)
    # One position alone leads to the same place.
    for at in (0, 999, 1000, 6543):
        alone = order.mixed(positions[at : at + 1], quotas=quotas, seed=4)
        assert (alone[0][0], alone[1][0]) == (numbers[at], places[at])


def test_the_sets_alternate_at_random():
    positions = np.arange(200_000, dtype=np.int64)
    numbers, _ = order.mixed(positions, quotas=(500, 500), seed=0)
    other, _ = order.mixed(positions, quotas=(500, 500), seed=1)
    assert abs(np.mean(numbers == other) - 0.5) < 0.01
    assert abs(np.mean(numbers[:-1] == numbers[1:]) - 0.5) < 0.01
    # In a batch of 10 the count is hypergeometric: 10 out of 500 and 500.
    counts = np.bincount(numbers.reshape(-1, 10).sum(1), minlength=11)
    expected = scipy.stats.hypergeom(1000, 500, 10).pmf(np.arange(11)) * counts.sum()
    rare = expected < 30
    seen = [*counts[~rare], counts[rare].sum()]
    assert scipy.stats.chisquare(seen, [*expected[~rare], expected[rare].sum()]).pvalue > 1e-5


def test_sets_of_one_size_do_not_keep_step():
    same = [sources.Member(name, records(0, 250), 1.0) for name in ("a", "b")]
    mixed = sources.Mixture(same)
    positions = np.arange(1000, dtype=np.int64)
    _, indices = sources.shuffled(mixed, positions, seed=0)
    numbers, places = order.mixed(positions, quotas=mixed.quotas, seed=0)
    first, second = (
        indices[numbers == number][np.argsort(places[numbers == number])] - 250 * number for number in (0, 1)
    )
    assert np.sum(first == second) < 15  # two are expected
    # The first set keeps the order that it has alone.
    np.testing.assert_array_equal(first, order.shuffled(np.arange(500), count=250, seed=0)[1])


# Examples.


def test_every_epoch_of_a_set_covers_its_examples_once():
    mixed = mixture(1, 3, 1)
    epochs, indices = sources.shuffled(mixed, np.arange(5000, dtype=np.int64), seed=9)
    seen = collections.Counter(zip(epochs.tolist(), indices.tolist(), strict=True))
    assert max(seen.values()) == 1
    for number, (size, drawn) in enumerate([(7, 1000), (12, 3000), (5, 1000)]):
        own = mixed.indices_of(number)
        assert len(own) == size
        for epoch in range(drawn // size):
            assert all((epoch, index) in seen for index in own)


def test_ids_are_unique_and_name_the_examples():
    mixed = mixture(1, 3, 1)
    assert len(mixed) == 24
    assert [mixed[index]["id"] for index in (0, 6, 7, 18, 19)] == ["a/0", "a/6", "b/0", "b/11", "c/0"]
    counts = collections.Counter()
    for batch in training(mixed, 125):
        for image, small, index in zip(batch["image"], batch["low_res"], batch["id"].tolist(), strict=True):
            level = 100 if index < 7 else 101 if index < 19 else 102
            place = index - {100: 0, 101: 7, 102: 19}[level]
            assert (image == (level, place, 0)).all() and (small == (level, place, 0)).all()
            counts[level] += 1
    assert counts == {100: 200, 101: 600, 102: 200}


RANDOM = {"crop": 0.5, "flip": 0.5, "degradation": "bsr"}


@pytest.mark.parametrize("hosts", [2, 8])
def test_hosts_share_the_batches(hosts):
    alone = training(mixture(2, 1), 20, **RANDOM)
    parts = [training(mixture(2, 1), 20, host_index=host, host_count=hosts, **RANDOM) for host in range(hosts)]
    steps = zip(*parts, strict=True)
    assert_same(alone, [{name: np.concatenate([part[name] for part in step]) for name in SPEC} for step in steps])


@pytest.mark.parametrize("options", [{"start_step": 13}, {"cache": "memory"}, {"workers": 2}, {"threads": 5}])
def test_resumed_cached_and_parallel_reading_change_nothing(options):
    broken = (2, 5)
    begin = options.get("start_step", 0)
    alone = training(mixture(2, 1, broken=broken), 20, **RANDOM)
    assert_same(alone[begin:], training(mixture(2, 1, broken=broken), 20 - begin, **options, **RANDOM))


@pytest.mark.parametrize("cache", ["none", "memory"])
def test_a_bad_example_is_named_with_its_set_and_replaced_out_of_it(caplog, cache):
    clean = training(mixture(1, 3, 1), 125)
    spoilt = training(mixture(1, 3, 1, broken=(0, 8)), 125, cache=cache)
    for before, after in zip(clean, spoilt, strict=True):
        bad = np.isin(before["id"], (7, 15))
        np.testing.assert_array_equal(before["id"][~bad], after["id"][~bad])
        assert np.isin(after["id"][bad], range(7, 19)).all() and not np.isin(after["id"], (7, 15)).any()
    assert "example 7 (b/0)" in caplog.text and "example 15 (b/8)" in caplog.text


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ((1.0, 0.0), "weight of b is 0"),
        ((1.0, -2.0), "weight of b is -2"),
        ((float("nan"), 1.0), "weight of a is nan"),
        ((1.0, float("inf")), "weight of b is inf"),
        ((1.0, 4e-4), "weight of b is below one in 1000"),
        ((), "needs a data set"),
    ],
)
def test_bad_weights_are_named(weights, message):
    with pytest.raises(InputError, match=message):
        mixture(*weights)


def test_bad_members_are_named():
    with pytest.raises(InputError, match="b is empty"):
        sources.Mixture([sources.Member("a", records(0, 1), 1.0), sources.Member("b", [], 1.0)])
    with pytest.raises(InputError, match="a is in the mixture twice"):
        sources.Mixture([sources.Member("a", records(0, 1), 1.0), sources.Member("a", records(0, 1), 1.0)])
    with pytest.raises(InputError, match="4294967297 examples"):
        sources.Mixture([sources.Member("a", range(2**32), 1.0), sources.Member("b", range(1), 1.0)])


# From the config. The two parts of the mixture are splits of one prepared set.

PARTS = (("captioned_shapes", "smoke", "train", 3.0), ("captioned_shapes", "smoke", "unseen", 1.0))


def read(data_dir, **data):
    config = configs.load("tests/small_clip.py:6")
    values = ConfigDict(config.to_dict())
    values.data.update({"data_dir": data_dir, **data})
    values.batch_size = 16
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
    return inputs.Input(program.build(configs.from_json(configs.to_json(values)), mesh))


def test_a_config_names_the_mixture_and_evaluation_reads_one_set(data_dir):
    mixed = read(data_dir, mixture=PARTS)
    batches = mixed.training(0)
    ids = np.concatenate([next(batches)["id"] for _ in range(125)])
    batches.close()
    assert np.sum(ids < 96) == 1500 and np.sum(ids >= 96) == 500 and ids.max() < 96 + 32
    resumed = mixed.training(100)
    np.testing.assert_array_equal(next(resumed)["id"], ids[1600:1616])
    resumed.close()
    spec = {"id": jax.ShapeDtypeStruct((16,), np.uint32)}
    evaluated = mixed.evaluation().batches(spec, source="evaluation", limit=1000, batch_size=16)
    seen = [batch["id"][batch["mask"]] for batch in evaluated]
    np.testing.assert_array_equal(np.concatenate(seen), np.arange(32))  # validation


def test_the_fingerprint_covers_all_sets_and_weights(data_dir):
    prints = [read(data_dir, mixture=parts).fingerprint for parts in (PARTS, PARTS, PARTS[::-1])]
    assert prints[0] == prints[1] != prints[2]
    assert [one["split"] for one in prints[0]["mixture"]] == ["train", "unseen"]
    assert [one["weight"] for one in prints[0]["mixture"]] == [3.0, 1.0]
    heavier = read(data_dir, mixture=(PARTS[0], (*PARTS[1][:3], 2.0))).fingerprint
    assert heavier != prints[0]
    assert "mixture" not in read(data_dir).fingerprint


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ((PARTS[0], ("captioned_shape", "smoke", "train", 1.0)), "mixture: 'captioned_shape' holds no prepared data"),
        ((PARTS[0], ("captioned_shapes", "smok", "train", 1.0)), "mixture: .*did you mean 'smoke'"),
        ((PARTS[0], ("captioned_shapes", "smoke", "unsen", 1.0)), "mixture: .*did you mean 'unseen'"),
        ((PARTS[0], (*PARTS[1][:3], 0)), "mixture: the weight of captioned_shapes/smoke/unseen is 0"),
        ((PARTS[0], PARTS[0]), "mixture: captioned_shapes/smoke/train is in the mixture twice"),
        ((PARTS[0], ("captioned_shapes", 1.0)), "holds entries .data set, variant, split, weight., not"),
        (("captioned_shapes",), "holds entries"),
        ((("captioned_shapes", "smoke", "train", "1"),), "holds entries"),
    ],
)
def test_what_is_wrong_with_a_mixture_is_named(data_dir, parts, message):
    with pytest.raises(InputError, match=f"config.data.{message}" if message.startswith("mixture") else message):
        read(data_dir, mixture=parts)


def test_one_folder_under_two_names_is_noticed(data_dir):
    folder = read(data_dir).directory
    with pytest.raises(InputError, match="is the same data as captioned_shapes/smoke/train"):
        read(data_dir, mixture=(PARTS[0], (folder, "", "train", 1.0)))


def test_a_config_from_before_mixtures_is_that_of_the_same_run():
    config = configs.load("configs/clip.py:tiny")
    older = config.to_dict()
    del older["data"]["mixture"]
    older = ConfigDict(older)
    assert configs.difference(older, config) == {} == configs.difference(config, older)
    mixed = configs.load("configs/clip.py:tiny", {"data.mixture": PARTS})
    assert configs.difference(older, mixed) == {"data.mixture": (None, PARTS)}
