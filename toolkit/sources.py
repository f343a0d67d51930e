"""The parameters that something was made of: whether they are still the same, unchanged and where they were."""

from __future__ import annotations

from collections.abc import Iterable

import torch


class Sources:
    """Notes the parameters of modules.

    Args:
        modules: whose own parameters, and those of all below them, count.
    """

    def __init__(self, modules: Iterable[torch.nn.Module]):
        self._noted = [
            (module._parameters, name, parameter, *_state(parameter))
            for root in modules
            for module in root.modules()
            for name, parameter in module._parameters.items()
            if parameter is not None
        ]

    def same(self) -> bool:
        """Whether nothing was replaced, moved or written to."""
        return all(
            held.get(name) is parameter and _state(parameter) == (address, version)
            for held, name, parameter, address, version in self._noted
        )


def _state(parameter: torch.Tensor) -> tuple[int, int]:
    """Where it lies, and how often it was written to, where torch counts that."""
    return parameter.data_ptr(), 0 if parameter.is_inference() else parameter._version
