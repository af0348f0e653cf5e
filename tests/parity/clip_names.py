"""Our CLIP's weights under other implementations' names and in their layouts; gradients are renamed alike.

A kernel is [in, out] here and [out, in] in torch, a convolution's [h, w, in, out] and [out, in, h, w]; our blocks are
stacked on axis 0, theirs numbered; q, k and v are one array here, [in, 3, heads, head_dim].
"""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

Named = dict[str, np.ndarray]


def from_transformers(tower: str, named: Mapping[str, np.ndarray], heads: int) -> dict[str, Any]:
    """Arrays of transformers' CLIPTextModelWithProjection or CLIPVisionModelWithProjection as our tower's tree.

    Args:
      tower: "text" or "vision".
      named: weights or gradients by transformers' names.
      heads: of the tower.
    """
    own = {name.removeprefix(f"{tower}_model."): array for name, array in named.items()}

    def linear(name):
        layer = {"kernel": own[f"{name}.weight"].T}
        return layer | ({"bias": own[f"{name}.bias"]} if f"{name}.bias" in own else {})

    def norm(name):
        return {"scale": own[f"{name}.weight"], "bias": own[f"{name}.bias"]}

    def block(number):
        at = f"encoder.layers.{number}"
        qkv = [linear(f"{at}.self_attn.{kind}_proj") for kind in "qkv"]
        width = len(qkv[0]["bias"])
        return {
            "norm_1": norm(f"{at}.layer_norm1"),
            "norm_2": norm(f"{at}.layer_norm2"),
            "mlp": {"up": linear(f"{at}.mlp.fc1"), "down": linear(f"{at}.mlp.fc2")},
            "attention": {
                "qkv": {
                    "kernel": np.stack([x["kernel"] for x in qkv], 1).reshape(width, 3, heads, -1),
                    "bias": np.stack([x["bias"] for x in qkv]).reshape(3, heads, -1),
                },
                "out": {
                    "kernel": linear(f"{at}.self_attn.out_proj")["kernel"].reshape(heads, -1, width),
                    "bias": own[f"{at}.self_attn.out_proj.bias"],
                },
            },
        }

    depth = len({name.split(".")[2] for name in own if name.startswith("encoder.")})
    stack = {"blocks": jax.tree.map(lambda *x: np.stack(x), *map(block, range(depth)))}
    positions = own["embeddings.position_embedding.weight"]
    if tower == "text":
        return {
            "tokens": {"embedding": own["embeddings.token_embedding.weight"]},
            "positions": positions,
            "stack": stack,
            "ln_final": norm("final_layer_norm"),
            "projection": linear("text_projection"),
        }
    return {
        "patches": {"kernel": own["embeddings.patch_embedding.weight"].transpose(2, 3, 1, 0)},
        "class": own["embeddings.class_embedding"],
        "positions": positions,
        "ln_pre": norm("pre_layrnorm"),
        "stack": stack,
        "ln_post": norm("post_layernorm"),
        "projection": linear("visual_projection"),
    }


