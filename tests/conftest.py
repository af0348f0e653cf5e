"""Sets JAX up for tests, has the shapes in signatures enforced, and prepares the data that several tests read.

It runs before any test imports the package: the annotations can be enforced only on what is imported after the hook,
and JAX reads its settings once, when it first looks for devices.
"""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys

import jax
import jaxtyping
import launch_fakes
import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
VIRTUAL_DEVICES = 8

# Programs that tests start inherit the environment; they have one device each, as on a laptop.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "2"
# Tests compile more than they compute: unoptimised programs, by the older of two generators of loops, take half of the
# time in all, and are no less right.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false")
jax.config.update("jax_platforms", "cpu")
# Eight devices in this process, by JAX's own setting: XLA_FLAGS would be inherited.
jax.config.update("jax_num_cpu_devices", VIRTUAL_DEVICES)

# A shell that starts the tests in the background has SIGINT ignored, which the programs they start would inherit.
signal.signal(signal.SIGINT, signal.default_int_handler)

jaxtyping.install_import_hook("unclip_jax", "enforced_types.check")

_PREPARE = """
import sys
from unclip_jax.data import datasets
print(datasets.prepare("captioned_shapes", data_dir=sys.argv[1], variant=sys.argv[2]))
"""


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory, worker_id) -> pathlib.Path:
    """A folder of this test run that all of pytest's workers see."""
    base = tmp_path_factory.getbasetemp()
    return base if worker_id == "master" else base.parent


@pytest.fixture(scope="session")
def data_dir(shared_folder) -> str:
    """Where `captioned_shapes`, variant "smoke", lies prepared: config.data.data_dir of tests that train.

    Written once per test run, by a process of its own, for writing imports TensorFlow.
    """
    from filelock import FileLock

    folder = shared_folder / "data"
    with FileLock(shared_folder / "data.lock"):
        if not (folder / "done").exists():
            subprocess.run(
                [sys.executable, "-c", _PREPARE, str(folder), "smoke"], check=True, cwd=ROOT, capture_output=True
            )
            (folder / "done").touch()
    return str(folder)


@pytest.fixture(scope="session")
def untrained_chain(shared_folder) -> pathlib.Path:
    """Folder with the workdirs of a chain that nobody trained, from CLIP to the first upsampler; read only."""
    import untrained_models
    from filelock import FileLock

    folder = shared_folder / "untrained"
    with FileLock(shared_folder / "untrained.lock"):
        if not (folder / "done").exists():
            for name in ("clip", "prior_diffusion", "decoder", "upsampler_1"):
                untrained_models.write(folder, name)
            rows = [{"step": 0, "evaluation/loss": 0.25}, {"step": 7, "evaluation/loss": 0.125}]
            (folder / "decoder" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
            (folder / "done").touch()
    return folder


def _export(shared_folder: pathlib.Path, name: str, workdir: pathlib.Path, *options: str) -> pathlib.Path:
    """Exports samplers once per test run, by the program: traced here, any number of examples would be no int."""
    from filelock import FileLock

    out = shared_folder / name
    with FileLock(shared_folder / f"{name}.lock"):
        if not out.exists():  # it appears whole
            command = [sys.executable, "-m", "unclip_jax.export", f"--workdir={workdir}", f"--out={out}"]
            command += ["--format=stablehlo", "--sampling=decoder.timesteps=2", *options]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
            assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="session")
def stablehlo_export(shared_folder, untrained_chain) -> pathlib.Path:
    """An export of that chain's samplers; read only."""
    return _export(shared_folder, "stablehlo", untrained_chain, "--sampling=prior_diffusion.candidates=1")


@pytest.fixture(scope="session")
def small_export(shared_folder, untrained_chain) -> pathlib.Path:
    """An export that draws quickly: text embeddings go to a decoder, and nothing comes after it; read only."""
    return _export(shared_folder, "small", untrained_chain, "--parts=clip,decoder", "--prior=none")


@pytest.fixture(scope="session")
def compile_cache(shared_folder) -> str:
    """Folder of compiled programs, for programs that tests start: --compile_cache.

    This process uses none: JAX does not write its entries whole, so another worker could read a part of one.
    """
    return str(shared_folder / "compiled")


@pytest.fixture(scope="module")
def chromium():
    """The system's Chromium, without a window."""
    from playwright import sync_api

    path = shutil.which("chromium") or shutil.which("google-chrome")
    assert path, "install the package chromium; launch/test.sh does"
    # In milliseconds: on a machine that does much else at once a browser is slow.
    sync_api.expect.set_options(timeout=60_000)
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path)
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def launch_checkout(tmp_path_factory) -> pathlib.Path:
    """A checkout that launchers may be run in."""
    return launch_fakes.make_checkout(tmp_path_factory.mktemp("checkout"))


@pytest.fixture
def machine(tmp_path, launch_checkout) -> launch_fakes.Machine:
    """Where launchers run, with stand-ins for gcloud and the like."""
    return launch_fakes.Machine(tmp_path, launch_checkout)
