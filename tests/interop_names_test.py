"""Tables of names, in both directions."""

import jax
import numpy as np
import pytest

from unclip_jax.errors import InputError
from unclip_jax.interop import names
from unclip_jax.interop.tensors import Tensor

HEADS, K, WIDTH, DEPTH = 2, 3, 5, 4


def _block(number):
    at = f"h.{number}"
    return names.table(
        names.separate("blocks/qkv", [f"{at}.q", f"{at}.k", f"{at}.v"], HEADS),
        names.joined("blocks/out", f"{at}.o", HEADS),
    )


TABLE = names.table(
    names.stacked([_block(number) for number in range(DEPTH)]),
    names.conv("stem", "conv", bias=False),
    names.linear("fused", "f", names.fused(3, HEADS)),
    names.array("glide/kernel", "g.weight", names.POINTWISE.then(names.interleaved(2, HEADS))),
    names.linear("tokens", "t", names.token_major(4)),
    names.Table(
        tuple(names.Piece("in_bias", f"{one}/bias", part=(number, 3)) for number, one in enumerate("abc")),
        ignored=(r".*\.position_ids",),
    ),
    names.array("query", "query", names.leading_ones(2)),
)
SHAPES = {
    "blocks": {
        "qkv": {"kernel": (DEPTH, WIDTH, 3, HEADS, K), "bias": (DEPTH, 3, HEADS, K)},
        "out": {"kernel": (DEPTH, HEADS, K, WIDTH), "bias": (DEPTH, WIDTH)},
    },
    "stem": {"kernel": (3, 2, 4, 7)},
    "fused": {"kernel": (WIDTH, 3, HEADS, K), "bias": (3, HEADS, K)},
    "glide": {"kernel": (WIDTH, 2, HEADS, K)},
    "tokens": {"kernel": (WIDTH, 4 * 3), "bias": (4 * 3,)},
    "a": {"bias": (3,)},
    "b": {"bias": (3,)},
    "c": {"bias": (3,)},
    "query": (6,),
}
OURS = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s, np.float32), SHAPES, is_leaf=lambda x: isinstance(x, tuple))


def theirs(rng):
    arrays = {
        **{f"h.{i}.{one}.weight": rng.normal(size=(HEADS * K, WIDTH)) for i in range(DEPTH) for one in "qkv"},
        **{f"h.{i}.{one}.bias": rng.normal(size=(HEADS * K,)) for i in range(DEPTH) for one in "qkv"},
        **{f"h.{i}.o.weight": rng.normal(size=(WIDTH, HEADS * K)) for i in range(DEPTH)},
        **{f"h.{i}.o.bias": rng.normal(size=(WIDTH,)) for i in range(DEPTH)},
        "conv.weight": rng.normal(size=(7, 4, 3, 2)),
        "f.weight": rng.normal(size=(3 * HEADS * K, WIDTH)),
        "f.bias": rng.normal(size=(3 * HEADS * K,)),
        "g.weight": rng.normal(size=(HEADS * 2 * K, WIDTH, 1)),
        "t.weight": rng.normal(size=(12, WIDTH)),
        "t.bias": rng.normal(size=(12,)),
        "in_bias": rng.normal(size=(9,)),
        "query": rng.normal(size=(1, 1, 6)),
    }
    return {name: array.astype(np.float32) for name, array in arrays.items()}


@pytest.fixture
def arrays():
    return theirs(np.random.default_rng(0))


def lazy(arrays):
    return {name: Tensor.of(array) for name, array in arrays.items()}


