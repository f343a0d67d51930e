"""ArkPrewarm runs the sizes it is given and changes no image."""

from __future__ import annotations

import numpy as np
import pytest

from ark.bootstrap import NodeError

pytestmark = pytest.mark.host


def with_prewarm(server, sizes: str) -> dict:
    """The bundled graph with the node before the sampler."""
    graph = server.graph()
    sampler = graph[server.node_of(graph, "ArkSampler4Step")]["inputs"]
    graph["warm"] = {
        "class_type": "ArkPrewarm",
        "inputs": {"model": sampler["model"], "sizes": sizes, "batch_size": 1},
    }
    sampler["model"] = ["warm", 0]
    return graph


def test_sizes_run_with_progress_and_the_image_is_the_same(server):
    seen = []
    graph = with_prewarm(server, "64x64, 64x128; 64x64")
    result = server.client.run(graph, lambda kind, data: seen.append((kind, data)), timeout=120)
    np.testing.assert_array_equal(server.pixels(result["images"][0]), server.render(server.graph()))
    steps = [d["max"] for kind, d in seen if kind == "progress" and d.get("node") == "warm"]
    assert 2 in steps or any("warm" in d.get("nodes", {}) for k, d in seen if k == "progress_state")


@pytest.mark.parametrize("sizes", ["", "big", "1000x1000", "64x", "8192x64", "0x0"])
def test_what_is_no_size_is_refused_before_anything_runs(server, sizes):
    with pytest.raises(NodeError, match="sizes: "):
        server.client.run(with_prewarm(server, sizes), timeout=60)
