"""The ablations: fair budgets, honest intervals, all cells and each once; and all of it as a process."""

import dataclasses
import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import untrained_models

from unclip_jax import ablation_cells, ablation_tables, ablations, programs
from unclip_jax import config as configs
from unclip_jax.ablation_cells import Plan, Setting
from unclip_jax.errors import InputError

ROOT = pathlib.Path(__file__).resolve().parent.parent
PATIENCE = 900.0


def options(folder, **changes):
    values = {
        "workdir": folder / "run", "data_dir": str(folder), "smoke": False, "seed": 0, "captions": 4, "seeds": 2,
        "guidance_scales": (1.0, 1.5, 3.0), "steps": ("8", "64"), "cache": "", "schedule": "auto",
    }  # fmt: skip
    return ablations.Options(**{**values, **changes})


def test_what_is_compared_learns_from_equal_budgets(tmp_path):
    loaded = {
        name: configs.load(ablations.spec(name), ablations.overrides(name, options(tmp_path)))
        for name in ablations.PARTS
    }
    decoders = ("decoder", "decoder_glide", "decoder_text")
    for group in (decoders, ("prior_ar", "prior_diffusion")):
        assert len({(configs.total_steps(loaded[name]), loaded[name].batch_size) for name in group}) == 1
    first = loaded["decoder"]
    for name in decoders[1:]:
        # The condition and what is dropped of it; not the network's size, the process, or the optimizer.
        apart = configs.difference(first, loaded[name])
        allowed = ("condition", "drop.", "clip.", "frozen.", "model.embed_dim", "model.clip_tokens")
        assert apart and all(key.startswith(allowed) for key in apart), apart
    assert loaded["decoder_text"].condition == "text" and loaded["decoder_glide"].model.embed_dim == 0


def test_the_rows_are_the_papers():
    conditions = {(decoder, embedding) for _, decoder, embedding in ablations.ROWS}
    assert conditions == {
        ("decoder", "dropped"), ("decoder_glide", "dropped"), ("decoder", "none"), ("decoder_text", "none"),
        ("decoder", "ar"), ("decoder", "diffusion"), ("decoder", "true"),
    }  # fmt: skip
    assert ablations.REFERENCE in {label for label, *_ in ablations.ROWS}


@pytest.mark.parametrize("parts", [1, 2, 3, 7])
def test_every_setting_is_in_one_part_and_parts_cost_alike(tmp_path, parts):
    settings = ablations.settings(options(tmp_path))
    plan = Plan("", 4, (0, 1), 4, settings)
    dealt = [plan.part(number, parts) for number in range(parts)]
    assert sorted(map(str, settings)) == sorted(str(setting) for part in dealt for setting in part)
    costs = [sum(setting.cost for setting in part) for part in dealt]
    assert max(costs) - min(costs) <= 2 * max(setting.cost for setting in settings)


def test_a_plan_comes_back_from_its_file(tmp_path):
    plan = Plan("somewhere", 4, (3, 4), 50, ablations.settings(options(tmp_path)))
    plan.write(tmp_path)
    assert Plan.read(tmp_path) == plan
    with pytest.raises(InputError, match="has no plan.json.*unclip_jax.ablations"):
        Plan.read(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"steps": ("8", "2000")}, "from 1 to 1000"),
        ({"steps": ("few",)}, "unknown sampling steps"),
        ({"guidance_scales": (1.0, float("nan"))}, "out of range"),
    ],
)
def test_what_cannot_be_sampled_is_refused_before_anything_is_trained(tmp_path, changes, said):
    with pytest.raises(InputError, match=said):
        ablations.run(options(tmp_path, **changes))
    assert not (tmp_path / "run").exists()


def test_a_cells_file_is_named_after_what_it_depends_on(tmp_path):
    setting = Setting("priors", "row", "decoder", "ar", 1.5)
    for folder in ("clip", "prior_ar", "decoder"):
        (tmp_path / folder / "checkpoints" / "4").mkdir(parents=True)
        (tmp_path / folder / "config.json").write_text("{}")

    def name(setting=setting, seed=0, captions=("a red star",)):
        return ablation_cells.cell_path(tmp_path, setting, seed, captions).name

    first = name()
    assert name() == first
    others = {name(dataclasses.replace(setting, guidance_scale=2.0)), name(seed=1), name(captions=("a blue star",))}
    (tmp_path / "prior_ar" / "checkpoints" / "8").mkdir()
    assert len(others | {first, name()}) == 5


def test_intervals_hold_the_mean_95_times_in_100():
    """Draws of one caption are alike, and an interval that took them for independent would be too short."""
    rng = np.random.default_rng(0)
    inside, trials = 0, 600
    for _ in range(trials):
        chance = rng.beta(0.5, 0.5, 150)  # some captions are hard
        drawn = (rng.random((4, 150)) < chance).astype(float)
        mean, half = ablation_tables.interval(drawn)
        inside += abs(mean - 0.5) <= half
    assert 0.92 < inside / trials < 0.98


def _cell(verdicts, **more):
    return {"verdicts": {name: verdicts for name in ablation_tables.VERDICTS}, **more}


