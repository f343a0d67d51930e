"""Klein's sigmas against diffusers' own, and their promises."""

import pytest
import torch

from ark.toolkit.errors import InputError
from ark.toolkit.schedule import empirical_mu, klein_sigmas


@pytest.mark.parametrize("seq_len", [256, 1024, 4096, 4300, 9216])
@pytest.mark.parametrize("steps", [1, 4, 20, 50])
def test_sigmas_equal_diffusers(seq_len, steps):
    pytest.importorskip("diffusers", reason="compares with diffusers' schedule")
    import numpy as np
    from diffusers import FlowMatchEulerDiscreteScheduler
    from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu

    mu = compute_empirical_mu(seq_len, steps)
    assert empirical_mu(seq_len, steps) == pytest.approx(mu, rel=1e-12)
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
    assert torch.allclose(klein_sigmas(steps, seq_len), scheduler.sigmas, atol=1e-6)


def test_published_levels_at_1024():
    expected = torch.tensor([1.0, 0.96738, 0.90814, 0.76720, 0.0])
    assert torch.allclose(klein_sigmas(4, 4096), expected, atol=1e-5)


@pytest.mark.parametrize("denoise", [0.05, 0.3, 0.5, 0.99, 1.0])
@pytest.mark.parametrize("steps", [1, 4, 50])
def test_all_the_steps_run_whatever_denoise(steps, denoise):
    sigmas = klein_sigmas(steps, 256, denoise)
    assert len(sigmas) == steps + 1
    assert sigmas[-1] == 0
    assert (sigmas.diff() < 0).all()
    assert sigmas[0] == pytest.approx(1) or denoise < 1


@pytest.mark.parametrize("steps, denoise", [(0, 1.0), (-1, 1.0), (51, 1.0), (4, 0.0), (4, 1.01)])
def test_out_of_range_is_refused(steps, denoise):
    with pytest.raises(InputError, match="Choose"):
        klein_sigmas(steps, 256, denoise)
