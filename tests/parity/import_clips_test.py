"""CLIPs of OpenAI, transformers and OpenCLIP, imported and read back as a workdir, against their own arithmetic."""

import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors.numpy
import torch
import transformers
from parity import clip_oracle, torch_modules

from unclip_jax import checkpoint, convert, digests, parts, program, sharding, state
from unclip_jax import config as configs
from unclip_jax.data import tokenizer as tokenizers
from unclip_jax.errors import InputError
from unclip_jax.importing import clips, formats, workdirs
from unclip_jax.interop import clip_names, names
from unclip_jax.models.clip_towers import MEAN, STD

VOCABULARY = pathlib.Path(tokenizers.__file__).parent / "vocabulary"
CAPTIONS = ["a small red star", "two circles!", ""]
# float32 against float64: a few parts in a million of numbers of size 1 to 5.
CLOSE = dict(rtol=2e-5, atol=2e-5)


def vocabulary(folder: pathlib.Path) -> pathlib.Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("vocab.json", "merges.txt"):
        shutil.copyfile(VOCABULARY / name, folder / name)
    return folder


SIZE = tokenizers.Tokenizer("tiny").vocab_size


def read(workdir):
    mesh = sharding.make_mesh(configs.from_json((pathlib.Path(workdir) / "config.json").read_text()).mesh)
    return parts.read("clip", str(workdir), mesh, weights="ema", sampling={})


def ours(part, images, tokens):
    """Logits of images and texts, as CLIP is asked."""
    z_i, z_t, scale = jax.jit(part.stage.network.apply)(part.params, jnp.asarray(images), jnp.asarray(tokens))
    unit = [z / np.linalg.norm(z, axis=-1, keepdims=True) for z in (np.asarray(z_i), np.asarray(z_t))]
    return np.exp(scale) * unit[0] @ unit[1].T


def pictures(size, count=3):
    return np.random.default_rng(2).uniform(-1, 1, (count, size, size, 3)).astype(np.float32)


def pixels(images, mean=MEAN, std=STD):
    """As their preprocessing hands them over: [b, 3, h, w], normalised, in float64."""
    return torch.tensor((((images.astype(np.float64) + 1) / 2 - np.array(mean)) / np.array(std)).transpose(0, 3, 1, 2))


TRANSFORMERS = {
    "quick_gelu, read at the largest id": dict(
        act="quick_gelu", eos=2, width=24, heads=2, hidden=100, statistics=False
    ),
    "gelu, read at an end token": dict(act="gelu", eos=SIZE - 1, width=20, heads=4, hidden=52, statistics=True),
}


