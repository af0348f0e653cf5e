"""The program `prepare`: real processes, really killed; the result is the same however it came about."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import tensorflow_datasets as tfds
from captioned_tars import picture, write_tar

from unclip_jax import prepare
from unclip_jax.data import image_text, images, shard_workers
from unclip_jax.data.image_text import Settings
from unclip_jax.errors import InputError

ROOT = pathlib.Path(__file__).parent.parent


def make_shards(folder, *, shards, examples, size=(24, 16)):
    """Shards of distinct pictures; every 50th example has no caption."""
    folder.mkdir()
    for shard in range(shards):
        members = []
        for i in range(examples):
            key = f"{shard:02d}{i:04d}"
            members.append((f"{key}.png", picture((shard, i % 256, i // 256), size)))
            if i % 50 != 49:
                members.append((f"{key}.txt", f"shard {shard} picture {i}".encode()))
        write_tar(folder / f"{shard:05d}.tar", members)
    return str(folder)


def command(source, out, *options):
    return [sys.executable, "-m", "unclip_jax.prepare", f"--source={source}", f"--out={out}", *options]


def run(*arguments, code=0):
    done = subprocess.run(command(*arguments), cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return done


def content(folder):
    """Every file below a folder, byte for byte."""
    return {
        os.path.relpath(os.path.join(path, name), folder): pathlib.Path(path, name).read_bytes()
        for path, _, names in os.walk(folder)
        for name in names
    }


def load(out, split="train"):
    builder = tfds.builder_from_directory(str(out))
    return builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()})


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return make_shards(tmp_path_factory.mktemp("source") / "shards", shards=6, examples=150)


@pytest.fixture(scope="module")
def uninterrupted(shards, tmp_path_factory):
    out = tmp_path_factory.mktemp("reference") / "out"
    prepare.prepare(shards, str(out), Settings(size=12, validation_percent=10.0))
    return content(out)


OPTIONS = ("--size=12", "--validation_percent=10")


def test_tfds_reads_every_example_in_order(shards, tmp_path):
    sentence = prepare.prepare(shards, str(tmp_path / "out"), Settings())
    assert "wrote 882 examples" in sentence and "18 bad" in sentence
    source = load(tmp_path / "out")
    expected = [(s, i) for s in range(6) for i in range(150) if i % 50 != 49]
    assert len(source) == len(expected)
    ids = []
    for record, (shard, i) in zip(source, expected, strict=True):
        assert record["caption"].decode() == f"shard {shard} picture {i}"
        assert (record["source"], record["key"]) == (f"{shard:05d}.tar".encode(), f"{shard:02d}{i:04d}".encode())
        ids.append(record["id"])
    assert np.all(np.diff(ids) > 0) and ids[0] == 0 and ids[-1] < 2**32
    assert images.decode(source[881]["image"])[0, 0].tolist() == [5, 148, 0]
    bad = [json.loads(line) for line in (tmp_path / "out" / "bad_records.jsonl").read_text().splitlines()]
    assert [(b["source"], b["key"]) for b in bad[:2]] == [("00000.tar", "000049"), ("00000.tar", "000099")]
    assert len(bad) == 18 and all("no caption" in b["reason"] for b in bad)


def test_splits_are_disjoint_and_complete(uninterrupted, tmp_path):
    for name, data in uninterrupted.items():
        (tmp_path / name).write_bytes(data)
    keys = [[record["key"] for record in load(tmp_path, split)] for split in ("train", "validation")]
    assert len(set(keys[0]) | set(keys[1])) == len(keys[0]) + len(keys[1]) == 882
    assert 40 < len(keys[1]) < 140
    assert images.decode(load(tmp_path)[0]["image"]).shape == (12, 18, 3)


def test_two_workers_write_what_one_writes(shards, uninterrupted, tmp_path):
    run(shards, tmp_path / "out", *OPTIONS, "--workers=2")
    assert content(tmp_path / "out") == uninterrupted


@pytest.mark.parametrize("workers", [1, 2])
def test_kill_9_then_the_same_command(shards, uninterrupted, tmp_path, workers):
    """Killed with the first shard just written, some unwritten, and no worker left behind."""
    out = tmp_path / "out"
    job = command(shards, out, *OPTIONS, f"--workers={workers}")
    process = subprocess.Popen(job, cwd=ROOT, stderr=subprocess.DEVNULL, start_new_session=True)
    while not list(out.glob(".work/*0.json")):
        assert process.poll() is None
        time.sleep(0.002)
    process.kill()
    process.wait()
    assert len(list(out.glob(".work/*[0-9].json"))) < 6
    assert not (out / "dataset_info.json").exists()
    wait_for_orphans(process.pid)
    run(shards, out, *OPTIONS, f"--workers={workers}")
    assert content(out) == uninterrupted


def wait_for_orphans(session):
    deadline = time.monotonic() + 10
    while orphans_of(session):
        assert time.monotonic() < deadline, "a worker outlived its parent"
        time.sleep(0.02)


def orphans_of(session):
    """Processes of a session that still run, zombies aside."""
    alive = []
    for stat in pathlib.Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, found = stat.read_text().rpartition(")")[2].split()[:4]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(found) == session and state != "Z":
            alive.append(stat)
    return alive


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_stop_it_at_once_and_say_how_to_go_on(shards, uninterrupted, tmp_path, number):
    out = tmp_path / "out"
    job = command(shards, out, *OPTIONS, "--workers=2")
    process = subprocess.Popen(job, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True)
    while not list(out.glob(".work/*.json")):
        assert process.poll() is None
        time.sleep(0.002)
    time.sleep(0.5)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=10)
    assert process.returncode == 42 and "the same command goes on" in stderr and "Traceback" not in stderr
    wait_for_orphans(process.pid)
    prepare.prepare(shards, str(out), Settings(size=12, validation_percent=10.0))
    assert content(out) == uninterrupted


def test_killed_worker_is_said_and_the_work_goes_on(shards, uninterrupted, tmp_path):
    out = tmp_path / "out"
    job = command(shards, out, *OPTIONS, "--workers=2")
    process = subprocess.Popen(job, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True)
    while not (
        workers := [s.parent for s in orphans_of(process.pid) if b"spawn_main" in (s.parent / "cmdline").read_bytes()]
    ):
        assert process.poll() is None
        time.sleep(0.01)
    os.kill(int(workers[0].name), signal.SIGKILL)
    _, stderr = process.communicate(timeout=20)
    assert process.returncode == 1 and stderr.startswith("error: a worker was killed") and stderr.count("\n") == 1
    prepare.prepare(shards, str(out), Settings(size=12, validation_percent=10.0))
    assert content(out) == uninterrupted


def test_a_log_file_gets_lines_and_a_second_process_is_refused(shards, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(shard_workers, "LOG_SECONDS", -1.0)
    write_unit = image_text.write_unit

    def meddling(*arguments, **options):
        with pytest.raises(InputError, match="another process"):
            prepare.prepare(shards, str(tmp_path / "out"), Settings())
        return write_unit(*arguments, **options)

    monkeypatch.setattr(image_text, "write_unit", meddling)
    prepare.prepare(shards, str(tmp_path / "out"), Settings())
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 900 and lines[0].startswith("prepare: 0 of 6 shards, 1 examples")
    assert "5 of 6 shards, 900 examples" in lines[-1] and "min left" in lines[-1]


def test_interrupted_at_every_rename_of_the_last_step(shards, uninterrupted, tmp_path, monkeypatch):
    """The move from work to result, cut before each of its renames, never looks whole and can be taken up."""
    rename = os.replace

    class Cut(Exception):
        pass

    # 12 shards, features.json, dataset_info.json, and last prepare.json, which says to us that all is done.
    for cut_at in (0, 1, 7, 12, 13, 14):
        out = tmp_path / f"out{cut_at}"
        count = -1

        def cutting(source, target, out=out, cut_at=cut_at):
            nonlocal count
            count += os.path.dirname(target) == str(out) and not target.endswith(".jsonl")
            if count == cut_at:
                raise Cut
            rename(source, target)

        monkeypatch.setattr(os, "replace", cutting)
        with pytest.raises(Cut):
            prepare.prepare(shards, str(out), Settings(size=12, validation_percent=10.0))
        monkeypatch.setattr(os, "replace", rename)
        if cut_at < 14:
            with pytest.raises(Exception, match="Could not read dataset info"):
                load(out)
        prepare.prepare(shards, str(out), Settings(size=12, validation_percent=10.0))
        assert content(out) == uninterrupted


def test_folder_with_captions(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    with open(folder / "captions.jsonl", "w", encoding="utf-8") as file:
        for i in range(10):
            (folder / f"{i}.png").write_bytes(picture((i, 0, 0)))
            file.write(json.dumps({"file_name": f"{i}.png", "caption": f"number {i}"}) + "\n")
    prepare.prepare(str(folder), str(tmp_path / "out"), Settings(), entries_per_shard=4)
    source = load(tmp_path / "out")
    assert [record["caption"].decode() for record in source] == [f"number {i}" for i in range(10)]
    assert [int(record["id"]) for record in source] == list(range(10))
    assert len(list((tmp_path / "out").glob("*.array_record-*"))) == 3


# ---------------------------------------------------------------- bad input


def test_limit_of_bad_examples(shards, tmp_path):
    """2% are bad: a limit of 1% fails, names the first ones and keeps the work; 3% then goes through."""
    out = tmp_path / "out"
    with pytest.raises(InputError, match="18 of 900 examples are bad.*max_bad_percent=1: '00000.tar' '000049'"):
        prepare.prepare(shards, str(out), Settings(), max_bad_percent=1)
    assert not (out / "dataset_info.json").exists()
    assert len((out / "bad_records.jsonl").read_text().splitlines()) == 18
    written = {path: path.stat().st_mtime_ns for path in out.glob(".work/*.array_record")}
    assert len(written) == 6
    prepare.prepare(shards, str(out), Settings(), max_bad_percent=3)
    assert len(load(out)) == 882
    kept = {path.stat().st_mtime_ns for path in out.glob("*.array_record-*")}
    assert kept == set(written.values())


def test_hopeless_jobs_stop_early(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "EARLY_STOP_EXAMPLES", 20)
    members = [(f"{i}.jpg", b"<html>") for i in range(20)]
    (tmp_path / "in").mkdir()
    for shard in range(3):
        write_tar(tmp_path / "in" / f"{shard}.tar", members)
    with pytest.raises(InputError, match="20 of 20 examples are bad"):
        prepare.prepare(str(tmp_path / "in"), str(tmp_path / "out"), Settings())
    assert not (tmp_path / "out" / ".work" / "0000001.json").exists()


def test_truncated_shard_is_used_in_part_and_named(shards, tmp_path):
    (tmp_path / "in").mkdir()
    data = pathlib.Path(shards, "00000.tar").read_bytes()
    (tmp_path / "in" / "a.tar").write_bytes(data[: len(data) // 2])
    (tmp_path / "in" / "b.tar").write_bytes(data)
    sentence = prepare.prepare(str(tmp_path / "in"), str(tmp_path / "out"), Settings(), max_bad_percent=10)
    assert "1 archives damaged and used in part: ['a.tar']" in sentence
    assert 147 + 60 < len(load(tmp_path / "out")) < 147 + 80


@pytest.mark.parametrize(
    "files, message",
    [
        ({}, "has neither tar shards"),
        ({"a.jpg": b"x"}, "has neither tar shards"),
        ({"captions.jsonl": b""}, "has no entries"),
        ({"captions.jsonl": b"{}\n", "a.tar": b""}, "is ambiguous"),
        ({"captions.jsonl": b"{}\n", "captions.csv": b""}, "is ambiguous"),
        ({"captions.jsonl": b"{}\n"}, "1 of 1 examples are bad"),
        ({"a.tar": bytes(1024)}, "no captioned picture"),
    ],
)
def test_sources_of_nothing(tmp_path, files, message):
    (tmp_path / "in").mkdir()
    for name, data in files.items():
        (tmp_path / "in" / name).write_bytes(data)
    with pytest.raises(InputError, match=message):
        prepare.prepare(str(tmp_path / "in"), str(tmp_path / "out"), Settings())
    assert not (tmp_path / "out" / "dataset_info.json").exists()


def test_all_bad_makes_no_data_set_however_high_the_limit(tmp_path):
    write_tar(tmp_path / "a.tar", [("k.jpg", b"<html>"), ("k.txt", b"\x1b[2J")])
    with pytest.raises(InputError, match="no usable example") as caught:
        prepare.prepare(str(tmp_path / "a.tar"), str(tmp_path / "out"), Settings(), max_bad_percent=100)
    assert "\x1b" not in str(caught.value)


def test_built_in_sets_by_name(tmp_path):
    done = run("captioned_shapes", tmp_path, "--variant=smoke")
    assert len(load(done.stdout.strip())) > 0
    done = run("captioned_shapes", tmp_path, "--variant=smok", code=1)
    assert "did you mean 'smoke'?" in done.stderr


def test_out_of_another_job_is_left_alone(shards, tmp_path):
    one = str(pathlib.Path(shards, "00001.tar"))
    prepare.prepare(one, str(tmp_path / "out"), Settings())
    before = content(tmp_path / "out")
    assert "already holds" in prepare.prepare(one, str(tmp_path / "out"), Settings())
    with pytest.raises(InputError, match="another size;"):
        prepare.prepare(one, str(tmp_path / "out"), Settings(size=8))
    with pytest.raises(InputError, match="another source;"):
        prepare.prepare(shards, str(tmp_path / "out"), Settings())
    assert content(tmp_path / "out") == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(InputError, match="not empty"):
        prepare.prepare(one, str(tmp_path / "mine"), Settings())
    assert content(tmp_path / "mine") == {"thesis.tex": b"x"}


def test_program_says_one_sentence(tmp_path):
    for arguments, message in [
        ((str(tmp_path / "nothing"), tmp_path / "out"), "matches no file"),
        (("", tmp_path / "out"), "--source is missing"),
        ((str(tmp_path), tmp_path / "out", "--workers=0"), "workers"),
    ]:
        done = run(*arguments, code=1)
        assert done.stderr.startswith("error: ") and message in done.stderr and done.stderr.count("\n") == 1


def test_no_jax_torch_or_tensorflow_is_imported(shards, tmp_path):
    script = (
        "import sys; from unclip_jax import prepare; from unclip_jax.data.image_text import Settings;"
        f"prepare.prepare({str(pathlib.Path(shards, '00001.tar'))!r}, {str(tmp_path / 'out')!r}, Settings(size=8));"
        "print(sorted({'jax', 'torch', 'tensorflow'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_nothing_here_can_run_code_from_data():
    for path in [ROOT / "unclip_jax" / "prepare.py", *(ROOT / "unclip_jax" / "data").glob("*.py")]:
        code = path.read_text()
        for forbidden in (
            "pickle.",
            "import pickle",
            "extractall(",
            " eval(",
            " exec(",
            "import yaml",
            "allow_pickle=True",
        ):
            assert forbidden not in code, f"{path} has {forbidden}"
