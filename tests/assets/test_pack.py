"""The files that ship, as a training run leaves them, and back."""

import torch
from safetensors.torch import load_file

from ark.assets import pack


def test_unpacked_and_packed_again_is_bit_for_bit_the_same(tmp_path):
    pack.unpack(tmp_path / "trained")
    pack.pack(tmp_path / "trained", tmp_path / "packed")
    for name in (pack.TRANSFORMER, pack.VAE, pack.COMPACT.name):
        shipped, again = load_file(pack.ASSETS / name), load_file(tmp_path / "packed" / name)
        assert shipped.keys() == again.keys()
        for key, tensor in shipped.items():
            assert tensor.dtype == again[key].dtype and torch.equal(tensor, again[key]), key
