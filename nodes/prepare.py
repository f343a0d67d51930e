"""What can be done before anybody queues: while the server idles, the tokenizer is built and CUDA's kernels are loaded.

No weight is read for it. The kernels are loaded only where a GPU and a Klein file are; ARK_PREPARE=0 switches all of it off.
"""

from __future__ import annotations

import logging
import os
import threading

import comfy.model_management
import folder_paths

from ..patches.text_encoder import klein_tokenizer, load_text_encoder
from ..patches.transformer import load_transformer
from ..patches.vae import load_vae
from ..toolkit.embedded import preferred
from ..toolkit.rates import link_rate

DELAY = 1.0  # s; the server comes up first
PARTS = {"text_encoders": load_text_encoder, "diffusion_models": load_transformer, "vae": load_vae}
log = logging.getLogger("ark")


def prepare_in_background() -> None:
    """Do it soon, in a thread of its own."""
    if os.environ.get("ARK_PREPARE") != "0":
        timer = threading.Timer(DELAY, prepare)
        timer.daemon = True
        timer.start()


def prepare() -> None:
    """Build the tokenizer, then open what the loader would offer first: that warms CUDA up for its dimensions."""
    try:
        klein_tokenizer()
        device = comfy.model_management.get_torch_device()
        offered = {f: preferred(f, folder_paths.get_filename_list(f)) for f in PARTS}
        if device.type == "cuda" and all(
            name and "ark_tiny" not in name for name in offered.values()
        ):
            link_rate(device)
            for folder, name in offered.items():
                PARTS[folder](folder_paths.get_full_path(folder, name), ahead=False)
    except Exception as error:  # whoever loads a model meets it again, and says so
        log.debug("Ark could not prepare (%s).", error)
