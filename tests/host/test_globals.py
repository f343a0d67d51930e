"""After a run no global of the host or of torch has changed, and no model file."""

from __future__ import annotations

import pytest

from ark.bootstrap import Client, Host

pytestmark = pytest.mark.host


def test_a_run_leaves_every_global_as_it_was(comfyui, run_in_host):
    assert "unchanged" in run_in_host(comfyui, "run_and_compare.py")


def test_an_unwritable_cache_folder_costs_the_embedded_model_only(comfyui, tmp_path, monkeypatch):
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    monkeypatch.setenv("ARK_CACHE_DIR", str(blocked / "cache"))
    with Host.start(comfyui) as host:
        assert "ArkFastLoader" in Client(host.url).object_info()
        assert "Set ARK_CACHE_DIR" in host.log_tail(300)
