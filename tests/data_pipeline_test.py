"""The order of training examples, its independence of hosts and workers, and what a batch holds."""

import io
import subprocess
import sys

import jax
import numpy as np
import pytest
from PIL import Image

from unclip_jax.data import datasets, degradations, fake, pipeline
from unclip_jax.data.tokenizer import Tokenizer
from unclip_jax.errors import InputError

COUNT = 37
GLOBAL = 8
# A spec in short: field -> (shape of one example, dtype)
LAYOUT = {
    "image": ((16, 16, 3), np.uint8),
    "clip_image": ((8, 8, 3), np.uint8),
    "low_res": ((4, 4, 3), np.uint8),
    "tokens": ((6,), np.int32),
    "clip_tokens": ((5,), np.int32),
    "id": ((), np.uint32),
}


def spec_of(*names, batch_size=GLOBAL):
    chosen = {name: LAYOUT[name] for name in (names or LAYOUT)}
    return {name: jax.ShapeDtypeStruct((batch_size, *shape), dtype) for name, (shape, dtype) in chosen.items()}


def low_res_of(side):
    return jax.ShapeDtypeStruct((GLOBAL, side, side, 3), np.uint8)


def pixels_of(index):
    return np.random.default_rng(index).integers(0, 256, (20, 24, 3), np.uint8)


def record_of(index):
    buffer = io.BytesIO()
    Image.fromarray(pixels_of(index)).save(buffer, format="PNG")
    return {"image": buffer.getvalue(), "caption": f"a red circle {index}".encode(), "id": f"name-{index}".encode()}


class Records(list):
    """A source in memory, where chosen records are no pictures."""

    def __init__(self, count=COUNT, broken=()):
        super().__init__(record_of(index) for index in range(count))
        for index in broken:
            self[index]["image"] = b"\x89PNG\r\n\x1a\n no picture"


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer("tiny")


def take(batches, count):
    taken = [next(batches) for _ in range(count)]
    batches.close()
    return taken


def training(tokenizer, source, count, **options):
    options = {"spec": spec_of(), "seed": 5, "batch_size": GLOBAL, **options}
    return take(pipeline.training_batches(source, tokenizer=tokenizer, **options), count)


def joined(hosts):
    """The global batches of several hosts' batches, laid end to end."""
    return [{name: np.concatenate([b[name] for b in parts]) for name in parts[0]} for parts in zip(*hosts, strict=True)]


def assert_same(left, right):
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            np.testing.assert_array_equal(a[name], b[name], err_msg=name)
            assert a[name].dtype == b[name].dtype


# BSR draws most of all, in an example's own time and place.
RANDOM = {"crop": 0.8, "flip": 0.5, "degradation": "bsr"}


@pytest.mark.parametrize("hosts", [2, 4, 8])
def test_hosts_share_the_same_global_batches(tokenizer, hosts):
    alone = training(tokenizer, Records(), 12, **RANDOM)
    parts = [training(tokenizer, Records(), 12, host_index=h, host_count=hosts, **RANDOM) for h in range(hosts)]
    assert_same(alone, joined(parts))


def test_worker_processes_change_nothing(tokenizer):
    here = training(tokenizer, Records(broken=[3]), 6, max_bad_fraction=0.1, **RANDOM)
    there = training(tokenizer, Records(broken=[3]), 6, max_bad_fraction=0.1, workers=2, **RANDOM)
    assert_same(here, there)


@pytest.mark.parametrize("options", [{}, RANDOM, {"degradation": "gaussian_blur"}, {"crop": 0.5, "resize": "bicubic"}])
def test_the_cache_and_threads_change_nothing(tokenizer, options):
    plain = training(tokenizer, Records(), 11, threads=1, **options)
    assert_same(plain, training(tokenizer, Records(), 11, threads=4, **options))
    assert_same(plain, training(tokenizer, Records(), 11, cache="memory", **options))


@pytest.mark.parametrize("start", [1, 4, 9])
def test_any_step_can_be_the_first(tokenizer, start):
    full = training(tokenizer, Records(broken=[3, 8]), 11, max_bad_fraction=0.1, **RANDOM)
    tail = training(
        tokenizer, Records(broken=[3, 8]), 11 - start, start_step=start, max_bad_fraction=0.1, cache="memory", **RANDOM
    )
    assert_same(full[start:], tail)


def test_no_batch_comes_after_close(tokenizer):
    batches = pipeline.training_batches(Records(), spec=spec_of("id"), tokenizer=None, seed=0, batch_size=GLOBAL)
    next(batches)
    batches.close()
    batches.close()
    assert list(batches) == []


