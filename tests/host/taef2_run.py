"""Run inside a host's Python path: `taef2_run.py HOST PACK_PARENT FILE`; writes a taef2 decoder that paints all red, if the host knows one."""

import sys
from pathlib import Path

host, _, file = (Path(arg) for arg in sys.argv[1:4])
sys.argv = sys.argv[:1]
sys.path.insert(0, str(host))
from comfy.cli_args import args  # noqa: E402

args.cpu = True
import torch  # noqa: E402
from comfy.latent_formats import Flux2  # noqa: E402
from comfy.taesd import taesd  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

if Flux2().taesd_decoder_name is not None:  # 0.3.75 has none
    weights = {name: torch.zeros_like(weight) for name, weight in taesd.DecoderFlux2().state_dict().items()}  # fmt: skip
    last = max((name for name in weights if name.endswith(".bias") and "." not in name[:-5]), key=lambda name: int(name[:-5]))  # fmt: skip
    weights[last] = torch.tensor([1.0, -1.0, -1.0])
    save_file(weights, file)
    print("known")
