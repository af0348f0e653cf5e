"""Plans of small configs: what they state is held against closed forms and against the config itself."""

import dataclasses
import functools
import json
import os
import pathlib
import subprocess
import sys

import jax
import pytest
import small_configs

from unclip_jax import description, plan_search, planning, topologies, traced_run
from unclip_jax.errors import InputError

ROOT = pathlib.Path(__file__).resolve().parent.parent
SLICE = topologies.find("v5e-4")
TEXTS = 64


@functools.cache
def config(**mesh):
    return small_configs.small("clip", **(mesh or {"mesh__data": 1, "mesh__fsdp": 4}))


@functools.cache
def captions():
    """CLIP's embedding of captions, compiled for four chips."""
    return planning.plan(config(), SLICE, name="z_t", batch_per_chip=TEXTS)


def test_a_plan_says_what_its_program_takes():
    made = captions()
    assert made.fits and made.compiled
    assert (made.chips, made.batch_size, made.mesh["fsdp"]) == (4, 4 * TEXTS, 4)
    assert made.bytes_per_chip == sum(made.memory.values()) < made.hbm_per_chip
    assert made.headroom == pytest.approx(1 - made.bytes_per_chip / made.hbm_per_chip)
    assert 0 < made.mfu_estimate < 1 and made.days is None
    assert made.examples_per_second == pytest.approx(made.batch_size / made.step_seconds_estimate)
    assert json.loads(json.dumps(made.as_dict())) == made.as_dict()


def test_a_text_towers_operations_are_its_closed_form():
    text = config().model
    width, depth, length = text.text_width, text.text_depth, text.context_length
    block = 24 * width**2 * length + 4 * length**2 * width
    assert captions().executed_flops == 4 * TEXTS * (depth * block + 2 * width * text.embed_dim)


def test_weights_are_gathered_from_the_chips_that_share_them():
    """Every weight that is split over chips is read whole, once or more, in bfloat16 or float32."""
    gathered = captions().collectives["all-gather"]
    assert gathered["sent"] == pytest.approx(gathered["bytes"] * 3 / 4)
    assert captions().exchanged and {one["among"] for one in captions().exchanged} == {4}


def test_a_training_state_is_weights_and_three_more_of_each_split_over_chips():
    whole = config(mesh__data=4, mesh__fsdp=1)
    parts = config()
    devices = traced_run.devices_of(SLICE)
    of = [traced_run.lay_out(traced_run.prepare(one, SLICE), SLICE, devices) for one in (whole, parts)]
    weights = description.describe(whole).parameters
    batch = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(of[0].program.batch())) // 4
    scalars = 64  # counters
    assert of[0].argument_bytes == pytest.approx(4 * 4 * weights + batch, abs=scalars)
    assert of[1].argument_bytes < of[0].argument_bytes / 2


def test_a_batch_that_outgrows_the_chip_is_an_answer_with_what_would_mend_it():
    made = planning.plan(config(), SLICE, name="z_t", batch_per_chip=2_000_000)
    assert not made.fits and made.headroom < 0 and made.bytes_per_chip > made.hbm_per_chip
    assert made.largest_buffers[0]["bytes"] > 2**30
    assert any("--batch_per_chip=1000000" in said for said in made.advice)


def test_gpus_are_planned_without_a_compiler_and_it_is_said():
    made = planning.plan(config(mesh__data=1, mesh__fsdp=8), topologies.find("h100-8"))
    assert not made.compiled and set(made.memory) == {"arguments"} and made.fits is None
    weights = description.describe(config()).parameters
    assert made.collectives["reduce-scatter"] == {"count": 1, "bytes": 4 * weights, "sent": 4 * weights * 7 / 8}
    assert made.collectives["all-gather"]["bytes"] == 2 * 2 * weights and made.roofline["dcn_seconds"] == 0
    assert any("no compiler for GPUs" in said for said in made.warnings)
    chip = topologies.CHIPS["h100"]
    assert made.step_seconds_estimate >= made.executed_flops / (8 * chip.bf16_flops)
    assert made.model_flops == description.describe(config()).train_flops_per_example * 16


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"name": "z_x"}, "did you mean 'z_[it]'"),
        ({"name": "sample"}, "none of this stage's programs"),
        ({"batch_per_chip": 0}, "give 1 or more"),
    ],
)
def test_what_cannot_be_planned_is_refused(changes, said):
    with pytest.raises(InputError, match=said):
        planning.plan(config(), SLICE, **changes)


def search(topology, sizes, limit):
    """Searches with a planner that is told (fsdp, model, remat) -> GiB of a chip and seconds of a step."""
    asked = []

    def planner(config, topology, **_):
        key = (config.mesh.fsdp, config.mesh.model, config.model.remat)
        asked.append(key)
        gib, seconds = sizes.get(key, (1, 9.0))
        needed, hbm = int(gib * 2**30), topology.chip.hbm_bytes
        changes = {"bytes_per_chip": needed, "fits": needed <= hbm, "fits_with_headroom": needed <= 0.9 * hbm}
        return dataclasses.replace(captions(), step_seconds_estimate=seconds, **changes)

    found = plan_search.search(config(), topology, limit=limit, planner=planner)
    return asked, found


def test_a_search_ranks_what_fits_by_time_and_leaves_out_what_must_be_slower():
    sizes = {(4, 1, "none"): (20, 1.0), (4, 1, "full"): (8, 3.0), (1, 1, "none"): (9, 2.0)}
    sizes[4, 1, "products"] = (18, 2.5)
    asked, found = search(SLICE, sizes, limit=20)
    assert (4, 1, "full") in asked, "recomputing is tried where keeping does not fit"
    assert (1, 1, "full") not in asked, "and not where it does"
    first, *_, last = [(one.candidate.mesh[1], one.plan.step_seconds_estimate, one.plan.fits) for one in found]
    assert first == (1, 2.0, True) and last == (4, 1.0, False) and asked[0] == (4, 1, "none")


def test_a_search_compiles_no_more_than_asked_and_nothing_whose_arguments_do_not_fit():
    assert len(search(SLICE, {}, limit=2)[0]) == 2
    tiny = dataclasses.replace(SLICE, chip=dataclasses.replace(SLICE.chip, hbm_bytes=1000))
    asked, found = search(tiny, {}, limit=20)
    assert not asked and found and all("arguments alone" in one.word for one in found)


def test_the_command_plans_a_training_step_in_json():
    command = [sys.executable, "-m", "unclip_jax.plan", "--config=tests/small_clip.py:120", "--topology=v5e-4"]
    plain = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    done = subprocess.run([*command, "--json"], cwd=ROOT, capture_output=True, text=True, timeout=600, env=plain)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    wanted = {"fits", "bytes_per_chip", "hbm_per_chip", "collectives", "step_seconds_estimate", "mfu_estimate"}
    assert wanted | {"compile_seconds"} <= set(found) and found["fits"]
    assert found["program"] == "train" and found["mesh"] == {"slice": 1, "data": 4, "fsdp": 1, "model": 1}
    assert found["collectives"]["all-reduce"]["bytes"] > 0  # gradients
    assert found["host_peak_bytes"] < 4e9
