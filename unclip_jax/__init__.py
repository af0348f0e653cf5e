"""unclip_jax: the text-to-image system of "Hierarchical Text-Conditional Image Generation with CLIP Latents".

Ramesh et al., 2022 (arXiv 2204.06125), in JAX and Flax. Importing this package imports nothing else.
"""

__version__ = "0.1.0"
