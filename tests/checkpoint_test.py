"""Checkpoints: what is read back is what was saved, or it is not read back."""

import json
import os
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from unclip_jax import checkpoint, digests, sharding
from unclip_jax import config as configs
from unclip_jax.errors import InputError
from unclip_jax.state import TrainState

FLIPS = int(os.environ.get("UNCLIP_TEST_FLIPS", "60"))


@pytest.fixture(scope="module")
def config():
    return configs.load("configs/clip.py:tiny")


def state_at(step, *, width=16):
    """A state whose every array differs from that of any other step."""
    rng = np.random.default_rng(step)
    params = {
        "dense": {"kernel": jnp.asarray(rng.normal(size=(24, width)), jnp.float32), "bias": jnp.ones((width,)) * step},
        "scale": jnp.float32(step),
    }
    state = TrainState.create(params, optax.adam(1e-3).init(params), {"mean": jnp.asarray(rng.normal(size=7))})
    return state.replace(step=jnp.int32(step), ema=jax.tree.map(lambda x: x / 2, params), skipped=jnp.int32(step // 3))


def abstract(state=None):
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one), state or state_at(1))


def save(workdir, *steps, config, keep=10):
    saver = checkpoint.Checkpointer(workdir, every_steps=1, keep=keep)
    for step in steps:
        saver.save(state_at(step), config=config, extra={"data": {"examples": 96}})
    saver.close()


def restore(workdir, tree=None):
    saver = checkpoint.Checkpointer(workdir, every_steps=1, keep=10)
    try:
        return saver.restore(tree or abstract())
    finally:
        saver.close()


def same_bits(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    return all(
        x.dtype == y.dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes()
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


@pytest.fixture(scope="module")
def saved(tmp_path_factory, config):
    """Steps 1, 2 and 3, not to be changed."""
    workdir = tmp_path_factory.mktemp("saved")
    save(workdir, 1, 2, 3, config=config)
    return workdir


@pytest.fixture
def workdir(saved, tmp_path):
    """A copy of them."""
    return pathlib.Path(shutil.copytree(saved, tmp_path / "run"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "uint8", "bool"])
def test_a_digest_changes_with_any_one_element(dtype, monkeypatch):
    """Random arrays, a random element, random bits of it: never the same digest, on the host or on a device."""
    rng = np.random.default_rng(0)
    for trial in range(40):
        shape = tuple(rng.integers(1, 6, rng.integers(0, 4)))
        array = np.asarray(jnp.asarray(rng.integers(0, 2 if dtype == "bool" else 250, shape), dtype))
        flat = array.copy().reshape(-1)
        raw = flat.view(f"u{flat.itemsize}")
        highest = 2 if dtype == "bool" else 1 << (8 * flat.itemsize)
        raw[rng.integers(raw.size)] ^= np.asarray(rng.integers(1, highest), raw.dtype)
        changed = flat.reshape(shape)
        before, after = (int(x) for x in digests.digest([array, changed]))
        assert before != after
        if trial < 4:  # each shape compiles
            with monkeypatch.context() as patch:
                patch.setattr(digests, "_HOST_ELEMENTS", -1)
                on_device = [int(x) for x in digests.digest([jnp.asarray(array), jnp.asarray(changed)])]
            assert on_device == [before, after]


def test_a_digest_is_the_weighted_sum_of_the_bits_and_does_not_know_of_shardings(monkeypatch):
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "model": 2})
    array = np.random.default_rng(1).normal(size=(8, 4, 6)).astype(np.float32)
    bits = array.reshape(-1).view(np.uint32)
    by_hand = sum(int(b) * (2 * i + 1) for i, b in enumerate(bits)) % 2**32
    for spec in (PartitionSpec(), PartitionSpec("data", "model", "fsdp"), PartitionSpec(("data", "fsdp"))):
        placed = jax.device_put(array, NamedSharding(mesh, spec))
        assert int(digests.digest(placed)) == by_hand
        with monkeypatch.context() as patch:
            patch.setattr(digests, "_HOST_ELEMENTS", -1)
            assert int(digests.digest(placed)) == by_hand


def test_the_newest_step_comes_back_bit_for_bit_with_its_meta(saved, config):
    state, meta = restore(saved)
    assert same_bits(state, state_at(3))
    assert meta["step"] == 3 and meta["data"] == {"examples": 96}
    assert configs.from_json_value(meta["config"]).to_dict() == config.to_dict()


def test_it_comes_back_on_another_mesh(saved):
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "model": 2})
    spec = {2: PartitionSpec("fsdp", "model")}
    tree = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=NamedSharding(mesh, spec.get(len(x.shape), PartitionSpec()))
        ),
        abstract(),
    )
    state, _ = restore(saved, tree)
    assert state.params["dense"]["kernel"].addressable_shards[0].data.shape == (12, 8)
    assert same_bits(state, state_at(3))


def test_nothing_saved_is_no_error(tmp_path):
    assert restore(tmp_path) is None


