"""Klein's tokenizer for diffusers: Qwen3's vocabulary, wherever it comes from, with Klein's chat template."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..toolkit.errors import ModelFileError

THINK, END_OF_THINK = 151667, 151668  # some vocabularies have other names for them
PAD = "<|endoftext|>"
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{{ '<|im_start|>assistant\nTHINK\n\nEND\n\n' }}"  # as text the last line break would be lost
)


def load_tokenizer(folder: Path) -> Any:
    """Build transformers' tokenizer from a folder; nothing is looked up elsewhere.

    Args:
        folder: with the vocabulary, see `toolkit.model_files.ModelFiles`.

    Returns:
        A tokenizer that the pipeline takes. A template that knows `enable_thinking` is Qwen3's own and stays.

    Raises:
        ModelFileError: the folder is damaged, or of another model.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)  # fmt: skip
        names = tokenizer.convert_ids_to_tokens([THINK, END_OF_THINK])
    except Exception as error:  # a damaged folder fails in ways of its own
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise ModelFileError(
            f"The tokenizer in {folder} cannot be read ({why}).",
            "Download it again.",
        ) from error
    if "enable_thinking" not in str(tokenizer.chat_template or ""):
        if None in names:
            raise ModelFileError(
                f"The tokenizer in {folder} is not Qwen3's.",
                "Name the folder of Klein's own.",
            )
        tokenizer.chat_template = TEMPLATE.replace("THINK", names[0]).replace("END", names[1])
        tokenizer.padding_side = "right"
    tokenizer.pad_token = tokenizer.pad_token or PAD
    return tokenizer
