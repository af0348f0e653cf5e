"""The files that Kakao Brain published: read by their names, they compute what the names say."""

import flax.linen as nn
import guided_oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from guided_oracle import State

from unclip_jax.errors import InputError
from unclip_jax.importing import formats, karlo
from unclip_jax.importing.workdirs import Imported
from unclip_jax.interop import karlo_tables, names
from unclip_jax.models.captions import EncodedCaption
from unclip_jax.models.clip import CLIP
from unclip_jax.models.decoder import Decoder
from unclip_jax.models.prior import DiffusionPrior
from unclip_jax.models.unet import UNet

DIM, LENGTH = 10, 6
# Heads are 64 wide and norms have 32 groups in these files, so they cannot be smaller.
PRIOR = DiffusionPrior(embed_dim=DIM, context_length=LENGTH, vocab_size=3, width=128, depth=2, heads=2, caption="clip")
DECODER = Decoder(
    unet=dict(channels=64, channel_mult=(1, 2), depth=1, attention_resolutions=(32,), image_size=64),
    text=None, embed_dim=DIM, clip_tokens=3, null_clip="learned", caption="clip", context_width=7,
)  # fmt: skip
UPSAMPLER = UNet(
    in_channels=6, out_channels=3, channels=32, channel_mult=(1, 2), depth=2, attention_resolutions=(), image_size=256,
    scale_shift="add",
)  # fmt: skip


def shapes(network, *inputs, **options):
    tree = jax.eval_shape(lambda *given: network.init(jax.random.key(0), *given, **options), *inputs)
    return nn.meta.unbox(tree)["params"]


def zeros(*shape):
    return jnp.zeros(shape)


T = jnp.zeros((1,), jnp.int32)
CAPTION = EncodedCaption(zeros(1, LENGTH, DIM), jnp.ones((1, LENGTH), bool))
TREES = {
    "prior": shapes(PRIOR, zeros(1, DIM), T, CAPTION, zeros(1, DIM)),
    "decoder": shapes(DECODER, zeros(1, 64, 64, 3), T, CAPTION, zeros(1, DIM), z_t=zeros(1, DIM)),
    "upsampler": shapes(UPSAMPLER, zeros(1, 8, 8, 6), T),
}
TABLES = {
    "prior": karlo_tables.original_prior(PRIOR),
    "decoder": karlo_tables.original_decoder(DECODER),
    "upsampler": karlo_tables.original_upsampler(UPSAMPLER, last=False)
    + karlo_tables.original_upsampler(UPSAMPLER, last=True).under(ours="last/"),
}


def drawn(tree, table, seed):
    """A file's tensors, drawn at random; every one of another name, shape by shape as our tables say."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, tensor in names.exported(table, tree).items():
        numbers = torch.randn(tensor.shape, generator=generator)
        width = int(np.prod(tensor.shape[1:])) if len(tensor.shape) > 1 and "embedding" not in name else 25
        scale = 1.0 if ("norm" in name or ".0.weight" in name and len(tensor.shape) == 1) else 0.0
        found[name] = numbers / np.sqrt(width) + scale
    return found


@pytest.fixture(scope="module")
def files():
    trees = {**TREES, "upsampler": {**TREES["upsampler"], "last": TREES["upsampler"]}}
    return {what: drawn(trees[what], TABLES[what], number) for number, what in enumerate(trees)}


@pytest.fixture(scope="module")
def folder(files, tmp_path_factory):
    """The published files' names and layout, pickled by torch as they are."""
    folder = tmp_path_factory.mktemp("original")
    endings = {"prior": "step=01000000-of-01000000", "decoder": "step=01000000-of-01000000"}
    for what, state in files.items():
        name = "improved-sr-ckpt-step=1.2M" if what == "upsampler" else f"{what}-ckpt-{endings[what]}"
        torch.save({"state_dict": state}, folder / f"{name}.ckpt")
    torch.save((torch.arange(DIM) / 10.0, torch.ones(DIM) / 2), folder / "ViT-L-14_stats.th")
    return folder


@pytest.fixture(scope="module")
def imported(folder):
    """What is read of the folder, with a CLIP of another's making."""
    fields = {
        "image_size": 8, "patch_size": 4, "vision_width": 8, "vision_depth": 1, "vision_heads": 1, "text_width": DIM,
        "text_depth": 1, "text_heads": 1, "context_length": LENGTH, "vocab_size": 2048, "embed_dim": DIM,
    }  # fmt: skip

    def clip(request):
        config = request.base("clip", "small")
        config.model = {**fields, "remat": "none", "logit_scale_max": 100.0}
        yield "clip", Imported(config, CLIP(**fields), {}, {})

    (folder / "ViT-L-14.pt").touch()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(karlo.clips, "openai", clip)
        return dict(karlo.original(formats.Request(format="karlo_original", path=str(folder))))


