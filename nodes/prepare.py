"""What can be done before anybody queues: while the server idles, the tokenizer is built and CUDA's kernels are loaded.

No weight is read for it. The kernels are loaded only where a GPU and a Klein file are; ARK_PREPARE=0 switches all of it off.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time

import comfy.model_management
import folder_paths

from ..patches.attention import set_attention
from ..patches.fused import engine_of, set_fused
from ..patches.text_encoder import klein_tokenizer, load_text_encoder
from ..patches.transformer import load_transformer
from ..patches.vae import load_vae
from ..patches.warmup import choose_matrices, warm_up_attention
from ..toolkit.compile import read_ahead
from ..toolkit.embedded import preferred
from ..toolkit.rates import link_rate

DELAY = 0.5  # s; the server comes up first
LATER = 5.0  # s; whoever queues at once does not compete with an import
FOLDERS = ("diffusion_models", "text_encoders", "vae")
log = logging.getLogger("ark")


def prepare_in_background() -> None:
    """Do it soon, in a thread of its own."""
    if os.environ.get("ARK_PREPARE") != "0":
        timer = threading.Timer(DELAY, prepare)
        timer.daemon = True
        timer.start()


def prepare() -> None:
    """Open what the loader would offer first, which warms CUDA up for its dimensions, and build the tokenizer meanwhile.

    What was compiled last is read, too, and if a model gets the fused engine, its matrices are measured and its kernels loaded.
    """
    try:
        device = comfy.model_management.get_torch_device()
        offered = {f: preferred(f, folder_paths.get_filename_list(f)) for f in FOLDERS}
        if device.type != "cuda" or any(not n or "ark_tiny" in n for n in offered.values()):
            klein_tokenizer()
            return
        transformer, text_encoder, vae = (folder_paths.get_full_path(*o) for o in offered.items())
        link_rate(device)
        model, _ = load_transformer(transformer, ahead=False)
        load_vae(vae, ahead=False)
        load_text_encoder(text_encoder, ahead=False)
        warm_up_attention(model, _busy)
        time.sleep(LATER)
        if not _busy():
            read_ahead()
        if not _busy() and engine_of(model, False, "bf16")[0] == "fused":
            choose_matrices(model, _busy)
            set_fused(set_attention(model, "auto")[0])  # which has its kernels loaded
    except Exception as error:  # whoever loads a model meets it again, and says so
        log.debug("Ark could not prepare (%s).", error)


def _busy() -> bool:
    """Whether the server runs a prompt."""
    server = getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)
    return server is not None and bool(server.prompt_queue.currently_running)
