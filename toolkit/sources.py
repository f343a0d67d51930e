"""The modules and parameters that something was made of: whether they are the same, unchanged and where they were."""

from __future__ import annotations

from collections.abc import Iterable

import torch


class Sources:
    """Notes parameters.

    Args:
        roots: modules whose parameters count, with those of all modules below them.
    """

    def __init__(self, roots: Iterable[torch.nn.Module]):
        modules = [module for root in roots for module in root.modules()]
        self._parameters = [
            (module._parameters, name, parameter, *_state(parameter))
            for module in modules
            for name, parameter in module._parameters.items()
            if parameter is not None
        ]
        self._modules = [(module._modules, tuple(module._modules.values())) for module in modules]

    def same(self) -> bool:
        """Whether nothing was replaced, added, moved or written to."""
        return all(tuple(held.values()) == children for held, children in self._modules) and all(
            held.get(name) is parameter and _state(parameter) == (address, version)
            for held, name, parameter, address, version in self._parameters
        )


def _state(parameter: torch.Tensor) -> tuple[int, int]:
    """Where it lies, and how often it was written to, where torch counts that."""
    return parameter.data_ptr(), 0 if parameter.is_inference() else parameter._version