def test_a_relative_workdir_is_one(tmp_path, config, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save("runs/clip", 3, config=config)
    params, _, _, step = checkpoint.load("runs/clip", lambda _: (abstract().params, {}), ema=False)
    assert step == 3 and same_bits(params, state_at(3).params)


def test_no_flipped_bit_is_silent(tmp_path, config):
    """One bit of one file, half of them drawn by size and half by file: damage is refused, or it did no harm."""
    save(tmp_path, 3, config=config)
    files = [path for path in sorted((tmp_path / "checkpoints").rglob("*")) if path.is_file() and path.stat().st_size]
    sizes = np.array([path.stat().st_size for path in files], float)
    rng = np.random.default_rng(0)
    right, refused = state_at(3), 0
    _, meta = restore(tmp_path)
    for flip in range(FLIPS):
        path = files[rng.choice(len(files), p=sizes / sizes.sum() if flip % 2 else None)]
        clean = path.read_bytes()
        broken = bytearray(clean)
        broken[rng.integers(len(broken))] ^= 1 << rng.integers(8)
        path.write_bytes(broken)
        try:
            state, meta_now = restore(tmp_path)
        except InputError:
            refused += 1
        else:
            assert same_bits(state, right) and meta_now == meta, path
        path.write_bytes(clean)
    print(f"{FLIPS} flips of a bit: {refused} refused, {FLIPS - refused} without any effect on what is restored")
    assert refused > FLIPS / 4  # the flips did reach what matters
    assert same_bits(restore(tmp_path)[0], right)


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 16
    path.write_bytes(data)


def biggest(folder):
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


@pytest.mark.parametrize(
    "harm",
    {
        "a bit of an array": lambda step: flip(biggest(step / "params")),
        "an array file cut short": lambda step: biggest(step / "rest").write_bytes(b"short"),
        "an array file gone": lambda step: biggest(step / "ema").unlink(),
        "an item gone": lambda step: shutil.rmtree(step / "params"),
        "another beta2 in its config": lambda step: [
            path.write_text(path.read_text().replace("0.98", "0.97")) for path in (step / "meta").iterdir()
        ],
        "nothing in its folder": lambda step: [path.unlink() for path in step.rglob("*") if path.is_file()],
        "a stray folder after it": lambda step: (step.parent / "999").mkdir(),
    }.items(),
    ids=lambda item: item[0],
)
def test_a_damaged_step_is_passed_over_and_out_of_the_way(workdir, config, caplog, harm):
    name, do = harm
    checkpoints = workdir / "checkpoints"
    do(checkpoints / "3")
    newest = 3 if name.startswith("a stray") else 2
    state, _ = restore(workdir)
    assert same_bits(state, state_at(newest))
    assert "damaged and passed over" in caplog.text and f"resuming from step {newest}" in caplog.text
    # The run comes by step 3 again, saves it, and from then on restores it.
    save(workdir, 3, 4, config=config)
    state, _ = restore(workdir)
    assert same_bits(state, state_at(4))
    assert checkpoint.steps_of(checkpoints) == [4, 3, 2, 1]


def test_where_no_step_is_whole_nothing_is_touched_and_nothing_is_begun_anew(workdir):
    for step in (1, 2, 3):
        flip(biggest(workdir / "checkpoints" / str(step) / "ema"))
    for _ in range(2):  # the second try must not find an empty folder and start from step 0
        with pytest.raises(InputError, match=r"none of the checkpoints .* is whole \(steps \[3, 2, 1\]\)"):
            restore(workdir)


def test_a_checkpoint_of_another_network_is_named_as_such_and_stays(saved):
    with pytest.raises(InputError, match=r"another network: .*bias.*\[16\].* there and .*\[8\].* here, and 1 more"):
        restore(saved, abstract(state_at(1, width=8)))
    assert checkpoint.steps_of(saved / "checkpoints") == [3, 2, 1]


def test_old_steps_are_deleted_and_a_step_is_saved_once(tmp_path, config):
    save(tmp_path, 1, 2, 3, 4, config=config, keep=2)
    assert checkpoint.steps_of(tmp_path / "checkpoints") == [4, 3]
    save(tmp_path, 4, config=config, keep=2)
    assert same_bits(restore(tmp_path)[0], state_at(4))


def test_load_reads_only_the_moving_average(workdir, caplog):
    shutil.rmtree(workdir / "checkpoints" / "3" / "params")
    shutil.rmtree(workdir / "checkpoints" / "3" / "rest")
    tree = abstract()

    def load(**options):
        return checkpoint.load(workdir, lambda config: (tree.params, tree.statistics), **options)

    ema, statistics, config, step = load()
    assert step == 3 and same_bits(ema, state_at(3).ema) and same_bits(statistics, state_at(3).statistics)
    assert config.stage == "clip"
    assert same_bits(load(step=1)[0], state_at(1).ema)
    params, *_, step = load(ema=False)
    assert step == 2 and same_bits(params, state_at(2).params) and "passed over" in caplog.text
    with pytest.raises(InputError, match=r"no checkpoint of step 7; it has \[3, 2, 1\]"):
        load(step=7)
    flip(biggest(workdir / "checkpoints" / "3" / "ema"))
    with pytest.raises(InputError, match=r"no checkpoint in .* is whole \(tried \[3\]\)"):
        load(step=3)


def test_load_without_a_run_says_so(tmp_path):
    with pytest.raises(InputError, match="holds no checkpoint"):
        checkpoint.load(tmp_path, lambda config: ({}, {}))


def test_meta_is_plain_json(saved):
    (path,) = [path for path in (saved / "checkpoints" / "3" / "meta").iterdir() if "metadata" in path.name]
    meta = json.loads(path.read_text())
    assert meta["arrays"]["params"]["['dense']['kernel']"][:2] == ["float32", [24, 16]]


def measured(value):
    return {"mean": state_at(3).statistics["mean"], "x_start_variance": jnp.full((5,), value)}


def with_variance(state):
    return state.replace(statistics={**state.statistics, "x_start_variance": jnp.zeros((5,))})


def test_a_step_from_before_weights_were_measured_reads_as_not_measured(saved):
    state, _ = restore(saved, abstract(with_variance(state_at(1))))
    assert same_bits(state, with_variance(state_at(3)))
    # Of the data, nothing may be missing.
    other = state_at(1).replace(statistics={"mean": jnp.zeros(7), "clip_std": jnp.ones(7)})
    with pytest.raises(InputError, match="another network: .*clip_std"):
        restore(saved, abstract(other))


def test_statistics_put_into_a_saved_step_are_part_of_it(workdir, config):
    tree = abstract(with_variance(state_at(1)))
    for value in (0.5, 0.25, 0.125):
        checkpoint.replace_statistics(workdir, 3, measured(value), extra={"x_start_variance": {"examples": 9}})
        state, meta = restore(workdir, tree)
        assert same_bits(state, state_at(3).replace(statistics=measured(value)))
        assert meta["x_start_variance"] == {"examples": 9} and meta["data"] == {"examples": 96}
    ema, statistics, _, _ = checkpoint.load(workdir, lambda config: (tree.params, tree.statistics))
    assert same_bits((ema, statistics), (state_at(3).ema, measured(0.125)))
    # Damage of them is damage of the step, and the run goes on beside them.
    save(workdir, 4, config=config)
    assert checkpoint.steps_of(workdir / "checkpoints") == [4, 3, 2, 1]
    shutil.rmtree(workdir / "checkpoints" / "4")
    item = json.loads((workdir / "checkpoints" / "3" / "meta" / "metadata").read_text())["items"]["statistics"]
    flip(biggest(workdir / "checkpoints" / "3" / item))
    assert restore(workdir, tree)[0].step == 2


@pytest.mark.parametrize("moment", ["before the new arrays", "before the new meta is in place"])
def test_killed_while_statistics_are_replaced_a_step_has_the_old_ones(workdir, monkeypatch, moment):
    tree = abstract(with_variance(state_at(1)))
    checkpoint.replace_statistics(workdir, 3, measured(0.5))

    def die(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if moment == "before the new arrays":
            patch.setattr(checkpoint.ocp.StandardCheckpointer, "save", die)
        else:
            patch.setattr(type(checkpoint.absolute(workdir)), "replace", die)
        with pytest.raises(KeyboardInterrupt):
            checkpoint.replace_statistics(workdir, 3, measured(0.25))
    assert same_bits(restore(workdir, tree)[0].statistics, measured(0.5))
    checkpoint.replace_statistics(workdir, 3, measured(0.25))
    assert same_bits(restore(workdir, tree)[0].statistics, measured(0.25))


def test_a_temporary_step_lasts_until_a_newer_one_and_pushes_out_none_that_stays(tmp_path, config):
    def steps():
        return checkpoint.steps_of(tmp_path / "checkpoints")

    def saved(saver, step, **options):
        saver.save(state_at(step), config=config, **options)
        saver._manager.wait_until_finished()
        assert saver.committed(step) and not saver.committed(step + 1)
        return steps()

    saver = checkpoint.Checkpointer(tmp_path, every_steps=2, keep=2)
    assert saved(saver, 2) == [2] and saved(saver, 3, temporary=True) == [3, 2]
    assert saved(saver, 4) == [4, 2]
    assert saved(saver, 5, temporary=True) == [5, 4, 2]
    saver.close()
    saver = checkpoint.Checkpointer(tmp_path, every_steps=2, keep=2)  # another start knows which is which
    assert same_bits(saver.restore(abstract())[0], state_at(5))
    assert saved(saver, 6, temporary=True) == [6, 4, 2]
    assert saved(saver, 8) == [8, 4] and saved(saver, 10) == [10, 8]
    saver.close()
