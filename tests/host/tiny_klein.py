"""The embedded transformer as the scripts beside this file need it; imported once the host is on the path."""

import json

import torch
from safetensors.torch import load_file, save_file

from ark.toolkit.embedded import ASSETS

KLEIN = ASSETS / "diffusion_models" / "ark_tiny_klein.safetensors"
QKV = "diffusion_model.double_blocks.0.img_attn.qkv.weight"


def with_lora(model, strength, size=0.02):
    """A clone whose first qkv is patched."""
    torch.manual_seed(1)
    patched = model.clone()
    shape = patched.model.state_dict()[QKV].shape
    assert patched.add_patches({QKV: ("diff", (torch.randn(shape) * size,))}, strength)
    return patched


def lora_hook(model, strength, size=0.02):
    """As `with_lora`, for a conditioning: it is written into the weights while that is sampled."""
    import comfy.hooks

    torch.manual_seed(1)
    name, shape = QKV.removesuffix(".weight"), model.model.state_dict()[QKV].shape
    return comfy.hooks.create_hook_lora({f"{name}.diff": torch.randn(shape) * size}, strength, 0.0)


def difference(a, b):
    """Relative to the second, where that is finite: 0.3.75 makes NaN of a prompt of nothing but padding."""
    finite = b.isfinite()
    return float((a - b)[finite].norm() / b[finite].norm())


def write_fp8(path, form="metadata"):
    """The transformer with its blocks (or every linear layer: "scaled") in fp8 e4m3, one scale a tensor."""
    metadata, tensors, layers = None, {}, {}
    for name, tensor in load_file(KLEIN).items():
        if tensor.ndim == 2 and (form == "scaled" or "_blocks." in name):
            layer, scale = name.removesuffix(".weight"), tensor.float().abs().max() / 448
            tensors[name] = (tensor.float() / scale).to(torch.float8_e4m3fn)
            tensors[f"{layer}.{'scale_weight' if form == 'scaled' else 'weight_scale'}"] = scale
            layers[layer] = {"format": "float8_e4m3fn"}
        else:
            tensors[name] = tensor
    if form == "scaled":
        tensors["scaled_fp8"] = torch.empty(2, dtype=torch.float8_e4m3fn)
    else:
        metadata = {"_quantization_metadata": json.dumps({"layers": layers})}
    save_file(tensors, path, metadata)
    return path
