"""Faster imports change nothing that lasts."""

import contextlib
import gc
import importlib.metadata
import importlib.util
import subprocess
import sys

import pytest

from ark.toolkit.imports import OPTIONAL, building


def test_while_building_nothing_is_collected_and_packages_are_looked_up_once():
    own, interval = importlib.metadata.packages_distributions, sys.getswitchinterval()
    with pytest.raises(ZeroDivisionError), building:
        assert not gc.isenabled() and sys.getswitchinterval() < interval
        first, second = (importlib.metadata.packages_distributions() for _ in range(2))
        assert first is second and first == own()
        raise ZeroDivisionError
    assert gc.isenabled() and sys.getswitchinterval() == interval
    assert importlib.metadata.packages_distributions is own


def test_who_has_switched_the_collector_off_finds_it_off():
    gc.disable()
    try:
        with building:
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_two_at_once_leave_nothing_behind_in_either_order():
    own = importlib.metadata.packages_distributions
    for first in (0, 1):
        asked = [contextlib.ExitStack() for _ in range(2)]
        for stack in asked:
            stack.enter_context(building)
        asked[first].close()
        assert importlib.metadata.packages_distributions is not own and not gc.isenabled()
        asked[1 - first].close()
        assert importlib.metadata.packages_distributions is own and gc.isenabled()


def test_what_is_left_out_passes_for_not_installed_unless_it_was_imported():
    pytest.importorskip("diffusers", reason="lets diffusers look")
    code = """
import importlib.util, sys, json
from ark.toolkit.imports import OPTIONAL, left_out
with left_out("json", *OPTIONAL):
    assert importlib.util.find_spec("scipy") is None and sys.modules["json"] is json
    from diffusers import FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline
    from transformers import Qwen3Model
    from diffusers.utils import is_scipy_available
    assert not is_scipy_available()
assert importlib.util.find_spec("scipy") is not None and sys.modules["json"] is json
import scipy.stats
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    assert all("." not in name for name in OPTIONAL)
