"""Sums over the data before the first step: the same bits for any number of devices and hosts."""

import functools
import json
import os
import socket
import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from training_processes import PATIENCE, ROOT
from untrained_models import write

from unclip_jax import checkpoint, fitting, sharding, train
from unclip_jax import config as configs

D = 5
DATA = np.random.default_rng(0).normal(size=(40 * fitting.CHUNK, D)).astype(np.float32)


class Stream:
    """Chunks of DATA from the first-th on, and how many were taken."""

    def __init__(self, first):
        self.next, self.taken, self.closed = first, 0, False

    def __iter__(self):
        return self

    def __next__(self):
        start = self.next * fitting.CHUNK
        self.next, self.taken = self.next + 1, self.taken + 1
        return {"x": DATA[start : start + fitting.CHUNK]}

    def close(self):
        self.closed = True


def over_data(read, *, examples, devices=1, **options):
    spec = {"x": jax.ShapeDtypeStruct((fitting.CHUNK, D), jnp.float32)}
    frozen = {"w": jnp.float32(3)}
    return fitting.OverData(
        read, frozen, spec=spec, examples=examples, devices=jax.local_devices()[:devices], **options
    )


def compute(frozen, batch):
    return frozen["w"] * batch["x"], batch["x"][:, 0]


def measure(x, first):
    return {"outer": x.T.astype(np.float64) @ x, "count": np.int64(len(first)), "sum": first.sum(dtype=np.float64)}


def bits(tree):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def test_sums_are_those_of_the_first_examples_in_whole_chunks_on_any_number_of_devices():
    for examples in (1, 130, 40 * fitting.CHUNK):
        whole = -(-examples // fitting.CHUNK) * fitting.CHUNK
        expected = measure(3 * DATA[:whole], DATA[:whole, 0])
        sums = [over_data(Stream, examples=examples, devices=n)(compute, measure) for n in (1, 3)]
        assert bits(sums[0]) == bits(sums[1])
        assert sums[0]["count"] == whole
        for name in expected:
            np.testing.assert_allclose(sums[0][name], expected[name], rtol=1e-6)
    limited = over_data(Stream, examples=2000)(compute, measure, limit=70)
    assert limited["count"] == 2 * fitting.CHUNK


def on_hosts(monkeypatch, count, job):
    """Runs `job()` on so many threads that each take themselves for a host; returns what each returned."""
    here, board, barrier = threading.local(), {}, threading.Barrier(count, timeout=60)
    made = [None] * count

    def from_host(host, tree):
        if here.index == host:
            board["tree"] = tree
        barrier.wait()
        got = board["tree"]
        barrier.wait()
        assert jax.tree.map(lambda x: np.asarray(x).dtype, tree) == jax.tree.map(lambda x: np.asarray(x).dtype, got)
        return got

    def run(index):
        here.index = index
        made[index] = job()

    with monkeypatch.context() as patch:
        patch.setattr(jax, "process_count", lambda: count)
        patch.setattr(jax, "process_index", lambda: here.index)
        patch.setattr(fitting, "from_host", from_host)
        patch.setattr(fitting, "whole", functools.partial(jax.tree.map, np.asarray))
        threads = [threading.Thread(target=run, args=(index,)) for index in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return made


@pytest.mark.parametrize("most", [fitting._MOST_CHUNKS, 3])
@pytest.mark.parametrize("hosts", [2, 3, 7])
def test_any_number_of_hosts_gets_the_same_bits_and_each_reads_its_part_only(monkeypatch, hosts, most):
    monkeypatch.setattr(fitting, "_PARTS", 5)
    monkeypatch.setattr(fitting, "_MOST_CHUNKS", most)  # 5 parts of 8 chunks, or 14 of 3
    streams = []

    def read(first):
        streams.append(Stream(first))
        return streams[-1]

    def job():
        return over_data(read, examples=len(DATA))(compute, measure)

    alone = job()
    assert [stream.taken for stream in streams] == [40] and streams[0].closed
    streams.clear()
    for made in on_hosts(monkeypatch, hosts, job):
        assert bits(made) == bits(alone)
    parts = 5 if most > 8 else 14
    assert sum(stream.taken for stream in streams) == 40
    assert len(streams) == min(hosts, parts) and all(stream.closed for stream in streams)


def test_a_fit_can_be_stopped():
    streams = []

    def read(first):
        streams.append(Stream(first))
        return streams[-1]

    def stop():
        if streams[0].taken == 3:
            raise SystemExit(42)

    with pytest.raises(SystemExit):
        over_data(read, examples=len(DATA), stop=stop)(compute, measure)
    assert streams[0].taken == 3 and streams[0].closed


def free_port():
    with socket.socket() as listening:
        listening.bind(("localhost", 0))
        return listening.getsockname()[1]


def test_two_processes_fit_the_ar_prior_to_the_bits_of_one_and_save_it(tmp_path, data_dir, compile_cache, monkeypatch):
    """Real ones, that JAX joins: what they write as step 0, against what one process with two devices writes."""
    write(tmp_path, "clip")
    changes = {"data.data_dir": data_dir, "frozen.clip": str(tmp_path / "clip")}
    spec = "tests/small_stage.py:prior_ar"
    command = [sys.executable, "-m", "unclip_jax.statistics", f"--config={spec}", f"--workdir={tmp_path / 'two'}"]
    command += [f"--compile_cache={compile_cache}", *(f"--config.{key}={value}" for key, value in changes.items())]
    hosts = {"JAX_COORDINATOR_ADDRESS": f"localhost:{free_port()}", "JAX_NUM_PROCESSES": "2"}
    logs = [(tmp_path / f"{index}.log").open("w+") for index in range(2)]
    processes = [
        subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, **hosts, "JAX_PROCESS_ID": str(index)},
            stdout=logs[index],
            stderr=subprocess.STDOUT,
        )
        for index in range(2)
    ]
    try:
        make_mesh = sharding.make_mesh
        monkeypatch.setattr(train.sharding, "make_mesh", lambda sizes: make_mesh(sizes, jax.devices()[:2]))
        run = train.Run(configs.load(spec, changes), str(tmp_path / "one"))
        state = run.begin()
        run.saver.close()
        codes = [process.wait(PATIENCE) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    texts = []
    for log in logs:
        log.seek(0)
        texts.append(log.read())
        log.close()
    assert codes == [0, 0], "\n".join(text[-2000:] for text in texts)
    one, two = (meta(tmp_path / name)["arrays"]["statistics"] for name in ("one", "two"))
    assert one == two and len(one) == len(state.statistics) == 7
    assert float(state.statistics["dot_probabilities"].sum()) == pytest.approx(1, abs=1e-6)
    # Each has read its half, and the same command goes on from what is there.
    assert "128/128" in texts[0] and "reconstruction_error 0.0" in texts[0]
    monkeypatch.setattr(type(run.program.stage), "fit_statistics", lambda *args: pytest.fail("fitted again"))
    again = train.Run(configs.load(spec, changes), str(tmp_path / "two"))
    assert bits(again.begin().statistics) == bits(state.statistics)
    again.saver.close()


def meta(workdir):
    return json.loads((workdir / checkpoint.FOLDER / "0" / "meta" / "metadata").read_text())
