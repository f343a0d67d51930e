"""A VAE of random weights for the scripts beside this file."""

import torch
from safetensors.torch import save_file

from ark.benchmarks.models import vae_shapes


def write_random(path):
    """FLUX.2's own form, a quarter as wide, and no number that is usual."""
    torch.manual_seed(0)
    tensors = {}
    for name, shape in vae_shapes(32).items():
        spread = 1.5 * torch.tensor(shape[1:]).prod().item() ** -0.5 if len(shape) > 1 else 0.3
        one = name.endswith("var") or ("norm" in name and name.endswith("weight"))
        tensors[name] = float(one) + spread * torch.randn(shape)
        if name.endswith("var"):
            tensors[name].abs_().add_(0.1)
    save_file(tensors, path)
    return path
