"""Exports as diffusers' pipelines: import, export, and the pipeline draws what it drew before, to the last bit."""

import json

import diffusers
import export_test
import numpy as np
import pytest
import safetensors
import safetensors.torch
import small_configs
import tiny_karlo
import torch
import transformers
import untrained_models
from diffusers.pipelines.deprecated import unclip as moved
from PIL import Image

from unclip_jax import config as configs
from unclip_jax import convert
from unclip_jax.artifacts import components, diffusers_folders
from unclip_jax.errors import InputError
from unclip_jax.importing.formats import Request

PROMPT = "a small red star!"
STEPS = {"decoder_num_inference_steps": 2, "super_res_num_inference_steps": 3}


@pytest.fixture(scope="module")
def karlo():
    return tiny_karlo.components()


@pytest.fixture(scope="module")
def models(karlo, tmp_path_factory):
    """Karlo, saved by diffusers and imported here."""
    folder = tmp_path_factory.mktemp("karlo")
    tiny_karlo.text_to_image(karlo).save_pretrained(folder)
    tiny_karlo.variation(karlo).save_pretrained(folder)
    convert.convert(Request(format="karlo", path=str(folder)), str(folder / "models"))
    return folder / "models"


@pytest.fixture(scope="module")
def exported(models, tmp_path_factory):
    out = tmp_path_factory.mktemp("exports") / "karlo"
    export_test.write(models, out, format="diffusers")
    return out


def loaded(kind, folder, **options):
    pipeline = kind.from_pretrained(folder, local_files_only=True, **options)
    pipeline.set_progress_bar_config(disable=True)
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            # Loaded arrays lie where the file has them, and PyTorch's sums are rounded by where an array begins: the
            # originals, saved and loaded, differ by as much (6e-7) from themselves.
            for weight in part.parameters():
                weight.data = weight.data.clone()
    return pipeline


def drawn(pipeline, *arguments):
    of_text = {"prior_num_inference_steps": 3} if isinstance(pipeline, moved.UnCLIPPipeline) else {}
    return pipeline(*arguments, generator=torch.Generator().manual_seed(7), output_type="np", **STEPS, **of_text).images


def test_text_to_image_is_as_it_was(karlo, exported):
    before = drawn(tiny_karlo.text_to_image(karlo), PROMPT)
    assert before.std() > 0.1
    np.testing.assert_array_equal(drawn(loaded(moved.UnCLIPPipeline, exported), PROMPT), before)


def test_variations_are_as_they_were(karlo, exported):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 24, 3), np.uint8))
    before = drawn(tiny_karlo.variation(karlo), picture)
    assert before.std() > 0.1
    np.testing.assert_array_equal(drawn(loaded(moved.UnCLIPImageVariationPipeline, exported), picture), before)


def test_the_prior_alone_is_kandinskys(karlo, models, tmp_path):
    export_test.write(
        models, tmp_path / "prior", format="diffusers", pipeline="kandinsky_prior", parts=["clip", "prior_diffusion"]
    )
    names = ("prior", "image_encoder", "text_encoder", "tokenizer")
    before = diffusers.KandinskyV22PriorPipeline(
        **{name: karlo[name] for name in names}, scheduler=karlo["prior_scheduler"],
        image_processor=karlo["feature_extractor"],
    )  # fmt: skip
    before.set_progress_bar_config(disable=True)
    after = loaded(diffusers.KandinskyV22PriorPipeline, tmp_path / "prior")
    options = {"num_inference_steps": 3, "guidance_scale": 3.0, "negative_prompt": "a ring"}
    one, two = (p(PROMPT, generator=torch.Generator().manual_seed(1), **options) for p in (before, after))
    torch.testing.assert_close(two.image_embeds, one.image_embeds, rtol=0, atol=0)
    torch.testing.assert_close(two.negative_image_embeds, one.negative_image_embeds, rtol=0, atol=0)


def test_half_precision_is_a_variant(karlo, models, tmp_path):
    export_test.write(models, tmp_path / "half", format="diffusers", dtype="float16")
    pipeline = loaded(moved.UnCLIPPipeline, tmp_path / "half", variant="fp16", dtype=torch.float16)
    for name in ("prior", "decoder", "text_proj", "super_res_last", "text_encoder"):
        wanted = {key: x.half() for key, x in karlo[name].state_dict().items()}
        found = getattr(pipeline, name).state_dict()
        assert set(found) == set(wanted)
        assert all(torch.equal(found[key], wanted[key]) for key in wanted)


