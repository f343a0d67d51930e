"""Ark: FLUX.2-Klein in ComfyUI as fast as the silicon allows.

Inside ComfyUI this package defines nodes; anywhere else (tests, scripts) it is a plain package named `ark`.
"""

try:
    import comfy_api.latest  # noqa: F401
    import folder_paths  # noqa: F401
except ImportError:
    _HOST = False  # only the host's absence is forgiven: an error inside nodes/ must surface
else:
    _HOST = True

if _HOST and __package__:
    WEB_DIRECTORY = "./web"

    async def comfy_entrypoint():
        """The host's way in."""
        from .nodes import ArkExtension

        return ArkExtension()

    __all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]
