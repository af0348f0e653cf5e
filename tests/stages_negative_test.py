"""Negative prompts in the priors: the null branch reads the negative caption and its z_t."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import untrained_models
from small_configs import small

from unclip_jax.data import fake
from unclip_jax.errors import InputError
from unclip_jax.stages import base

PRIORS = ["prior_diffusion", "prior_ar"]


class Case:
    """A small prior with two lists of captions; `draw` samples one embedding a caption, guided by `scale`."""

    def __init__(self, name: str, scale: float):
        self.stage = base.create(small(name, sampling__candidates=1, sampling__guidance_scale=scale, model__depth=1))
        self.params = untrained_models.drawn(self.stage, 0)
        clip = untrained_models.drawn(base.create(small("clip")), 1)
        statistics = jax.jit(lambda key: self.stage.init_frozen(key).get("statistics", {}))(jax.random.key(0))
        self.frozen = {"clip": clip, "statistics": statistics}
        spec = self.stage.predict_specs(8)["sample_z_i"]
        batch = jax.tree.map(jnp.asarray, fake.batch(spec, seed=0, vocab_size=self.stage.vocab_size))
        self.captions = [{field: batch[field][rows] for field in ("tokens", "clip_tokens")}
                         for rows in (slice(4), slice(4, 8))]  # fmt: skip
        self.ids = batch["id"][:4]

    def draw(self, to: int, away: int | None):
        fields = {**self.captions[to], "id": self.ids}
        if away is not None:
            fields |= {f"negative_{field}": tokens for field, tokens in self.captions[away].items()}
        return jax.jit(self.stage.predict_fns()["sample_z_i"])(self.params, self.frozen, fields, jax.random.key(3))


@pytest.mark.parametrize("name", PRIORS)
def test_to_swap_prompt_and_negative_prompt_is_to_mirror_the_scale(name):
    """away + s (to - away) = to + (1 - s) (away - to)."""
    made = Case(name, 3.0).draw(0, 1)
    np.testing.assert_allclose(Case(name, -2.0).draw(1, 0), made, atol=1e-4)


@pytest.mark.parametrize("name", PRIORS)
def test_at_scale_zero_the_negative_prompt_alone_is_drawn(name):
    np.testing.assert_allclose(Case(name, 0.0).draw(0, 1), Case(name, 1.0).draw(1, None), atol=1e-4)


@pytest.mark.parametrize("name", PRIORS)
def test_an_unguided_prior_refuses_a_negative_prompt(name):
    with pytest.raises(InputError, match="guidance_scale 1"):
        Case(name, 1.0).draw(0, 1)
