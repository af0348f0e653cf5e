"""Configs are strict: every key of every config is held against a change of one letter and against bad values."""

import json
import math
import pathlib
import string
import subprocess
import sys

import pytest
from etils import epath
from ml_collections import ConfigDict

from unclip_jax import config as configs
from unclip_jax.errors import InputError

ROOT = pathlib.Path(__file__).resolve().parent.parent
NO_VARIANTS = ("__init__", "common", "imported")  # imported.py takes a workdir in the place of a variant
FILES = sorted(path.name for path in (ROOT / "configs").glob("*.py") if path.stem not in NO_VARIANTS)
STAGES = [file for file in FILES if not file.startswith("eval_")]


def variants(file: str) -> list[str]:
    """The variants that the refusal of an unknown one names."""
    with pytest.raises(InputError, match="known are ") as refusal:
        configs.load(f"{ROOT}/configs/{file}:?")
    return str(refusal.value).rpartition("known are ")[2].split(", ")


ALL = [f"{ROOT}/configs/{file}:{variant}" for file in FILES for variant in variants(file)]


def name(spec: str) -> str:
    return pathlib.Path(spec).name


def paths(tree: dict, prefix: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Every key of a tree, sections and leaves, from the root on."""
    found = []
    for key, value in tree.items():
        found.append((*prefix, key))
        if isinstance(value, dict):
            found += paths(value, (*prefix, key))
    return found


def edited(tree: dict, path: tuple[str, ...], *, key: str | None = None, value: object = None) -> dict:
    """A copy of a tree in which the last key of `path` is renamed, or has another value."""
    first, *rest = path
    if rest:
        return {**tree, first: edited(tree[first], tuple(rest), key=key, value=value)}
    if key is None:
        return {**tree, first: value}
    return {key if old == first else old: held for old, held in tree.items()}


def test_there_is_a_config_for_each_stage_with_the_variants_that_readers_look_for():
    stages = {configs.load(spec).stage for spec in ALL if not name(spec).startswith("eval_")}
    assert stages == {"clip", "prior_ar", "prior_diffusion", "decoder", "upsampler"}
    for file in STAGES:
        stems = {variant.partition("_")[0] for variant in variants(file)}
        assert {"tiny", "emoji", "small", "paper"} <= stems, file


@pytest.mark.parametrize("spec", ALL, ids=name)
def test_every_config_passes_and_comes_back_from_json(spec):
    config = configs.load(spec)
    again = configs.from_json(configs.to_json(config))
    assert again.to_dict() == config.to_dict()
    assert configs.difference(config, again, ignore=()) == {}
    assert configs.to_json(again) == configs.to_json(config)
    assert config.is_locked and again.is_locked


def test_every_key_with_one_letter_changed_is_refused_and_the_key_is_named():
    seen = set()
    for spec in ALL:
        tree = configs.load(spec).to_dict()
        for number, path in enumerate(paths(tree)):
            if path in seen:
                continue
            seen.add(path)
            *above, key = path
            letters = [place for place, letter in enumerate(key) if letter.isalpha()]
            place = letters[number % len(letters)]
            letter = string.ascii_lowercase[(string.ascii_lowercase.index(key[place]) + 7) % 26]
            typo = key[:place] + letter + key[place + 1 :]
            with pytest.raises(InputError) as refusal:
                configs.from_json_value(edited(tree, path, key=typo))
            assert ".".join(("config", *above, typo)) in str(refusal.value)
            assert f"'{key}'" in str(refusal.value), f"{typo} should have named {key}"
    assert len(seen) > 150


def bad_values(value: object) -> list[object]:
    """Values that cannot stand in the place of `value`, whatever its key."""
    if isinstance(value, bool):
        return ["yes", 1, 0.0, math.nan, ()]
    if isinstance(value, int | float):
        return ["1", True, math.nan, math.inf, -math.inf, -1e9, (1,), {}]
    if isinstance(value, str):
        return [1, 1.5, True, ("a",), {}]
    if isinstance(value, tuple):
        return ["ab", 3, True, {}]
    return ["1", True, math.nan, math.inf, -1, -1e9]  # an optional number that is not set


def test_bad_values_are_refused_by_name():
    seen = set()
    for spec in ALL:
        config = configs.load(spec)
        tree = config.to_dict()
        for dotted, value in configs.leaves(config):
            if dotted in seen:
                continue
            seen.add(dotted)
            if value is not None and not dotted.endswith(("_steps", "_examples", "_percent", "clip_x_start")):
                bad = [*bad_values(value), None]
            else:
                bad = bad_values(value)
            if dotted == "sampling.guidance_scale":  # any finite number is one
                bad.remove(-1e9)
            for wrong in bad:
                try:
                    configs.from_json_value(edited(tree, tuple(dotted.split(".")), value=wrong))
                    refusal = "nothing"
                except InputError as error:
                    refusal = str(error)
                assert f"config.{dotted}" in refusal, f"config.{dotted}={wrong!r} was answered by {refusal}"


@pytest.mark.parametrize(
    ("key", "wrong"),
    [
        ("batch_size", 0),
        ("optim.final_fraction", 1.01),
        ("optim.beta1", 1.0),
        ("optim.learning_rate", -1e-9),
        ("model.vocab_size", 2),
        ("mesh.data", -2),
        ("data.max_bad_percent", 100.5),
        ("optim.warmup_percent", 101.0),
        ("total_steps", 1.5),
    ],
)
def test_the_edge_of_a_range_is_refused_with_the_range(key, wrong):
    tree = configs.load(f"{ROOT}/configs/clip.py:tiny").to_dict()
    with pytest.raises(InputError, match=r"it must (lie in \[|be int)"):
        configs.from_json_value(edited(tree, tuple(key.split(".")), value=wrong))


@pytest.mark.parametrize("wrong", [(), (0,), (1, 1.5), (1, "2"), (1, True), (1, None), (1, math.nan)])
def test_a_list_of_sizes_holds_whole_numbers_from_one_on(wrong):
    tree = configs.load(f"{ROOT}/configs/decoder.py:tiny").to_dict()
    wrong_tree = edited(tree, ("model", "unet", "channel_mult"), value=wrong)
    if wrong == ():  # no attention at all is a network; no level at all is not, which the network says
        assert configs.from_json_value(wrong_tree).model.unet.channel_mult == ()
    else:
        with pytest.raises(InputError, match=r"config\.model\.unet\.channel_mult"):
            configs.from_json_value(wrong_tree)


def test_sections_and_values_do_not_stand_for_one_another():
    tree = configs.load(f"{ROOT}/configs/clip.py:tiny").to_dict()
    with pytest.raises(InputError, match=r"config\.seed is a section"):
        configs.from_json_value({**tree, "seed": {"a": 1}})
    with pytest.raises(InputError, match=r"config\.optim=3 is a value; it must be a section with accumulation, "):
        configs.from_json_value({**tree, "optim": 3})


def test_durations_are_given_once_and_counted_in_steps():
    def duration(**given):
        section = ConfigDict({"every_steps": None, "every_examples": None, "every_percent": None, **given})
        return configs.duration(section, "every", batch_size=32, total_steps=1000)

    assert duration(every_steps=7) == 7
    assert duration(every_steps=0) == 0
    assert [duration(every_examples=examples) for examples in (1, 32, 33, 320)] == [1, 1, 2, 10]
    assert [duration(every_percent=percent) for percent in (0.0, 5.0, 100.0)] == [0, 50, 1000]
    for given in ({}, {"every_steps": 1, "every_percent": 1.0}):
        with pytest.raises(InputError, match="exactly one of every_steps, every_examples, every_percent"):
            duration(**given)


def test_a_total_is_no_percentage():
    config = configs.load(f"{ROOT}/configs/clip.py:tiny", {"total_steps": None, "total_percent": 50.0})
    with pytest.raises(InputError, match="total_percent is a percentage of nothing"):
        configs.total_steps(config)


def test_overrides_are_as_strict_as_files():
    spec = f"{ROOT}/configs/clip.py:tiny"
    assert configs.load(spec, {"optim.eps": 1e-3, "batch_size": 8}).optim.eps == 1e-3
    with pytest.raises(InputError, match=r"optim\.lerning_rate.*optim\.learning_rate"):
        configs.load(spec, {"optim.lerning_rate": 1.0})
    with pytest.raises(InputError, match=r"config\.optim\.beta2"):
        configs.load(spec, {"optim.beta2": 2.0})


def test_difference_names_what_changes_the_result_only():
    spec = f"{ROOT}/configs/clip.py:tiny"
    old = configs.load(spec)
    new = configs.load(spec, {"optim.eps": 0.5, "data.workers": 3, "log.every_percent": 1.0, "checkpoint.keep": 9})
    assert configs.difference(old, old) == {}
    assert configs.difference(old, new) == {"optim.eps": (old.optim.eps, 0.5)}
    everything = {"optim.eps", "data.workers", "log.every_percent", "checkpoint.keep"}
    assert set(configs.difference(old, new, ignore=())) == everything


def test_a_workdir_keeps_the_config_that_it_began_with(tmp_path):
    spec = f"{ROOT}/configs/clip.py:tiny"
    workdir = epath.Path(tmp_path) / "run"
    first = configs.load(spec)
    assert configs.claim_workdir(workdir, first) == {}
    assert configs.claim_workdir(workdir, configs.load(spec, {"data.workers": 1})) == {}
    size, depth = first.batch_size, first.model.text_depth
    other = configs.load(spec, {"batch_size": 2 * size, "model.text_depth": depth + 1})
    kept = (workdir / "config.json").read_text()
    with pytest.raises(InputError) as refusal:
        configs.claim_workdir(workdir, other)
    assert f"config.batch_size: {size} there, {2 * size} here; " in str(refusal.value)
    assert f"config.model.text_depth: {depth} there, {depth + 1} here" in str(refusal.value)
    assert (workdir / "config.json").read_text() == kept
    accepted = configs.claim_workdir(workdir, other, accept_changes=True)
    assert accepted == {"batch_size": (size, 2 * size), "model.text_depth": (depth, depth + 1)}
    assert json.loads((workdir / "config.json").read_text())["batch_size"] == 2 * size


def test_a_damaged_config_in_the_workdir_is_bad_input(tmp_path):
    config = configs.load(f"{ROOT}/configs/clip.py:tiny")
    (tmp_path / "config.json").write_text(configs.to_json(config)[:100])
    with pytest.raises(InputError, match=r"config\.json cannot be read"):
        configs.claim_workdir(epath.Path(tmp_path), config)


def test_unknown_files_and_variants():
    with pytest.raises(InputError, match="configs/nothing.py.*does not exist"):
        configs.load("configs/nothing.py:tiny")
    with pytest.raises(InputError, match="no variant 'tinny'; did you mean 'tiny'"):
        configs.load(f"{ROOT}/configs/clip.py:tinny")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--config=configs/clip.py:tinny", "--workdir=x"], "did you mean 'tiny'?"),
        (["--config=configs/clip.py:tiny", "--workdir=x", "--config.optim.lerning_rate=1"], "learning_rate"),
        (["--config=configs/clip.py:tiny", "--workdir=x", "--config.optim.beta2=nan"], "config.optim.beta2"),
        (["--config=configs/clip.py:tiny", "--workdir=x", "--config.stage=clop"], "'clip'"),
        (["--config=configs/clip.py:tiny"], "--workdir"),
        (["--wrokdir=x"], "workdir"),
        (["configs/clip.py:tiny"], "--name=value"),
    ],
)
def test_a_wrong_command_line_is_one_sentence_and_status_1(arguments, says, tmp_path):
    command = [sys.executable, "-m", "unclip_jax.train", *arguments]
    command = [argument.replace("--workdir=x", f"--workdir={tmp_path}/run") for argument in command]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ") and says in line
    assert not (tmp_path / "run").exists()