def by_path(tree: Any) -> Named:
    """The leaves of a tree, each named by its path."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {"/".join(str(key.key) for key in path): np.asarray(leaf) for path, leaf in leaves}


def _linear(name: str, p: Mapping[str, Any]) -> Named:
    return {f"{name}.weight": p["kernel"].T} | ({f"{name}.bias": p["bias"]} if "bias" in p else {})


def _norm(name: str, p: Mapping[str, Any]) -> Named:
    return {f"{name}.weight": p["scale"], f"{name}.bias": p["bias"]}


def _blocks(name: str, stack: Mapping[str, Any]) -> Named:
    named: Named = {}
    stacked = stack["blocks"]
    for number in range(len(stacked["norm_1"]["scale"])):
        p = jax.tree.map(lambda x, number=number: x[number], stacked)
        at = f"{name}.resblocks.{number}"
        width = len(p["norm_1"]["scale"])
        out = {"kernel": p["attention"]["out"]["kernel"].reshape(width, width), "bias": p["attention"]["out"]["bias"]}
        named |= {
            **_norm(f"{at}.ln_1", p["norm_1"]),
            f"{at}.attn.in_proj_weight": p["attention"]["qkv"]["kernel"].reshape(width, 3 * width).T,
            f"{at}.attn.in_proj_bias": p["attention"]["qkv"]["bias"].reshape(-1),
            **_linear(f"{at}.attn.out_proj", out),
            **_norm(f"{at}.ln_2", p["norm_2"]),
            **_linear(f"{at}.mlp.c_fc", p["mlp"]["up"]),
            **_linear(f"{at}.mlp.c_proj", p["mlp"]["down"]),
        }
        if "scale_1" in p:
            named |= {f"{at}.ls_1.gamma": p["scale_1"], f"{at}.ls_2.gamma": p["scale_2"]}
    return named


def vision_transformer(p: Mapping[str, Any]) -> Named:
    """Our VisionTransformer's arrays by OpenAI's names, and by OpenCLIP's where OpenAI has no such thing."""
    named = {
        "conv1.weight": p["patches"]["kernel"].transpose(3, 2, 0, 1),
        "class_embedding": p["class"],
        "positional_embedding": p["positions"],
        **(_norm("ln_pre", p["ln_pre"]) if "ln_pre" in p else {}),
        **_blocks("transformer", p["stack"]),
        **_norm("ln_post", p["ln_post"]),
        "proj": p["projection"]["kernel"],
    }
    if "pool_query" in p:
        reader = {name: _linear("", layer) for name, layer in p["pool_reader"].items()}
        named |= {
            "attn_pool.query": p["pool_query"],
            **_norm("attn_pool.ln_q", p["pool_norm_query"]),
            **_norm("attn_pool.ln_k", p["pool_norm_tokens"]),
            **{f"attn_pool.attn.{name[0]}_proj_weight": reader[name][".weight"] for name in ("query", "key", "value")},
            "attn_pool.attn.in_proj_bias": np.concatenate([reader[n][".bias"] for n in ("query", "key", "value")]),
            **_linear("attn_pool.attn.out_proj", p["pool_reader"]["out"]),
        }
    return named


def text_transformer(p: Mapping[str, Any]) -> Named:
    """Our TextTransformer's arrays by OpenAI's names, and by OpenCLIP's where OpenAI has no such thing."""
    projection = p["projection"]
    return {
        "token_embedding.weight": p["tokens"]["embedding"],
        "positional_embedding": p["positions"],
        **({"cls_emb": p["class"]} if "class" in p else {}),
        **_blocks("transformer", p["stack"]),
        **_norm("ln_final", p["ln_final"]),
        **(
            _linear("text_projection", projection)
            if "bias" in projection
            else {"text_projection": projection["kernel"]}
        ),
    }


def modified_resnet(p: Mapping[str, Any]) -> Named:
    """Our ModifiedResNet's arrays by OpenAI's names."""
    named: Named = {"attnpool.positional_embedding": p["positions"]}
    for ours, theirs in {"query": "q_proj", "key": "k_proj", "value": "v_proj", "out": "c_proj"}.items():
        named |= _linear(f"attnpool.{theirs}", p["reader"][ours])

    def layer(conv, norm, kernel, p):
        statistics = {f"{norm}.{name}": p[name] for name in ("running_mean", "running_var")}
        return {f"{conv}.weight": kernel.transpose(3, 2, 0, 1), **_norm(norm, p), **statistics}

    for number in range(3):
        kernel = p[f"stem_{number}"]["kernel"]
        named |= layer(f"conv{number + 1}", f"bn{number + 1}", kernel, p[f"stem_norm_{number}"])

    def block(at: str, p: Mapping[str, Any]) -> Named:
        convolved = [layer(f"{at}.conv{n}", f"{at}.bn{n}", p[f"conv_{n}"]["kernel"], p[f"norm_{n}"]) for n in "123"]
        if "conv_skip" in p:
            skip = f"{at}.downsample"
            convolved.append(layer(f"{skip}.0", f"{skip}.1", p["conv_skip"]["kernel"], p["norm_skip"]))
        return {name: array for layer in convolved for name, array in layer.items()}

    stages = sum(name.endswith("_first") for name in p)
    for stage in range(stages):
        named |= block(f"layer{stage + 1}.0", p[f"stage_{stage}_first"])
        rest = p.get(f"stage_{stage}_rest")
        for number in range(0 if rest is None else len(rest["norm_1"]["scale"])):
            one = jax.tree.map(lambda x, number=number: x[number], rest)
            named |= block(f"layer{stage + 1}.{number + 1}", one)
    return named
