"""Published CLIPs as fields of ours, with the numbers of their parameters.

OpenAI's from github.com/openai/CLIP: its clip/model.py reads these sizes off the weight files, and counts its own
parameters in its notebooks. OpenCLIP's from github.com/mlfoundations/open_clip: src/open_clip/model_configs, counted in
docs/model_profile.csv.
"""

from typing import Any


def _text(width: int, depth: int = 12, **more: Any) -> dict[str, Any]:
    vocabulary = {"context_length": 77, "vocab_size": 49408}
    return {**vocabulary, "text_width": width, "text_depth": depth, "text_heads": width // 64, **more}


def _vit(image_size: int, patch_size: int, width: int, depth: int, heads: int, **more: Any) -> dict[str, Any]:
    sizes = {"image_size": image_size, "patch_size": patch_size}
    return {**sizes, "vision_width": width, "vision_depth": depth, "vision_heads": heads, **more}


def _resnet(image_size: int, layers: tuple[int, ...], width: int) -> dict[str, Any]:
    return {"image_size": image_size, "vision_layers": layers, "vision_width": width, "vision_heads": width // 2}


_QUICK = {"activation": "quick_gelu"}

# name -> fields, parameters of both towers and the logit scale, and of the image tower. A ResNet's statistics are no
# parameters in torch.
OPENAI = {
    "RN50": ({**_resnet(224, (3, 4, 6, 3), 64), **_text(512), "embed_dim": 1024}, 102_007_137, 38_316_896),
    "RN101": ({**_resnet(224, (3, 4, 23, 3), 64), **_text(512), "embed_dim": 512}, 119_688_033, 56_259_936),
    "RN50x4": ({**_resnet(288, (4, 6, 10, 6), 80), **_text(640), "embed_dim": 640}, 178_300_601, 87_137_080),
    "RN50x16": ({**_resnet(384, (6, 8, 18, 8), 96), **_text(768), "embed_dim": 768}, 290_979_217, 167_328_912),
    "RN50x64": ({**_resnet(448, (3, 15, 36, 10), 128), **_text(1024), "embed_dim": 1024}, 623_258_305, 420_380_352),
    "ViT-B/32": ({**_vit(224, 32, 768, 12, 12), **_text(512), "embed_dim": 512}, 151_277_313, 87_849_216),
    "ViT-B/16": ({**_vit(224, 16, 768, 12, 12), **_text(512), "embed_dim": 512}, 149_620_737, 86_192_640),
    "ViT-L/14": ({**_vit(224, 14, 1024, 24, 16), **_text(768), "embed_dim": 768}, 427_616_513, 303_966_208),
    "ViT-L/14@336px": ({**_vit(336, 14, 1024, 24, 16), **_text(768), "embed_dim": 768}, 427_944_193, 304_293_888),
}
OPENAI = {name: ({**_QUICK, **fields}, total, vision) for name, (fields, total, vision) in OPENAI.items()}

_CLIPA = {"vision_input_norm": False, "vision_pool": "average", "text_causal": False, "text_pool": "last"}
_CLIPA_WORDS = {"context_length": 32, "vocab_size": 32000}
_COCA = {"vision_pool": "attention", "text_pool": "class", "context_length": 76}
_H = {**_vit(224, 14, 1280, 32, 16), **_text(1024, 24), "embed_dim": 1024}
_BIG = {**_vit(224, 14, 1664, 48, 16, vision_mlp_ratio=4.9231), **_text(1280, 32), "embed_dim": 1280}
_L = {**_vit(224, 14, 1024, 24, 16), **_text(768), "embed_dim": 768}

# name -> fields, and millions of parameters of the image tower and of the text tower, rounded to two decimals.
OPENCLIP = {
    "ViT-S-32-alt": ({**_vit(224, 32, 384, 12, 6), **_text(256, 10), "embed_dim": 256}, 22.59, 20.63),
    "ViT-M-16-alt": (
        {**_vit(224, 16, 512, 12, 8, vision_layer_scale=1e-4), **_text(384), "embed_dim": 384},
        38.53,
        40.44,
    ),
    "ViT-B-16-plus-240": ({**_vit(240, 16, 896, 12, 14), **_text(640), "embed_dim": 640}, 117.21, 91.16),
    "ViT-L-16-320": ({**_vit(320, 16, 1024, 24, 16), **_text(768), "embed_dim": 768}, 304.3, 123.65),
    "ViT-H-14": (_H, 632.08, 354.03),
    "ViT-g-14": (
        {**_vit(224, 14, 1408, 40, 16, vision_mlp_ratio=4.3637), **_text(1024, 24), "embed_dim": 1024},
        1012.65,
        354.03,
    ),
    "ViT-bigG-14": (_BIG, 1844.91, 694.66),
    "ViT-e-14": (
        {**_vit(224, 14, 1792, 56, 16, vision_mlp_ratio=8.5715), **_text(1280, 36), "embed_dim": 1280},
        3807.72,
        773.37,
    ),
    "ViT-L-14-CLIPA": ({**_L, **_CLIPA, **_CLIPA_WORDS}, 303.96, 110.25),
    "ViT-H-14-CLIPA": ({**_H, **_CLIPA, **_CLIPA_WORDS}, 632.07, 336.16),
    "ViT-bigG-14-CLIPA": ({**_BIG, **_CLIPA, **_CLIPA_WORDS}, 1844.9, 672.32),
    # The profile counts 256 queries, of which one makes the embedding and is here.
    "coca_ViT-B-32": (
        {**_vit(224, 32, 768, 12, 12), **_text(512), **_COCA, "embed_dim": 512},
        89.16 - 255 * 512e-6,
        63.43,
    ),
    "coca_ViT-L-14": ({**_L, **_COCA}, 306.72 - 255 * 768e-6, 123.65),
}
