"""fp8 weights become the numbers that they stand for; other forms are refused by name."""

import pytest
import torch

from ark.toolkit.dequantise import dequantise, stored_dtype
from ark.toolkit.errors import ModelFileError


@pytest.mark.parametrize("name", ["weight_scale", "scale_weight"])
@pytest.mark.parametrize("rows", [False, True])
def test_scales_are_multiplied_in(name, rows):
    torch.manual_seed(0)
    weight = torch.randn(6, 8)
    scale = weight.abs().amax(1) / 448 if rows else weight.abs().max() / 448
    stored = (weight / (scale[:, None] if rows else scale)).to(torch.float8_e4m3fn)
    state_dict = {"a.weight": stored, f"a.{name}": scale, "scaled_fp8": torch.empty(2).to(torch.float8_e4m3fn)}  # fmt: skip
    assert stored_dtype(state_dict, "x") == torch.bfloat16
    made = dequantise(state_dict, torch.float32, "x")
    assert list(made) == ["a.weight"]
    assert torch.allclose(made["a.weight"], weight, rtol=0.07, atol=0.01)


def test_plain_weights_are_not_copied():
    weight = torch.randn(3, 3)
    assert dequantise({"a.weight": weight}, torch.float32, "x")["a.weight"] is weight


def test_what_is_kept_of_a_buffer_that_was_cast_does_not_keep_it_alive():
    flat = torch.zeros(64, dtype=torch.uint8)
    large, small = flat[:48].view(torch.float8_e4m3fn), flat[48:56].view(torch.float32)
    other = torch.zeros(4)
    made = dequantise({"a.weight": large, "n.weight": small, "b.weight": other}, torch.float32, "x")
    stores = [made[key].untyped_storage().data_ptr() for key in made]
    assert flat.untyped_storage().data_ptr() not in stores and made["b.weight"] is other


def test_what_is_not_read_is_named():
    with pytest.raises(ModelFileError, match="quantised to uint8"):
        stored_dtype({"a.weight": torch.zeros(4, 4, dtype=torch.uint8)}, "x")
    with pytest.raises(ModelFileError, match="a.weight is of int8"):
        dequantise({"a.weight": torch.zeros(4, 4, dtype=torch.int8)}, torch.bfloat16, "x")
    blocks = {"a.weight": torch.zeros(4, 64).to(torch.float8_e4m3fn), "a.weight_scale": torch.ones(4, 2)}  # fmt: skip
    with pytest.raises(ModelFileError, match=r"scale of shape \(4, 2\)"):
        dequantise(blocks, torch.bfloat16, "x")