def test_the_files_are_read_and_compute_what_their_names_say(imported, files):
    rng = np.random.default_rng(0)

    def random(*shape):
        return rng.standard_normal(shape).astype(np.float32)

    z, z_t, states, t = random(2, DIM), random(2, DIM), random(2, LENGTH, DIM), np.array([3, 700])
    seen = np.arange(LENGTH) < np.array([[2], [5]])
    caption = EncodedCaption(jnp.asarray(states), jnp.asarray(seen))
    given = [torch.tensor(x) for x in (t, z_t, states, seen)]
    with torch.no_grad():
        state = State(files["prior"], "model.")
        theirs = guided_oracle.karlo_prior(state, torch.tensor(z), *given)
        assert_same(applied(PRIOR, imported["prior_diffusion"], z, t, caption, z_t), theirs)
        x, state = random(2, 64, 64, 3), State(files["decoder"], "model.")
        small = x[:, :16, :16]
        t_, z_t_, states_, seen_ = given
        theirs = guided_oracle.karlo_decoder(state, nchw(small), t_, torch.tensor(z), z_t_, states_, seen_, depth=1)
        ours = applied(DECODER, imported["decoder"], small, t, caption, z, z_t=z_t)
        assert_same(ours, theirs.permute(0, 2, 3, 1))
        x = random(2, 8, 16, 6)
        for name, prefix in (("upsampler_1", "model_first_steps."), ("upsampler_1_last", "model_last_step.")):
            state = State(files["upsampler"], prefix)
            emb = guided_oracle.time_embedding(state, t_)
            theirs = guided_oracle.unet(state, nchw(x), emb, depth=2)
            assert_same(applied(UPSAMPLER, imported[name], x, t), theirs.permute(0, 2, 3, 1))


def applied(network, imported, *inputs, **more):
    params, inputs, more = jax.tree.map(jnp.asarray, (imported.params, inputs, more))
    call = jax.jit(lambda params: network.apply(params, *inputs, **more))
    quick = {"xla_backend_optimization_level": "0"}
    return call.lower(params).compile(compiler_options=quick)(params)


def nchw(images):
    return torch.tensor(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))


def assert_same(ours, theirs):
    theirs = theirs.numpy()
    assert 0.05 < theirs.std() < 20
    np.testing.assert_allclose(ours, theirs, atol=3e-5 * max(1, np.abs(theirs).max()))


def test_it_is_sampled_as_its_own_code_samples_it(imported):
    configs = {name: part.config for name, part in imported.items()}
    assert list(configs) == ["clip", "prior_diffusion", "decoder", "upsampler_1_last", "upsampler_1"]
    prior, decoder, upsampler = (configs[name] for name in ("prior_diffusion", "decoder", "upsampler_1"))
    assert (prior.diffusion.clip_x_start, prior.sampling.timesteps, prior.sampling.guidance_scale) == (10, "25", 4)
    assert (decoder.sampling.timesteps, decoder.sampling.guidance_scale) == ("50", 8)
    assert (upsampler.sampling.timesteps, upsampler.sampling.last_steps, upsampler.enlarge) == ("7", 1, "bicubic")
    assert {config.diffusion.tables for name, config in configs.items() if name != "clip"} == {"float64"}
    statistics = imported["prior_diffusion"].statistics
    np.testing.assert_allclose(statistics["clip_mean"], np.arange(DIM) / 10)
    np.testing.assert_allclose(statistics["clip_std"], 0.5)


def test_another_tensor_in_a_file_is_an_error(folder, files, tmp_path):
    for path in folder.iterdir():
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "improved-sr-ckpt-step=1.2M.ckpt").unlink()
    state = {**files["upsampler"], "model_third.weight": torch.zeros(2)}
    torch.save({"state_dict": state}, tmp_path / "improved-sr-ckpt-step=1.2M.ckpt")
    request = formats.Request(format="karlo_original", path=str(tmp_path))
    with pytest.raises(InputError, match=r"1 left over: model_third.weight"):
        list(karlo._upsamplers(request, tmp_path))


def test_a_folder_without_a_file_is_an_error(tmp_path):
    with pytest.raises(InputError, match="one file ViT-L-14.pt, and holds none"):
        list(karlo.original(formats.Request(format="karlo_original", path=str(tmp_path))))