def test_differences_are_taken_caption_by_caption():
    rng = np.random.default_rng(0)
    easy = (rng.random(400) < 0.5).astype(float)
    worse = np.where(rng.random(400) < 0.1, 0.0, easy)
    mean, half = ablation_tables.difference([_cell(easy.tolist())], [_cell(worse.tolist())])
    assert mean == pytest.approx(easy.mean() - worse.mean())
    # Far shorter than of two independent groups.
    assert half < 0.5 * np.hypot(*(ablation_tables.interval(x[None])[1] for x in (easy, worse)))
    assert ablation_tables.difference([_cell([0.0, 1.0])], [_cell([0.0, 1.0])]) == [0.0, 0.0]


def test_cells_are_averaged_over_seeds():
    cells = [_cell([1.0, 0.0], cosine=[0.9, 0.7], norm=[1.0, 1.2], spread=0.8), _cell([1.0, 1.0], cosine=[0.7, 0.7],
             norm=[1.0, 1.0], spread=1.0)]  # fmt: skip
    made = ablation_tables.combine(cells)
    assert made["both"][0] == 0.75 and made["both"][1] == pytest.approx(1.96 * np.std([1, 0.5], ddof=1) / np.sqrt(2))
    assert made["cosine"][0] == pytest.approx(0.75) and made["norm"][0] == pytest.approx(1.05)
    assert made["spread"] == [pytest.approx(0.9)] and "variance" not in made


@pytest.mark.parametrize(("deviation", "spread"), [(0.2, 1.0), (0.1, 0.4), (0.4, 1.6)])
def test_draws_that_are_as_the_truth_have_its_length_variance_and_spread(deviation, spread):
    """The truth is N(m, 0.2^2) about the mean m of its caption; draws of deviation s have 2 s^2 / (s^2 + 0.2^2)."""
    rng = np.random.default_rng(0)
    means = rng.normal(size=(4000, 1, 30))
    true = means[:, 0] + 0.2 * rng.normal(size=(4000, 30))
    drawn = means + deviation * rng.normal(size=(4000, 2, 30))
    found = ablation_cells.spread_of(drawn, true)
    assert found["spread"] == pytest.approx(spread, rel=0.02)
    assert found["variance"] == pytest.approx((1 + deviation**2) / (1 + 0.2**2), rel=0.02)
    np.testing.assert_allclose(found["norm"], np.sqrt(np.square(drawn[:, 0]).sum(1)), rtol=1e-6)


def test_the_best_of_each_label_is_marked_and_ordered():
    rows = [
        {"label": label, "guidance_scale": scale, **{name: [both, 0.01] for name in ablation_tables.VERDICTS}}
        for label, scale, both in (("a", 1, 0.2), ("a", 2, 0.4), ("b", 1, 0.6), ("b", 2, 0.5))
    ]
    assert ablation_tables.order(rows) == [("b", 0.6), ("a", 0.4)]
    lines = ablation_tables.priors_table(rows, reference="b")
    assert [line.count("**") for line in lines[2:]] == [0, 2, 2, 0]
    assert "| a | 2 | 40.0 ± 1.0 | 40.0 ± 1.0 | **40.0 ± 1.0** |  |" in lines
    assert len({line.count("|") for line in lines}) == 1


def test_what_is_trained_is_measured_and_what_is_measured_is_left(tmp_path, data_dir, compile_cache):
    """The parts are there, untrained; the quickstart's test has the same jobs train."""
    workdir = tmp_path / "run"
    chosen = options(tmp_path, smoke=True, data_dir=data_dir)
    for name in ablations.PARTS:
        config = configs.load(ablations.spec(name), ablations.overrides(name, chosen))
        untrained_models.save(workdir / name, config, step=configs.total_steps(config))
    command = [sys.executable, "-m", "unclip_jax.ablations", "--smoke", f"--workdir={workdir}", "--steps=2"]
    command += [f"--data_dir={data_dir}", f"--compile_cache={compile_cache}", "--guidance_scales=1.5"]

    def run():
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE)
        assert done.returncode == programs.DONE, done.stderr[-4000:]
        return done

    first = run()
    assert not list(workdir.glob("*/train.log"))
    figures = json.loads((workdir / "results.json").read_text())
    assert len(figures["priors"]) == len(ablations.ROWS) and len(figures["variances"]) == len(ablations.VARIANCES)
    for row in figures["priors"] + figures["variances"]:
        assert all(0 <= row[name][0] <= 1 for name in ablation_tables.VERDICTS)
    assert all(-1 <= row["cosine"][0] <= 1 and row["norm"][0] > 0 for row in figures["variances"])
    assert len({row["cosine"][0] for row in figures["variances"]}) >= 3
    assert figures["oracle"]["both"] == 1.0
    assert (workdir / "results.md").read_text() in first.stdout
    cells = {path: path.stat().st_mtime_ns for path in (workdir / "cells").iterdir()}
    assert len(cells) == 2 * (len(ablations.ROWS) + len(ablations.VARIANCES))
    lost, *kept = cells
    lost.unlink()
    assert "statistics is done already" in run().stderr
    assert {path: path.stat().st_mtime_ns for path in kept} == {path: cells[path] for path in kept} and lost.exists()
