"""Names there and back give the same weights."""

import pytest
import torch

from ark.benchmarks.models import transformer_shapes, vae_shapes
from ark.toolkit.diffusers_keys import transformer_to_diffusers, vae_to_diffusers
from ark.toolkit.keys import (
    is_diffusers_transformer,
    is_diffusers_vae,
    transformer_from_diffusers,
    vae_from_diffusers,
)


def random_weights(shapes):
    torch.manual_seed(0)
    return {name: torch.randn(shape) for name, shape in shapes.items()}


def assert_same(left, right):
    assert left.keys() == right.keys()
    assert all(torch.equal(left[key], right[key]) for key in left)


def test_a_transformer_comes_back_as_it_was():
    weights = random_weights(transformer_shapes(hidden=128, double=2, single=3, context=192))
    renamed = transformer_to_diffusers(weights)
    assert is_diffusers_transformer(renamed)
    assert_same(transformer_from_diffusers(renamed), weights)


def test_nothing_but_the_last_modulation_is_copied():
    weights = random_weights(transformer_shapes(hidden=128, double=1, single=1, context=192))
    homes = {tensor.untyped_storage().data_ptr() for tensor in weights.values()}
    copied = [k for k, v in transformer_to_diffusers(weights).items() if v.untyped_storage().data_ptr() not in homes]  # fmt: skip
    assert copied == ["norm_out.linear.weight"]


@pytest.mark.parametrize("levels", [(1, 2), (1, 2, 4, 4)])
def test_a_vae_comes_back_as_it_was(levels):
    weights = random_weights(vae_shapes(width=4, multipliers=levels))
    renamed = vae_to_diffusers(weights)
    assert is_diffusers_vae(renamed)
    assert "quant_conv.weight" in renamed and "post_quant_conv.weight" in renamed
    back = vae_from_diffusers(renamed)
    moved = {"post_quant_conv.": "decoder.post_quant_conv.", "quant_conv.": "encoder.quant_conv."}
    for short, long in moved.items():
        back = {long + k[len(short) :] if k.startswith(short) else k: v for k, v in back.items()}
    assert_same(back, weights)
