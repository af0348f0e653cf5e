"""Units: whole or not there, of this run or refused, and every row exactly once before anything is reduced."""

import json
import shutil

import numpy as np
import pytest

from unclip_jax.data import sealed
from unclip_jax.errors import InputError
from unclip_jax.evaluation import units

MANIFEST = {"protocol": {"name": "p", "digest": "1"}, "models": {"decoder": {"step": 3, "digest": "d"}}, "seed": 0}
ROWS, UNIT = 22, 5


def made(number, width=3):
    return np.random.default_rng(number).normal(size=(len(range(number * UNIT, min((number + 1) * UNIT, ROWS))), width))


def units_of(folder, **changes):
    return units.Units(folder, {**MANIFEST, **changes}, rows=ROWS, unit_rows=UNIT)


@pytest.fixture
def whole(tmp_path):
    """A finished folder, its units written from the last to the first."""
    one = units_of(tmp_path / "run")
    one.begin()
    for number in reversed(range(len(one))):
        one.write(number, {"x": made(number)}, {number * UNIT: "because"} if number == 2 else None, {"seconds": 0.5})
    return one


def test_what_is_written_is_read_in_order(whole):
    assert len(whole) == 5 and not whole.missing()
    expected = np.concatenate([made(number) for number in range(5)])
    np.testing.assert_array_equal(whole.gathered("x")["x"], expected)
    assert whole.bad() == {10: "because"} and whole.cost() == {"seconds": 2.5}


def test_the_same_unit_is_the_same_file(whole, tmp_path):
    again = units_of(tmp_path / "again")
    again.begin()
    again.write(1, {"x": made(1)})
    name = "units/00001.npz"
    assert (again.folder / name).read_bytes() == (whole.folder / name).read_bytes()
    whole.write(1, {"x": made(1)})  # a second writer that computes alike
    with pytest.raises(InputError, match="00001.npz was made twice and came out differently"):
        whole.write(1, {"x": made(1) + 1e-9})


def test_every_flipped_bit_and_every_cut_is_found_and_that_unit_alone_is_missing(whole, caplog):
    path = whole.folder / "units" / "00003.npz"
    report, content = path.with_suffix(".json"), path.read_bytes()
    said = report.read_bytes()
    for bit in range(0, 8 * len(content), 331):
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        report.write_bytes(said)
        assert whole.missing() == [3]
    for length in (0, 100, len(content) - 1):
        path.write_bytes(content[:length])
        report.write_bytes(said)
        with pytest.raises(InputError, match="00003.npz is missing or damaged; the same command makes it anew"):
            whole.gathered("x")
        assert whole.missing() == [3]
    assert f"00003.npz is damaged ({len(content) - 1} bytes of {len(content)}) and is made anew" in caplog.text
    for place in range(0, len(said), 7):
        damaged = bytearray(said)
        damaged[place] ^= 2
        path.write_bytes(content)
        report.write_bytes(damaged)
        assert whole.missing() == [3]
    whole.write(3, {"x": made(3)})
    assert not whole.missing()


def test_a_unit_of_another_run_is_refused(whole, tmp_path):
    other = units_of(tmp_path / "other", seed=1)
    other.begin()
    for number in range(5):
        other.write(number, {"x": made(number)})
    for name in ("00002.npz", "00002.json"):
        shutil.copy(other.folder / "units" / name, whole.folder / "units" / name)
    with pytest.raises(InputError, match=f"00002.json is a unit of run {other.id}, and this is run {whole.id}"):
        whole.missing()


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda rows: np.where(rows == 7, 8, rows), "row 7 of 22 is missing"),
        (lambda rows: np.where(rows == 7, 3, rows), "row 3 of 22 is there 2 times"),
        (lambda rows: np.where(rows == 7, 22, rows), "holds row 22, which this run has not"),
        (lambda rows: np.where(rows == 7, -1, rows), "holds row -1, which this run has not"),
    ],
)
def test_every_row_is_there_exactly_once_or_nothing_is_reduced(whole, change, match):
    """As if a process had numbered its rows wrongly: the file is whole, and what it says of itself is, too."""
    path = whole.folder / "units" / "00001.npz"
    rows = whole.read(1, ("x",))
    np.savez(path, row=change(rows["row"]), x=rows["x"])
    report = sealed.read(path.with_suffix(".json"))
    report |= {"digest": sealed.digest(path.read_bytes())}
    sealed.write(path.with_suffix(".json"), sealed.sealed(report))
    assert not whole.missing()
    with pytest.raises(InputError, match=match):
        whole.gathered("x")


def test_another_manifest_is_refused_with_the_fields_that_differ(whole):
    changed = {"models": {"decoder": {"step": 4, "digest": "e"}}}
    with pytest.raises(InputError, match=r"models.decoder.digest was 'd', is 'e'; models.decoder.step was 3, is 4"):
        units_of(whole.folder, **changed).begin()
    with pytest.raises(InputError, match="eta was None, is 0.5"):
        units_of(whole.folder, eta=0.5).begin()
    units_of(whole.folder).begin()
    job = whole.folder / "job.json"
    job.write_text(job.read_text().replace('"step": 3', '"step": 4'))  # damaged: units know whose they are
    units_of(whole.folder).begin()
    assert json.loads(job.read_text())["models"]["decoder"]["step"] == 3


def test_folders_of_something_else_are_left_alone(tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(InputError, match="holds thesis.tex and no run of this program; choose another --workdir"):
        units_of(tmp_path).begin()
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot be written"):
        units_of(tmp_path / "file" / "run").begin()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "thesis.tex"]