def test_far_steps_are_reached_at_once(tokenizer):
    far = training(tokenizer, Records(), 1, start_step=10**9, spec=spec_of("id"))
    assert far[0]["id"].max() < COUNT


def test_every_epoch_is_a_permutation_and_another_one(tokenizer):
    ids = np.concatenate([b["id"] for b in training(tokenizer, Records(), COUNT, spec=spec_of("id"))])
    epochs = ids.reshape(GLOBAL, COUNT)
    for epoch in epochs:
        np.testing.assert_array_equal(np.sort(epoch), np.arange(COUNT))
    assert len({tuple(epoch) for epoch in epochs}) == GLOBAL
    other = np.concatenate([b["id"] for b in training(tokenizer, Records(), COUNT, spec=spec_of("id"), seed=6)])
    assert not np.array_equal(ids, other)


def test_fields_belong_to_the_example_of_the_id(tokenizer):
    for batch in training(tokenizer, Records(), 5):
        for row, index in enumerate(batch["id"]):
            centre = pixels_of(index)[:, 2:22]
            # The average of a region is kept by area reduction, up to rounding.
            for name in ("image", "clip_image", "low_res"):
                np.testing.assert_allclose(batch[name][row].mean((0, 1)), centre.mean((0, 1)), atol=4)
            caption = f"a red circle {index}"
            np.testing.assert_array_equal(batch["tokens"][row], tokenizer.encode([caption], 6)[0])
            np.testing.assert_array_equal(batch["clip_tokens"][row], tokenizer.encode([caption], 5)[0])


def test_images_are_averaged_exactly_where_sizes_divide(tokenizer):
    source = Records()
    for record, index in zip(source, range(COUNT), strict=True):
        buffer = io.BytesIO()
        Image.fromarray(np.random.default_rng(index).integers(0, 256, (32, 32, 3), np.uint8)).save(buffer, format="PNG")
        record["image"] = buffer.getvalue()
    for batch in training(tokenizer, source, 2):
        for row, index in enumerate(batch["id"]):
            original = np.random.default_rng(index).integers(0, 256, (32, 32, 3), np.uint8).astype(np.float64)
            means = original.reshape(16, 2, 16, 2, 3).mean((1, 3))
            assert np.abs(batch["image"][row] - means).max() <= 0.51


def test_crops_are_windows_of_the_whole_image_and_move(tokenizer):
    # At crop 0.8 the whole image is 20 pixels a side: the source's centre itself.
    places = set()
    for batch in training(tokenizer, Records(), 30, crop=0.8):
        for row, index in enumerate(batch["id"]):
            whole = pixels_of(index)[:, 2:22]
            windows = np.lib.stride_tricks.sliding_window_view(whole, (16, 16), axis=(0, 1)).transpose(0, 1, 3, 4, 2)
            found = np.argwhere((windows == batch["image"][row]).all((2, 3, 4)))
            assert len(found) == 1
            places.add(tuple(found[0]))
            means = batch["image"][row].reshape(4, 4, 4, 4, 3).mean((1, 3))
            assert np.abs(batch["low_res"][row] - means).max() <= 0.51
    assert len(places) == 25, "every one of the 5 x 5 positions is drawn in 240 tries"


def test_low_res_alone_is_degraded(tokenizer):
    clean = training(tokenizer, Records(), 2)
    blurred = training(tokenizer, Records(), 2, degradation="gaussian_blur")
    for a, b in zip(clean, blurred, strict=True):
        np.testing.assert_array_equal(a["image"], b["image"])
        for before, after in zip(a["low_res"], b["low_res"], strict=True):
            np.testing.assert_array_equal(degradations.gaussian_blur(before), after)


def test_bsr_degrades_the_crop_itself_anew_in_every_epoch(tokenizer):
    source = Records(8)
    for record, index in zip(source, range(8), strict=True):
        buffer = io.BytesIO()
        coarse = np.random.default_rng(index).integers(0, 256, (4, 4, 3), np.uint8)
        Image.fromarray(coarse).resize((64, 64), Image.Resampling.BICUBIC).save(buffer, format="PNG")
        record["image"] = buffer.getvalue()
    batches = training(tokenizer, source, 6, crop=0.25, degradation="bsr")
    large, small = (np.concatenate([batch[name] for batch in batches]) for name in ("image", "low_res"))
    assert len({image.tobytes() for image in small}) == 48
    # Crops of a quarter have colours of their own, and theirs is the degraded one's.
    assert np.corrcoef(large.mean((1, 2)).ravel(), small.mean((1, 2)).ravel())[0, 1] > 0.98
    assert np.abs(large.mean((1, 2)) - small.mean((1, 2))).mean() < 5 < large.mean((1, 2)).std()