def test_each_projection_computes_what_theirs_does(arrays):
    """By what the layers are for: outputs of one row of inputs, told apart by head and kind."""
    ours = names.imported(TABLE, lazy(arrays) | {"x.position_ids": Tensor.of(np.arange(3))}, OURS)
    x = np.random.default_rng(1).normal(size=WIDTH).astype(np.float32)
    for layer in range(DEPTH):
        qkv = np.einsum("i,ichk->chk", x, ours["blocks"]["qkv"]["kernel"][layer]) + ours["blocks"]["qkv"]["bias"][layer]
        for kind, one in enumerate("qkv"):
            row = arrays[f"h.{layer}.{one}.weight"] @ x + arrays[f"h.{layer}.{one}.bias"]
            np.testing.assert_allclose(qkv[kind], [row[:K], row[K:]], rtol=1e-5, atol=1e-6)
        heads = np.random.default_rng(2).normal(size=(HEADS, K)).astype(np.float32)
        back = np.einsum("hk,hko->o", heads, ours["blocks"]["out"]["kernel"][layer])
        np.testing.assert_allclose(back, arrays[f"h.{layer}.o.weight"] @ heads.reshape(-1), rtol=1e-5, atol=1e-6)
    fused = arrays["f.weight"] @ x + arrays["f.bias"]
    ours_fused = np.einsum("i,ichk->chk", x, ours["fused"]["kernel"]) + ours["fused"]["bias"]
    np.testing.assert_allclose(ours_fused.reshape(-1), fused, rtol=1e-5, atol=1e-6)
    rows = arrays["g.weight"][..., 0] @ x  # head 0: k, v; head 1: k, v
    ours_glide = np.einsum("i,ichk->chk", x, ours["glide"]["kernel"])
    np.testing.assert_allclose(ours_glide[1, 0], rows[K : 2 * K], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(ours_glide[0, 1], rows[2 * K : 3 * K], rtol=1e-5, atol=1e-6)
    tokens = (arrays["t.weight"] @ x + arrays["t.bias"]).reshape(-1, 4)  # their tokens are the columns
    ours_tokens = (x @ ours["tokens"]["kernel"] + ours["tokens"]["bias"]).reshape(4, -1)
    np.testing.assert_allclose(ours_tokens, tokens.T, rtol=1e-5, atol=1e-6)
    assert np.array_equal(ours["b"]["bias"], arrays["in_bias"][3:6])
    assert ours["stem"]["kernel"][2, 1, 3, 6] == arrays["conv.weight"][6, 3, 2, 1]


def test_there_and_back_is_the_same(arrays):
    back = names.exported(TABLE, names.imported(TABLE, lazy(arrays), OURS))
    assert set(back) == set(arrays)
    for name, tensor in back.items():
        found = tensor.read()
        assert tensor.shape == found.shape and found.flags.c_contiguous and np.array_equal(found, arrays[name])
    assert {name: tensor.shape for name, tensor in names.exported(TABLE, OURS).items()} == {
        name: array.shape for name, array in arrays.items()
    }


def test_one_error_names_all_that_is_wrong(arrays):
    del arrays["conv.weight"], arrays["h.3.q.bias"]
    arrays["extra"] = arrays["h.0.q.weight"]
    arrays["query"] = arrays["query"][0]
    arrays["t.bias"] = np.arange(12)
    with pytest.raises(InputError) as caught:
        names.imported(TABLE, lazy(arrays), OURS, where="model.bin")
    message = str(caught.value)
    for part in (
        "2 missing: h.3.q.bias, conv.weight",
        "1 left over: extra",
        "2 of another shape: t.bias of int64",
        "query [1, 6] where [1, 1, 6]",
    ):
        assert part in message


def test_weights_that_are_not_finite_are_refused(arrays):
    arrays["in_bias"][4] = np.nan
    with pytest.raises(InputError, match="in_bias holds numbers that are not finite"):
        names.imported(TABLE, lazy(arrays), OURS)


def test_a_table_that_leaves_out_numbers_of_ours_is_an_error(arrays):
    short = names.Table(TABLE.pieces[1:])
    with pytest.raises(ValueError, match="blocks/qkv/kernel"):
        names.exported(short, OURS)


def test_names_of_parts_of_networks():
    prefixed = TABLE.under(ours="text/", theirs="text_model.")
    assert prefixed.pieces[0].path == "text/blocks/qkv/kernel" and prefixed.pieces[0].name == "text_model.h.0.q.weight"
    names_, tree = {f"text_model.{name}" for name in theirs(np.random.default_rng(0))}, {"text": OURS}
    assert set(names.exported(prefixed, tree)) == names_
