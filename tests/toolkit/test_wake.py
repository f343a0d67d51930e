"""Waking a device runs there, and never fails for anybody."""

import pytest
import torch

from ark.toolkit import wake


def test_a_cpu_needs_no_waking():
    assert wake.wake(torch.device("cpu"), torch.float32) is None


def test_it_runs_and_what_fails_is_only_said(monkeypatch, caplog):
    monkeypatch.setattr(wake, "DEVICES", ("cpu", "nowhere"))
    assert wake.wake(torch.device("cpu"), torch.bfloat16).result() is None and not caplog.text
    monkeypatch.setattr(wake, "operations_for", lambda device: 1 / 0)
    wake.wake(torch.device("cpu"), torch.float32).result()
    assert "could not be woken (division by zero)" in caplog.text


@pytest.mark.gpu
def test_a_gpu_is_woken(caplog):
    wake.wake(torch.device("cuda"), torch.bfloat16).result()
    assert not caplog.text