@pytest.mark.parametrize("cache", ["none", "memory"])
def test_bad_examples_are_replaced_counted_and_named(tokenizer, caplog, cache):
    broken = (3, 8)
    batches = pipeline.training_batches(
        Records(broken=broken), spec=spec_of(), tokenizer=tokenizer, seed=5, batch_size=GLOBAL, cache=cache,
        max_bad_fraction=0.1,
    )  # fmt: skip
    clean = training(tokenizer, Records(), 10)
    for batch, reference in zip(take(batches, 10), clean, strict=True):
        good = ~np.isin(reference["id"], broken)
        assert not np.isin(batch["id"], broken).any()
        for name in batch:
            np.testing.assert_array_equal(batch[name][good], reference[name][good])
    assert batches.bad_count == 2 and set(batches.bad) == set(broken)
    assert caplog.text.count("name-3") == 1 and caplog.text.count("name-8") == 1


def test_too_many_bad_examples_stop_the_run(tokenizer):
    batches = pipeline.training_batches(
        Records(broken=range(0, 37, 5)), spec=spec_of(), tokenizer=tokenizer, seed=5, batch_size=GLOBAL,
        max_bad_fraction=0.1,
    )  # fmt: skip
    with pytest.raises(InputError, match=r"more than the 3 .*name-\d+"):
        take(batches, COUNT)
    hopeless = pipeline.training_batches(
        Records(broken=range(37)), spec=spec_of(), tokenizer=tokenizer, seed=5, batch_size=GLOBAL, max_bad_fraction=1.0
    )
    with pytest.raises(InputError, match="no usable example"):
        next(hopeless)
    batches.close()
    hopeless.close()


@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_evaluation_sees_each_example_once_in_order(tokenizer, hosts):
    source = Records(broken=[4])
    parts = []
    for host in range(hosts):
        batches = pipeline.evaluation_batches(
            source, spec=spec_of(), tokenizer=tokenizer, batch_size=GLOBAL, host_index=host, host_count=hosts,
            max_bad_fraction=0.1,
        )  # fmt: skip
        parts.append(list(batches))
        assert parts[-1][0]["image"].shape[0] == GLOBAL // hosts
    whole = {name: np.concatenate([b[name] for b in joined(parts)]) for name in parts[0][0]}
    assert len(whole["id"]) == 40
    np.testing.assert_array_equal(whole["id"][whole["mask"]], [i for i in range(COUNT) if i != 4])
    np.testing.assert_array_equal(np.flatnonzero(~whole["mask"]), [4, 37, 38, 39])
    assert not whole["image"][~whole["mask"]].any()


def test_evaluation_limit(tokenizer):
    options = {"spec": spec_of("id"), "tokenizer": None, "batch_size": GLOBAL}
    batches = list(pipeline.evaluation_batches(Records(), limit=9, **options))
    assert [int(b["mask"].sum()) for b in batches] == [8, 1]
    with pytest.raises(InputError, match="limit"):
        pipeline.evaluation_batches(Records(), limit=0, **options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"host_count": 3}, "does not divide over 3 hosts"),
        ({"host_index": 2, "host_count": 2}, "does not exist"),
        ({"batch_size": 16}, "batch size is 16"),
        ({"seed": -1}, "data seed"),
        ({"start_step": -1}, "start_step"),
        ({"cache": "memroy"}, "did you mean 'memory'"),
        ({"cache": "memory", "workers": 2}, "set workers to 0"),
        ({"workers": -1}, "workers must be 0 or more"),
        ({"crop": 0.0}, "crop is 0.0"),
        ({"flip": 1.5}, "flip is 1.5"),
        ({"resize": "nearest"}, "no resizing filter"),
        ({"degradation": "gausian_blur"}, "did you mean 'gaussian_blur'"),
        ({"degradation": "bsr", "spec": {**spec_of("image"), "low_res": low_res_of(5)}}, "'bsr' .* 16 to 5 pixels"),
        ({"degradation": "bsrgan", "spec": {**spec_of("image"), "low_res": low_res_of(16)}}, "from 16 to 16 pixels"),
        ({"tokenizer": None}, "no tokenizer"),
        ({"source": []}, "empty"),
        ({"spec": {"imag": jax.ShapeDtypeStruct((GLOBAL, 4, 4, 3), np.uint8)}}, "did you mean 'image'"),
        ({"spec": {"image": jax.ShapeDtypeStruct((GLOBAL, 4, 5, 3), np.uint8)}}, "square RGB"),
        ({"spec": {"image": jax.ShapeDtypeStruct((GLOBAL, 4, 4, 3), np.float32)}}, "float32 in the spec"),
        ({"spec": {"low_res": jax.ShapeDtypeStruct((GLOBAL, 4, 4, 3), np.uint8)}}, "low_res .4. needs an image"),
    ],
)
def test_bad_arguments_are_named(tokenizer, change, message):
    options = {"source": Records(3), "spec": spec_of(), "tokenizer": tokenizer, "seed": 0, "batch_size": GLOBAL}
    options.update(change)
    source = options.pop("source")
    with pytest.raises(InputError, match=message):
        pipeline.training_batches(source, **options)


