"""`python -m unclip_jax.evaluate`, with a smoke protocol of the decoder's images alone: less to compile."""

import dataclasses

from unclip_jax import evaluate, programs
from unclip_jax.evaluation import protocols

SHORT = dataclasses.replace(protocols.named("captioned_shapes-smoke"), count=32, images=40, size=16)

if __name__ == "__main__":
    protocols.PROTOCOLS[SHORT.name] = SHORT
    evaluate.define_flags()
    programs.run(evaluate.main, commands=tuple(evaluate.COMMANDS))
