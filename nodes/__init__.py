"""What the user drags: a schema, and one call downward."""

from __future__ import annotations

import logging

import folder_paths
from comfy_api.latest import ComfyExtension, io
from safetensors import SafetensorError

from ..toolkit.cache import cache_folder
from ..toolkit.embedded import embedded_folders
from .combustion import ArkSageCombustion
from .doctor import ArkDoctor
from .encode import ArkTextEncode
from .live import serve
from .load import ArkFastLoader
from .next_prompt import watch
from .prepare import prepare_in_background
from .prewarm import ArkPrewarm
from .references import ArkReferenceImages
from .report import ArkReport
from .sample import ArkSampler4Step
from .schedule import ArkScheduler

log = logging.getLogger("ark")


class ArkExtension(ComfyExtension):
    """The pack, as the host sees it."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """The nodes, in the order of a graph."""
        try:
            for kind, folder in embedded_folders().items():
                folder_paths.add_model_folder_path(kind, str(folder))
        except (OSError, SafetensorError) as error:  # the nodes work without the embedded model
            log.warning(
                "Ark's embedded model is not listed, as %s cannot be written (%s). "
                "Set ARK_CACHE_DIR to a folder with 30 MB to spare.",
                cache_folder(),
                error,
            )
        prepare_in_background()
        serve()
        watch()
        return [
            ArkFastLoader,
            ArkTextEncode,
            ArkReferenceImages,
            ArkSageCombustion,
            ArkPrewarm,
            ArkScheduler,
            ArkSampler4Step,
            ArkReport,
            ArkDoctor,
        ]