def test_fake_batches_are_valid_and_repeatable():
    spec = {**spec_of(), "weight": jax.ShapeDtypeStruct((GLOBAL, 2), np.float32)}
    batch = fake.batch(spec, seed=3, vocab_size=50)
    assert_same([batch], [fake.batch(spec, seed=3, vocab_size=50)])
    assert not np.array_equal(batch["image"], fake.batch(spec, seed=4, vocab_size=50)["image"])
    for name, field in spec.items():
        assert batch[name].shape == field.shape and batch[name].dtype == field.dtype
    for row in np.concatenate([fake.batch(spec, seed=seed, vocab_size=50)["tokens"] for seed in range(20)]):
        assert row[0] == 48 and np.sum(row == 49) == 1 and np.sum(row == 48) == 1
        end = int(np.argmax(row == 49))
        assert row[1:end].all() and not row[end + 1 :].any()


# A prepared data set on disk, read back through TFDS.

PREPARE = """
import sys
from unclip_jax.data import datasets
print(datasets.prepare("captioned_shapes", data_dir=sys.argv[1], variant="smoke"))
"""

READ = """
import sys
import jax, numpy as np
from unclip_jax.data import datasets, pipeline
from unclip_jax.data.tokenizer import Tokenizer
source = datasets.open_source(sys.argv[1], "train")
spec = {"image": jax.ShapeDtypeStruct((4, 16, 16, 3), np.uint8), "tokens": jax.ShapeDtypeStruct((4, 24), np.int32)}
batches = pipeline.training_batches(source, spec=spec, tokenizer=Tokenizer("tiny"), seed=0, batch_size=4)
assert next(batches)["image"].shape == (4, 16, 16, 3)
datasets.fingerprint(sys.argv[1], "train")
print([name for name in ("tensorflow", "torch") if name in sys.modules])
"""


def run(program, argument):
    command = [sys.executable, "-c", program, str(argument)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "Traceback" not in done.stderr
    return done.stdout.strip().splitlines()[-1]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    return run(PREPARE, tmp_path_factory.mktemp("data"))


def test_training_reads_without_tensorflow_and_torch(prepared):
    assert run(READ, prepared) == "[]"


def test_opened_records_hold_encoded_images_and_captions(prepared):
    source = datasets.open_source(prepared, "validation")
    record = source[0]
    assert len(source) > 0 and isinstance(record["image"], bytes) and b"background" in bytes(record["caption"])
    assert len(datasets.open_source(prepared, "train[:5]")) == 5


def test_fingerprint_tells_splits_and_changes(prepared):
    first = datasets.fingerprint(prepared, "train")
    assert first == datasets.fingerprint(prepared, "train")
    assert first["digest"] != datasets.fingerprint(prepared, "validation")["digest"]
    assert first["examples"] == len(datasets.open_source(prepared, "train"))


def test_what_cannot_be_opened_is_named(prepared, tmp_path):
    with pytest.raises(InputError, match="no prepared data set"):
        datasets.open_source(str(tmp_path), "train")
    with pytest.raises(InputError, match="did you mean 'train'"):
        datasets.open_source(prepared, "trian")
    with pytest.raises(InputError, match="known are .*train.*validation"):
        datasets.open_source(prepared, "xyz")
    with pytest.raises(InputError, match="empty"):
        datasets.open_source(prepared, "train[:0]")
    with pytest.raises(InputError, match="did you mean 'emoji'"):
        datasets.prepare("emojis", data_dir=str(tmp_path), variant="tiny")
    with pytest.raises(InputError, match="'default'"):
        datasets.prepare("emoji", data_dir=str(tmp_path), variant="tiny")
