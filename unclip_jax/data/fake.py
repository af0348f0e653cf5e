"""Random batches that are valid for any spec: for tests, for compiling and for timing without data."""

from collections.abc import Mapping

import jax
import numpy as np

from unclip_jax.data.examples import TOKEN_FIELDS
from unclip_jax.errors import InputError


def batch(spec: Mapping[str, jax.ShapeDtypeStruct], *, seed: int, vocab_size: int) -> dict[str, np.ndarray]:
    """Returns `{field: array}` with the shapes and dtypes of `spec`, a function of its arguments.

    Args:
      spec: field -> shape and dtype.
      seed: from 0.
      vocab_size: of the tokenizer; token fields get `[SOT] words [EOT] 0 0 ...` of random length.

    Raises:
      InputError: for a vocabulary without room for a word.
    """
    if vocab_size < 4:
        raise InputError(f"a vocabulary of {vocab_size} has no room for padding, a word, SOT and EOT")
    made = {}
    for number, (name, field) in enumerate(spec.items()):
        rng = np.random.default_rng((seed, number))
        if name in TOKEN_FIELDS:
            made[name] = _tokens(rng, *field.shape, vocab_size=vocab_size).astype(field.dtype)
        elif name == "id":
            made[name] = np.arange(field.shape[0], dtype=field.dtype) + np.asarray(seed * field.shape[0], field.dtype)
        elif field.dtype == np.bool_:
            made[name] = np.ones(field.shape, bool)
        elif np.issubdtype(field.dtype, np.integer):
            made[name] = rng.integers(0, 256, field.shape).astype(field.dtype)
        else:
            made[name] = rng.standard_normal(field.shape).astype(field.dtype)
    return made


def _tokens(rng: np.random.Generator, count: int, length: int, *, vocab_size: int) -> np.ndarray:
    tokens = rng.integers(1, vocab_size - 2, (count, length))
    # From the empty caption, [SOT, EOT], to one that fills the context.
    ends = rng.integers(1, length, (count, 1))
    places = np.arange(length)[None]
    tokens = np.where(places == ends, vocab_size - 1, np.where(places > ends, 0, tokens))
    tokens[:, 0] = vocab_size - 2
    return tokens
