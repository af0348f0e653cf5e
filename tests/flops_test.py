"""Counted operations against the formulas of layers, and whole stages against the counts published for the paper's."""

import functools
import json
import pathlib
import re
import subprocess
import sys
import tempfile
import time

import jax
import jax.numpy as jnp
import pytest

from unclip_jax import config as configs
from unclip_jax import flops, sharding
from unclip_jax.description import describe
from unclip_jax.errors import InputError
from unclip_jax.models.transformer import Transformer, causal_mask
from unclip_jax.models.unet import UNet

ROOT = pathlib.Path(__file__).resolve().parent.parent


def array(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def total(fn, *arguments) -> int:
    return flops.count(fn, *arguments).total()


def test_products_and_convolutions_count_two_operations_a_term():
    assert total(lambda a, b: a @ b, array(5, 7), array(7, 11)) == 2 * 5 * 7 * 11
    assert total(lambda a, b: jnp.einsum("bij,bkj->bik", a, b), array(3, 5, 7), array(3, 11, 7)) == 3 * 2 * 5 * 11 * 7
    convolve = functools.partial(
        jax.lax.conv_general_dilated,
        window_strides=(2, 2),
        padding="SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    assert total(convolve, array(2, 16, 12, 3), array(3, 5, 3, 8)) == 2 * (2 * 8 * 6 * 8) * (3 * 5 * 3)
    assert total(jnp.tanh, array(100)) == 0


def test_loops_branches_and_devices_count_what_runs():
    def steps(x, w):
        return jax.lax.scan(lambda x, _: (x @ w, None), x, None, length=6)[0]

    once = 2 * 4 * 8 * 8
    assert total(steps, array(4, 8), array(8, 8)) == 6 * once
    assert total(jax.jit(jax.checkpoint(steps)), array(4, 8), array(8, 8)) == 6 * once

    def either(x, w):
        return jax.lax.cond(x.sum() > 0, lambda: x @ w @ w, lambda: x @ w)

    assert total(either, array(4, 8), array(8, 8)) == 2 * once
    mesh = sharding.make_mesh({"data": 4}, jax.devices()[:4])
    split = jax.sharding.PartitionSpec(sharding.BATCH_AXES)
    mapped = jax.shard_map(
        lambda x, w: x @ w, mesh=mesh, in_specs=(split, jax.sharding.PartitionSpec()), out_specs=split
    )
    assert total(mapped, array(4, 8), array(8, 8)) == once


def test_a_transformer_is_its_closed_form():
    """Per block 24 d^2 n of dense layers and 4 n^2 d of attention, for n tokens of width d."""
    depth, width, length = 3, 64, 10
    stack = Transformer(depth, 4)
    params = jax.eval_shape(stack.init, jax.random.key(0), array(1, length, width))
    counted = total(lambda p, x: stack.apply(p, x, mask=causal_mask(length))[0], params, array(2, length, width))
    assert counted == 2 * depth * (24 * width**2 * length + 4 * length**2 * width)


@pytest.mark.parametrize(
    ("fields", "side", "images_per_second", "percent"),
    [
        ({"channels": 192}, 64, 74.1, 41),
        ({"channels": 256, "depth": 2, "channel_mult": (1, 1, 2, 3, 4)}, 128, 24.8, 38),
    ],
    ids=["adm_64", "adm_128"],
)
def test_adm_takes_the_operations_that_its_paper_says(fields, side, images_per_second, percent):
    """Dhariwal & Nichol (2021), table 7: a V100's speed in training, and its share of 120 TFLOP/s, classes left out."""
    network = UNet(**fields, image_size=side)
    images, t = array(1, side, side, 3), jax.ShapeDtypeStruct((1,), jnp.int32)
    params = jax.eval_shape(network.init, jax.random.key(0), images, t)
    used = images_per_second * 3 * total(network.apply, params, images, t)
    assert round(100 * used / 120e12) == percent


# Counted independently of this project's code: parameters to half a percent, operations to one.
PAPER = {
    "clip.py:paper": (986.3e6, 381.8e9, {"vision": 632.3e6, "text": 354.0e6}),
    "prior_ar.py:paper": (2.12e9, 1268e9, {"text_encoder": 1.31e9}),
    "prior_diffusion.py:paper": (1.33e9, 641.5e9, {}),
    "decoder.py:paper": (3.565e9, 2220e9, {"network": 2.242e9, "text_encoder": 1.313e9}),
    "upsampler.py:paper_1": (0.730e9, 531.3e9, {}),
    "upsampler.py:paper_2": (0.282e9, 1240e9, {}),
}


@functools.cache
def described(config: str):
    return describe(configs.load(f"configs/{config}"))


@pytest.mark.parametrize("config", PAPER)
def test_the_papers_stages_have_its_parameters_and_operations(config):
    parameters, forward, modules = PAPER[config]
    found = described(config)
    assert found.parameters == pytest.approx(parameters, rel=0.005)
    assert found.forward_flops_per_example == pytest.approx(forward, rel=0.01)
    for name, size in modules.items():
        assert found.modules[name].parameters == pytest.approx(size, rel=0.005)
    assert sum(module.parameters for module in found.modules.values()) == found.parameters
    # SAM goes through the network twice.
    assert found.train_flops_per_example == found.forward_flops_per_example * (6 if config.startswith("clip") else 3)


SMALL = (
    "clip.py:small",
    "prior_ar.py:small",
    "prior_diffusion.py:small",
    "decoder.py:small",
    "upsampler.py:small_1",
    "upsampler.py:small_2",
)


@pytest.mark.parametrize("config", SMALL)
def test_the_small_stages_leave_most_of_an_accelerator_to_activations(config):
    """Weights, their moving average, Adam's moments and a gradient in float32, and the frozen CLIP, of 16 GB."""
    found = described(config)
    assert 20 * found.parameters + 4 * found.frozen_parameters < 16e9 / 2


def test_sampling_takes_the_operations_that_were_counted_for_it():
    """One image of the paper's chain: 250 guided decoder steps, 27 and 15 of the upsamplers at full size."""
    for config, name, expected in (
        ("decoder.py:paper", "sample", 796e12),
        ("upsampler.py:paper_1", "sample", 229e12),
        ("upsampler.py:paper_2", "sample", 298e12),
    ):
        assert described(config).sampling_flops_per_example[name] == pytest.approx(expected, rel=0.01)


def test_reading_the_caption_once_saves_most_of_the_priors_sampling():
    """64 guided steps of two samples: 164 TFLOP if each reads the caption again, 3.2 from its keys and values."""
    guided = configs.load("configs/prior_diffusion.py:paper", {"sampling.guidance_scale": 2.0})
    found = describe(guided)
    naive = 64 * 2 * 2 * found.forward_flops_per_example
    assert naive == pytest.approx(164e12, rel=0.01)
    assert found.sampling_flops_per_example["sample_z_i"] == pytest.approx(3.2e12, rel=0.02)


def test_the_command_describes_three_billion_parameters_in_little_memory():
    command = [sys.executable, "-m", "unclip_jax.plan", "--config=configs/decoder.py:paper", "--describe", "--json"]
    with tempfile.TemporaryFile("w+") as printed:
        process = subprocess.Popen(command, cwd=ROOT, stdout=printed, stderr=subprocess.DEVNULL)
        peak = 0
        # Of this process alone: what the system says afterwards counts the memory of the one that started it.
        while process.poll() is None:
            match = re.search(r"VmHWM:\s+(\d+) kB", pathlib.Path(f"/proc/{process.pid}/status").read_text())
            peak = max(peak, 1024 * int(match[1]) if match else 0)
            time.sleep(0.02)
        printed.seek(0)
        found = json.loads(printed.read())
    assert found["parameters"] == described("decoder.py:paper").parameters
    assert found["modules"]["network"]["forward_flops_per_example"] == pytest.approx(1589e9, rel=0.01)
    assert 0 < peak < 0.2 * 4 * found["parameters"], "the weights must not have been made"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model.text.heads": 30}, "width 2048 does not split into 30 heads"),
        ({"model.unet.channels": 500}, "500.*head_channels 64 does not divide"),
        (
            {"model.unet.attention_resolutions": (32, 12)},
            r"attention resolution 12 is never reached.*\[64, 32, 16, 8\]",
        ),
        ({"sampling.timesteps": "1001"}, "1001 sampling steps asked of a process of 1000.*from 1 to 1000"),
    ],
)
def test_a_config_that_is_no_network_is_refused_with_what_would_be_right(changes, said):
    with pytest.raises(InputError, match=said):
        describe(configs.load("configs/decoder.py:paper", changes))
