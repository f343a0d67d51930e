"""The first step of a prompt that is the last one but for its seed is begun when the prompt arrives."""

from __future__ import annotations

import weakref
from typing import Any

import torch

from ..patches import noise
from ..patches.first_step import FirstStep

SAMPLER = "ArkSampler4Step"
Prompt = dict[str, dict]
# what was sampled with, but for the seed: the seed, by which node, and where it begins
_last: tuple[dict[str, Any], int, str, weakref.ref[FirstStep]] | None = None


def sampled(prompt: Prompt | None, sampler: str, first: FirstStep, device: Any) -> None:
    """Take down what a sampler has run with.

    Args:
        prompt: as the host has got it, None if it does not say.
        sampler: its node.
        first: of its engine.
        device: that it has run on.
    """
    global _last
    _last = None
    if prompt and (found := _without_seed(prompt, sampler)) is not None:
        _last = *found, sampler, weakref.ref(first)
        noise.hurry(torch.device(device))


def arrived(prompt: Prompt) -> None:
    """Begin with a prompt that the host has got while nothing else runs or waits; one with the same seed is in its cache."""
    if _last is None:
        return
    others, seed, sampler, first_of = _last
    found, first = _without_seed(prompt, sampler), first_of()
    if found is not None and first is not None and found[0] == others and found[1] != seed:
        first.begin(found[1], noise.ahead)


def _without_seed(prompt: Prompt, sampler: str) -> tuple[dict[str, Any], int] | None:
    """All that makes a prompt, and the seed; None without one, or with another sampler beside this one."""
    samplers = [number for number, node in prompt.items() if node.get("class_type") == SAMPLER]
    seed = prompt.get(sampler, {}).get("inputs", {}).get("seed")
    if samplers != [sampler] or type(seed) is not int:  # a bool is one, too
        return None
    # the host adds other things to a node than these
    others: dict[str, Any] = {number: (node.get("class_type"), {**node.get("inputs", {})}) for number, node in prompt.items()}  # fmt: skip
    del others[sampler][1]["seed"]
    return others, seed
