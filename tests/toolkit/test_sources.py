"""Whatever happens to the parameters that something was made of is seen."""

import pytest
import torch

from ark.toolkit.sources import Sources

CHANGES = {
    "written to": lambda m: m[1][0].weight.mul_(2),
    "replaced": lambda m: setattr(m[0], "bias", torch.nn.Parameter(m[0].bias.clone())),
    "moved": lambda m: setattr(m[0].weight, "data", m[0].weight.data.clone()),
    "gone": lambda m: setattr(m[0], "bias", None),
    "wrapped": lambda m: m[1].__setitem__(0, torch.nn.Sequential(m[1][0])),
    "added to": lambda m: m[0].add_module("base_layer", torch.nn.Identity()),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_seen(change):
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Sequential(torch.nn.Linear(2, 2)))
    sources = Sources([model])
    assert sources.same()
    model(torch.zeros(1, 2))
    assert sources.same()
    with torch.no_grad():
        CHANGES[change](model)
    assert not sources.same()


def test_inference_tensors_have_no_count():
    with torch.inference_mode():
        model = torch.nn.Linear(2, 2)
    assert Sources([model]).same()
