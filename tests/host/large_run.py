"""Run inside a host's Python path: `large_run.py HOST PACK_PARENT OUT`; opens Klein 9B and its Qwen3-8B of true size, as JSON.

The files are sparse: the headers are whole, the weights are holes of the file system that read as zeros.
"""

import json
import math
import sys
from pathlib import Path

host, pack_parent, out = (Path(arg) for arg in sys.argv[1:4])
sys.argv = sys.argv[:1]
sys.path.insert(0, str(host))
from comfy.cli_args import args  # noqa: E402

args.cpu = True
import torch  # noqa: E402

sys.path.append(str(pack_parent))
from ark.benchmarks.models import text_encoder_shapes, transformer_shapes  # noqa: E402
from ark.patches.text_encoder import klein_tokenizer, load_text_encoder  # noqa: E402
from ark.patches.transformer import load_transformer  # noqa: E402
from ark.toolkit.architecture import check_match  # noqa: E402


def write_sparse(path: Path, shapes: dict[str, tuple[int, ...]]) -> Path:
    """A bf16 safetensors file whose weights take no room."""
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return path


def anonymous() -> int:
    """Bytes of memory that belong to this process alone."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("RssAnon:")[1].split()[0])


transformer = write_sparse(
    out.with_name("klein-9b.safetensors"), transformer_shapes(4096, 8, 24, 12288)
)
text = write_sparse(
    out.with_name("qwen_3_8b.safetensors"),
    text_encoder_shapes(hidden=4096, mlp=12288, heads=32, kv=8),
)
klein_tokenizer()
before = anonymous()
with torch.inference_mode():
    model, dims = load_transformer(transformer)
    clip, clip_dims = load_text_encoder(text)
check_match(dims, clip_dims, text.name)
flux, qwen = model.model.diffusion_model, clip.cond_stage_model.qwen3_4b.transformer.model
out.write_text(
    json.dumps(
        {
            "gigabytes": (transformer.stat().st_size + text.stat().st_size) / 1e9,
            "anonymous_gigabytes": (anonymous() - before) / 1e9,
            "transformer": [dims.hidden_size, len(flux.double_blocks), len(flux.single_blocks)],
            "heads": flux.double_blocks[0].num_heads,
            "conditioning": dims.context_dim,
            "text_encoder": [clip_dims.hidden_size, len(qwen.layers)],
            "mapped": [len(p.masters.origins) for p in (model, clip.patcher)],
        }
    )
)