@pytest.mark.parametrize("case", TRANSFORMERS)
def test_transformers(tmp_path, case):
    told = TRANSFORMERS[case]
    shared = dict(hidden_act=told["act"], intermediate_size=told["hidden"], num_hidden_layers=2)
    size = dict(hidden_size=told["width"], num_attention_heads=told["heads"], projection_dim=12, **shared)
    config = transformers.CLIPConfig(
        text_config=dict(**size, vocab_size=SIZE, max_position_embeddings=11, eos_token_id=told["eos"]),
        vision_config=dict(**size | {"hidden_size": 28}, image_size=12, patch_size=4),
        projection_dim=12,
    )
    model = torch_modules.redraw(transformers.CLIPModel(config)).double()
    folder = vocabulary(tmp_path / "theirs")
    model.float().save_pretrained(folder)
    statistics = ((0.4, 0.5, 0.6), (0.2, 0.3, 0.4)) if told["statistics"] else (MEAN, STD)
    if told["statistics"]:
        preprocessor = dict(image_mean=statistics[0], image_std=statistics[1])
        (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    convert.convert(formats.Request("hf_clip", str(folder)), str(tmp_path / "clip"))
    part = read(tmp_path / "clip")
    assert part.config.model.activation == told["act"]
    tokens = tokenizers.Tokenizer(part.config.data.vocabulary).encode(CAPTIONS, 11)
    images = pictures(12)
    with torch.no_grad():
        theirs = model.double()(input_ids=torch.tensor(tokens).long(), pixel_values=pixels(images, *statistics))
    np.testing.assert_allclose(ours(part, images, tokens), theirs.logits_per_image.numpy(), **CLOSE)


def openai_state(fields, rng):
    """Random weights by OpenAI's names, of the shapes that OpenAI's modules have (written out from their code)."""
    width, embed = fields["text_width"], fields["embed_dim"]
    arrays = {
        "token_embedding.weight": (fields["vocab_size"], width),
        "positional_embedding": (fields["context_length"], width),
        "ln_final.weight": (width,),
        "ln_final.bias": (width,),
        "text_projection": (width, embed),
        "logit_scale": (),
        **openai_blocks("", width, fields["text_depth"]),
    }
    if "vision_layers" in fields:
        arrays |= openai_resnet(fields)
    else:
        width, patch = fields["vision_width"], fields["patch_size"]
        arrays |= {
            "visual.conv1.weight": (width, 3, patch, patch),
            "visual.class_embedding": (width,),
            "visual.positional_embedding": (1 + (fields["image_size"] // patch) ** 2, width),
            "visual.proj": (width, embed),
            **{f"visual.{norm}.{kind}": (width,) for norm in ("ln_pre", "ln_post") for kind in ("weight", "bias")},
            **openai_blocks("visual.", width, fields["vision_depth"]),
        }
    return drawn(arrays, rng)


def drawn(shapes, rng):
    arrays = {}
    for name, shape in shapes.items():
        array = rng.standard_normal(shape) * (0.3 if len(shape) < 2 else np.prod(shape[1:]) ** -0.5)
        is_scale = len(shape) == 1 and name.endswith(".weight")
        array = np.abs(array) + 0.5 if name.endswith("running_var") else array + is_scale
        arrays[name] = np.asarray(array, np.float32)
    return arrays


def openai_blocks(prefix, width, depth):
    shapes = {
        "attn.in_proj_weight": (3 * width, width),
        "attn.in_proj_bias": (3 * width,),
        "attn.out_proj.weight": (width, width),
        "attn.out_proj.bias": (width,),
        "mlp.c_fc.weight": (4 * width, width),
        "mlp.c_fc.bias": (4 * width,),
        "mlp.c_proj.weight": (width, 4 * width),
        "mlp.c_proj.bias": (width,),
        **{f"ln_{n}.{kind}": (width,) for n in "12" for kind in ("weight", "bias")},
    }
    return {f"{prefix}transformer.resblocks.{n}.{name}": shape for n in range(depth) for name, shape in shapes.items()}


def openai_resnet(fields):
    width, shapes = fields["vision_width"], {}

    def layer(conv, norm, out, into, side):
        shapes[f"visual.{conv}.weight"] = (out, into, side, side)
        for kind in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"visual.{norm}.{kind}"] = (out,)

    for n, (out, into) in enumerate([(width // 2, 3), (width // 2, width // 2), (width, width // 2)], 1):
        layer(f"conv{n}", f"bn{n}", out, into, 3)
    into = width
    for stage, count in enumerate(fields["vision_layers"]):
        channels = width * 2**stage
        for block in range(count):
            at = f"layer{stage + 1}.{block}"
            layer(f"{at}.conv1", f"{at}.bn1", channels, into, 1)
            layer(f"{at}.conv2", f"{at}.bn2", channels, channels, 3)
            layer(f"{at}.conv3", f"{at}.bn3", 4 * channels, channels, 1)
            if not block:
                layer(f"{at}.downsample.0", f"{at}.downsample.1", 4 * channels, into, 1)
            into = 4 * channels
    shapes["visual.attnpool.positional_embedding"] = (1 + (fields["image_size"] // 32) ** 2, into)
    for name in "qkvc":
        out = fields["embed_dim"] if name == "c" else into
        shapes |= {f"visual.attnpool.{name}_proj.weight": (out, into), f"visual.attnpool.{name}_proj.bias": (out,)}
    return shapes


TEXT = dict(context_length=11, vocab_size=SIZE, text_width=64, text_depth=2, text_heads=1, embed_dim=20)
VIT = dict(TEXT, image_size=12, patch_size=4, vision_width=128, vision_depth=2, vision_heads=2)
RESNET = dict(TEXT, image_size=64, vision_layers=(2, 1, 3, 1), vision_width=4, vision_heads=2)


def oracle_logits(state, images, tokens, *, vision, text, mean=MEAN, std=STD):
    weights = clip_oracle.double(state)
    own = {name.removeprefix("visual."): w for name, w in weights.items() if name.startswith("visual.")}
    prefix = "text." if "text.ln_final.weight" in weights else ""
    words = {name.removeprefix(prefix): w for name, w in weights.items() if name.startswith(prefix)}
    z_i, z_t = vision(own, pixels(images, mean, std))[0], text(words, torch.tensor(tokens).long())[0]
    unit = [z / z.norm(dim=-1, keepdim=True) for z in (z_i, z_t)]
    return (weights["logit_scale"].exp() * unit[0] @ unit[1].T).detach().numpy()


def vit(activation, **more):
    told = dict(heads=2, activation=activation, epsilon=1e-5, pool="class", pool_heads=1) | more
    return lambda w, x: clip_oracle.vision_transformer(w, x, **told)


def text(activation, **more):
    told = dict(heads=1, activation=activation, epsilon=1e-5, causal=True, pool="end", end_id=SIZE - 1) | more
    return lambda w, tokens: clip_oracle.text_transformer(w, tokens, **told)


@pytest.mark.parametrize("kind", ["vision transformer, TorchScript's names for sizes", "ResNet"])
def test_openai(tmp_path, kind):
    fields = RESNET if kind == "ResNet" else VIT
    arrays = openai_state(fields, np.random.default_rng(0))
    extra = {"input_resolution": 12, "context_length": 11, "vocab_size": SIZE}
    stored = {name: torch.tensor(array).half() for name, array in arrays.items()}
    counters = {f"{name.removesuffix('running_mean')}num_batches_tracked": torch.tensor(7) for name in arrays
                if name.endswith("running_mean")}  # fmt: skip
    torch.save({**stored, **counters, **{name: torch.tensor(n) for name, n in extra.items()}}, tmp_path / "theirs.pt")
    request = formats.Request("openai_clip", str(tmp_path / "theirs.pt"), vocabulary="tiny")
    convert.convert(request, str(tmp_path / "clip"))
    part = read(tmp_path / "clip")
    found = {name: part.config.model[name] for name in fields}
    assert found == fields and part.config.model.activation == "quick_gelu"
    tokens = tokenizers.Tokenizer("tiny").encode(CAPTIONS, 11)
    images = pictures(fields["image_size"])
    half = {name: tensor.float().numpy() for name, tensor in stored.items()}
    vision = (lambda w, x: clip_oracle.modified_resnet(w, x, heads=2)) if kind == "ResNet" else vit("quick_gelu")
    wanted = oracle_logits(half, images, tokens, vision=vision, text=text("quick_gelu"))
    np.testing.assert_allclose(ours(part, images, tokens), wanted, **CLOSE)
    back = names.exported(clip_names.openai(part.stage.network), part.params["params"])
    assert set(back) == set(half)
    assert all(np.array_equal(back[name].read(), half[name]) for name in back)


OPEN_CLIP = {
    # kind: (fields that our CLIP must get, config of theirs, prefix of the text tower, how the oracle reads it)
    "plain, gelu": (
        dict(VIT, activation="gelu"),
        dict(vision_cfg=dict(head_width=64), text_cfg={}),
        "",
        (vit("gelu"), text("gelu")),
    ),
    "text apart, layer scale, wide MLP, mean of patches, own statistics": (
        dict(
            VIT,
            vision_heads=4,
            text_heads=2,
            vision_mlp_ratio=4.5,
            vision_layer_scale=0.1,
            vision_pool="average",
            vision_input_norm=False,
            activation="quick_gelu",
            mean=(0.5, 0.5, 0.5),
            std=(0.25, 0.5, 0.5),
        ),
        dict(
            quick_gelu=True,
            custom_text=True,
            vision_cfg=dict(
                head_width=32,
                mlp_ratio=4.5,
                ls_init_value=0.1,
                no_ln_pre=True,
                pool_type="avg",
                final_ln_after_pool=True,
            ),
            text_cfg=dict(heads=2),
        ),
        "text.",
        (vit("quick_gelu", heads=4, pool="average"), text("quick_gelu", heads=2)),
    ),
    "CoCa": (
        dict(VIT, vision_pool="attention", vision_pool_heads=4, text_pool="class", activation="gelu"),
        dict(
            custom_text=True,
            multimodal_cfg=dict(width=8),
            vision_cfg=dict(attentional_pool=True, attn_pooler_heads=4, output_tokens=True),
            text_cfg=dict(embed_cls=True, output_tokens=True),
        ),
        "text.",
        (vit("gelu", pool="attention", pool_heads=4), text("gelu", pool="class")),
    ),
}


def open_clip_state(fields, prefix, rng):
    """As `openai_state`, with what OpenCLIP adds to the names (its transformer.py)."""
    arrays = openai_state({**fields, "image_size": 12}, rng)
    width, embed = fields["vision_width"], fields["embed_dim"]
    hidden = int(width * fields.get("vision_mlp_ratio", 4.0))
    more = {}
    for n in range(fields["vision_depth"]):
        at = f"visual.transformer.resblocks.{n}"
        more |= {f"{at}.mlp.c_fc.weight": (hidden, width), f"{at}.mlp.c_fc.bias": (hidden,)}
        more |= {f"{at}.mlp.c_proj.weight": (width, hidden)}
        if "vision_layer_scale" in fields:
            more |= {f"{at}.ls_1.gamma": (width,), f"{at}.ls_2.gamma": (width,)}
    if fields.get("vision_pool") == "attention":
        at = "visual.attn_pool"
        more |= {f"{at}.query": (256, embed), f"{at}.attn.in_proj_bias": (3 * embed,)}
        more |= {f"{at}.attn.q_proj_weight": (embed, embed), f"{at}.attn.k_proj_weight": (embed, width)}
        more |= {f"{at}.attn.v_proj_weight": (embed, width), f"{at}.attn.out_proj.weight": (embed, embed)}
        more |= {f"{at}.attn.out_proj.bias": (embed,), "visual.proj": (embed, embed), "text_decoder.x.weight": (3, 3)}
        more |= {f"{at}.ln_q.{kind}": (embed,) for kind in ("weight", "bias")}
        more |= {f"{at}.ln_k.{kind}": (width,) for kind in ("weight", "bias")}
        more |= {f"visual.ln_post.{kind}": (embed,) for kind in ("weight", "bias")}
    if fields.get("text_pool") == "class":
        more |= {"cls_emb": (fields["text_width"],), "positional_embedding": (12, fields["text_width"])}
    arrays |= drawn(more, rng)
    if not fields.get("vision_input_norm", True):
        arrays = {name: array for name, array in arrays.items() if "ln_pre" not in name}
    apart = ("visual.", "logit_scale", "text_decoder.")
    return {name if name.startswith(apart) else prefix + name: array for name, array in arrays.items()}


@pytest.mark.parametrize("kind", OPEN_CLIP)
def test_open_clip(tmp_path, kind):
    fields, told, prefix, (vision, words) = OPEN_CLIP[kind]
    state = open_clip_state(fields, prefix, np.random.default_rng(1))
    sizes = dict(image_size=12, patch_size=4, width=128, layers=2)
    texts = dict(context_length=11, vocab_size=SIZE, width=64, heads=1, layers=2)
    model = told | {"embed_dim": 20, "vision_cfg": sizes | told["vision_cfg"], "text_cfg": texts | told["text_cfg"]}
    folder = vocabulary(tmp_path / "theirs")
    statistics = {"mean": list(fields.get("mean", MEAN)), "std": list(fields.get("std", STD))}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": model, "preprocess_cfg": statistics}))
    safetensors.numpy.save_file(state, folder / "open_clip_model.safetensors")
    convert.convert(formats.Request("open_clip", str(folder)), str(tmp_path / "clip"))
    part = read(tmp_path / "clip")
    assert {name: getattr(part.stage.network, name) for name in fields} == fields
    tokens = tokenizers.Tokenizer("tiny").encode(CAPTIONS, 11)
    seen = {name: array[:1] if name.endswith("pool.query") else array for name, array in state.items()}
    mean, std = fields.get("mean", MEAN), fields.get("std", STD)
    wanted = oracle_logits(seen, pictures(12), tokens, vision=vision, text=words, mean=mean, std=std)
    np.testing.assert_allclose(ours(part, pictures(12), tokens), wanted, **CLOSE)


def test_open_clip_without_a_config(tmp_path):
    state = open_clip_state(VIT, "", np.random.default_rng(1))
    stored = {f"module.{name}": torch.tensor(array) for name, array in state.items()}
    torch.save({"state_dict": stored, "epoch": 3}, tmp_path / "x.pt")
    with pytest.raises(InputError, match="--activation=gelu"):
        next(clips.open_clip(formats.Request("open_clip", str(tmp_path / "x.pt"), vocabulary="tiny")))
    request = formats.Request("open_clip", str(tmp_path / "x.pt"), vocabulary="tiny", options={"activation": "gelu"})
    ((_, imported),) = clips.open_clip(request)
    wide = {name: imported.config.model[name] for name in VIT}
    assert wide == VIT and imported.config.model.activation == "gelu"


def saved(tmp_path, state):
    safetensors.numpy.save_file(state, tmp_path / "x.safetensors")
    return formats.Request("openai_clip", str(tmp_path / "x.safetensors"), vocabulary="tiny")


def test_what_cannot_be_imported_leaves_nothing_behind(tmp_path):
    state = openai_state(VIT, np.random.default_rng(0))
    target = tmp_path / "new" / "clip"
    missing = {name: array for name, array in state.items() if name != "visual.ln_pre.bias"}
    with pytest.raises(InputError, match="1 missing: visual.ln_pre.bias; 1 left over: lora"):
        convert.convert(saved(tmp_path, missing | {"lora": np.zeros(3, np.float32)}), str(target))
    with pytest.raises(InputError, match="no format 'open_klip'; did you mean 'open_clip'"):
        convert.convert(formats.Request("open_klip", "x"), str(target))
    with pytest.raises(InputError, match="--activation means nothing to --from=openai_clip"):
        convert.convert(formats.Request("openai_clip", "x", options={"activation": "gelu"}), str(target))
    other = openai_state(VIT | {"vocab_size": SIZE + 1}, np.random.default_rng(0))
    with pytest.raises(InputError, match="vocabulary 'tiny' has .* entries, the imported network reads"):
        convert.convert(saved(tmp_path, other), str(target))
    assert not target.parent.exists()
    target.mkdir(parents=True)
    (target / "notes.txt").touch()
    with pytest.raises(InputError, match="exists and is not empty"):
        convert.convert(saved(tmp_path, state), str(target))
    assert [path.name for path in target.iterdir()] == ["notes.txt"]


def test_a_wrong_tokenizer_is_found_by_its_known_answers(tmp_path, monkeypatch):
    """A vocabulary of the right size whose merges were swapped: files whole, ids wrong."""
    folder = vocabulary(tmp_path / "theirs")
    merges = (folder / "merges.txt").read_text().split("\n")
    swapped = [merges[0], *merges[1:-1][::-1], merges[-1]]
    (folder / "merges.txt").write_text("\n".join(swapped))
    monkeypatch.setitem(tokenizers._KNOWN_ANSWERS, SIZE, tokenizers._TINY_ANSWERS)
    safetensors.numpy.save_file(openai_state(VIT, np.random.default_rng(0)), folder / "x.safetensors")
    with pytest.raises(InputError, match="gives .* the ids"):
        convert.convert(formats.Request("openai_clip", str(folder / "x.safetensors")), str(tmp_path / "clip"))
    assert not (tmp_path / "clip").exists()


def test_training_begins_where_an_import_ended(tmp_path):
    """The state that a run restores: the weights, twice, and an optimizer as optax begins it."""
    convert.convert(saved(tmp_path, openai_state(VIT, np.random.default_rng(0))), str(tmp_path / "clip"))
    loaded = configs.load(f"configs/imported.py:{tmp_path / 'clip'}", {"batch_size": 8})
    built = program.build(loaded, sharding.make_mesh(loaded.mesh))
    saver = checkpoint.Checkpointer(tmp_path / "clip", every_steps=1, keep=1)
    found = saver.restore(built.state)
    saver.close()
    assert found is not None
    restored, meta = found
    began = optax.adamw(1e-3).init(restored.params)
    zeros = [np.asarray(x) for x in jax.tree.leaves((began, restored.opt_state, restored.step, restored.streak))]
    assert not any(x.any() for x in zeros)
    assert isinstance(restored, state.TrainState) and meta["data"]["tokenizer"] == tokenizers.Tokenizer("tiny").digest
    assert digests.described(restored.params) == digests.described(restored.ema)
    assert meta["imported"]["format"] == "openai_clip"
    assert workdirs.shapes(loaded)[1] == {}
