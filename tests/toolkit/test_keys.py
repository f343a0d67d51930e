"""Key remaps: every diffusers parameter lands once, and the numbers are the same."""

import pytest
import torch

from ark.toolkit.architecture import TransformerDims, VaeDims
from ark.toolkit.keys import (
    is_diffusers_transformer,
    is_diffusers_vae,
    transformer_from_diffusers,
    vae_from_diffusers,
)

diffusers = pytest.importorskip("diffusers", reason="remaps diffusers' own modules")


def test_transformer():
    module = diffusers.Flux2Transformer2DModel(
        num_layers=1,
        num_single_layers=2,
        num_attention_heads=1,
        joint_attention_dim=96,
        guidance_embeds=False,
    )
    state_dict = module.state_dict()
    assert is_diffusers_transformer(state_dict)
    renamed = transformer_from_diffusers(state_dict)
    assert not is_diffusers_transformer(renamed)
    assert TransformerDims.of(renamed, "x") == TransformerDims(128, 1, 1, 2, 96)
    assert sum(t.numel() for t in renamed.values()) == sum(t.numel() for t in state_dict.values())
    q = state_dict["transformer_blocks.0.attn.to_q.weight"]
    assert torch.equal(renamed["double_blocks.0.img_attn.qkv.weight"][:128], q)


def test_vae():
    module = diffusers.AutoencoderKLFlux2(block_out_channels=(32, 32, 64, 64), sample_size=256)
    state_dict = module.state_dict()
    assert is_diffusers_vae(state_dict)
    renamed = vae_from_diffusers(state_dict)
    assert len(renamed) == len(state_dict)
    assert VaeDims.of(renamed, "x") == VaeDims(32, 32, (1, 1, 2, 2), 2, 32, 32)
