"""What every node's schema says alike."""

from __future__ import annotations

import dataclasses
from typing import Any

from comfy_api.latest import io

# has the graph's name, see `live.place`; it is no input and changes no cache
HIDDEN = [io.Hidden.extra_pnginfo]
_KNOWN = {field.name for field in dataclasses.fields(io.Schema)}


def schema(node_id: str, display_name: str, *, search_aliases: list[str], **described: Any) -> io.Schema:  # fmt: skip
    """A node of the category Ark.

    Args:
        node_id: permanent.
        display_name: its title.
        search_aliases: what else a search finds it by; left out on hosts that do not know of them (0.3.75).
        described: the rest of io.Schema.
    """
    if "search_aliases" in _KNOWN:
        described["search_aliases"] = search_aliases
    hidden = [*HIDDEN, *described.pop("hidden", [])]
    return io.Schema(node_id, display_name, category="Ark", hidden=hidden, **described)
