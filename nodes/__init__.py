"""What the user drags: a schema, and one call downward."""

from __future__ import annotations

import folder_paths
from comfy_api.latest import ComfyExtension, io

from ..toolkit.embedded import embedded_folders
from .combustion import ArkSageCombustion
from .load import ArkFastLoader
from .sample import ArkSampler4Step


class ArkExtension(ComfyExtension):
    """The pack, as the host sees it."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """The nodes, in the order of a graph."""
        for kind, folder in embedded_folders().items():
            folder_paths.add_model_folder_path(kind, str(folder))
        return [ArkFastLoader, ArkSageCombustion, ArkSampler4Step]