@pytest.mark.parametrize("target", ["hub", "legacy"])
def test_other_targets_are_found_where_they_are_looked_for(karlo, models, tmp_path, monkeypatch, target):
    parts = ["clip", "decoder", "upsampler_1", "upsampler_1_last"]
    export_test.write(models, tmp_path / "out", format="diffusers", target=target, parts=parts)
    index = json.loads((tmp_path / "out" / "model_index.json").read_text())
    assert index["text_proj"] == ["unclip", "UnCLIPTextProjModel"] and "prior" not in index
    options = {"trust_remote_code": True}
    if target == "legacy":  # as in versions before the module moved
        monkeypatch.setattr(diffusers.pipelines, "unclip", moved, raising=False)
        options = {}
    pipeline = loaded(moved.UnCLIPImageVariationPipeline, tmp_path / "out", **options)
    wanted = karlo["text_proj"].state_dict()
    assert all(torch.equal(x, wanted[name]) for name, x in pipeline.text_proj.state_dict().items())


def test_files_are_as_the_libraries_want_them(karlo, exported):
    manifest = json.loads((exported / "manifest.json").read_text())
    written = {path.relative_to(exported).as_posix() for path in exported.rglob("*") if path.is_file()}
    assert written == {*manifest["files"], "manifest.json", "README.md"}
    for name in ("prior", "decoder", "text_proj", "super_res_first", "super_res_last", "text_encoder", "image_encoder"):
        library = "model" if name.endswith("encoder") else "diffusion_pytorch_model"
        with safetensors.safe_open(exported / name / f"{library}.safetensors", framework="np") as file:
            assert file.metadata() == {"format": "pt"}
            assert set(file.keys()) == set(karlo[name].state_dict())
    card = (exported / "README.md").read_text()
    assert "prior_num_inference_steps=25, prior_guidance_scale=4" in card and "library_name: diffusers" in card


def test_captions_get_the_ids_that_we_give_them(exported):
    theirs = transformers.CLIPTokenizer.from_pretrained(exported / "tokenizer")
    ours = export_test.Tokenizer("tiny")
    texts = ["wow! a dog!! !", "A small, red STAR", "", "left of " * 20]
    options = {"padding": "max_length", "max_length": tiny_karlo.LENGTH, "truncation": True}
    found = np.asarray(theirs(texts, **options).input_ids)
    seen = np.asarray(theirs(texts, **options).attention_mask).astype(bool)
    np.testing.assert_array_equal(found[seen], ours.encode(texts, tiny_karlo.LENGTH)[seen])
    assert seen.sum(1).tolist() == [int((row == 2047).argmax()) + 1 for row in ours.encode(texts, tiny_karlo.LENGTH)]


def test_the_presets_networks_are_the_pipelines(tmp_path):
    """Every part of the laptop's exportable stack; without training, for only names and shapes are asked for."""
    variants = {"clip": "clip", "prior_diffusion": "prior_diffusion", "decoder": "decoder", "upsampler_1": "upsampler"}
    for name, stage in variants.items():
        config = configs.load(f"configs/{stage}.py:diffusers", {})
        untrained_models.save(tmp_path / "models" / name, config)
    export_test.write(tmp_path / "models", tmp_path / "out", format="diffusers")
    pipeline = loaded(moved.UnCLIPPipeline, tmp_path / "out")
    for name, part in pipeline.components.items():
        if isinstance(part, torch.nn.Module):
            (file,) = (tmp_path / "out" / name).glob("*.safetensors")
            content = safetensors.torch.load_file(file)
            state = part.state_dict()
            assert set(content) == set(state), name
            assert all(torch.equal(content[key], state[key]) for key in state)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "super_res_num_inference_steps=12" in card


def test_what_the_pipelines_cannot_be_is_refused_with_all_reasons():
    found = {}
    for name in ("clip", "prior_diffusion", "decoder", "upsampler_1", "upsampler_2"):
        config = small_configs.small(untrained_models.CASES[name])
        found[name] = components.Component(name, "runs/mine", config, {}, step=0, data={}, fingerprint="")
    with pytest.raises(InputError) as refused:
        diffusers_folders.check(found, pipeline="unclip")
    for reason in (
        "no place for upsampler_2", "clip: transformers' CLIP has no vision_stem", "prior_diffusion: it reads captions",
        "prior_diffusion: it knows embeddings of length 1", "decoder: UnCLIPScheduler knows predictions of eps",
        "upsampler_1: the pipeline enlarges small images bicubically", "not of 'v'",
    ):  # fmt: skip
        assert reason in str(refused.value)
    with pytest.raises(InputError, match="no place for decoder.*it knows embeddings of length 1"):
        diffusers_folders.check(found, pipeline="kandinsky_prior")
