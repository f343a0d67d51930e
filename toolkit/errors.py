"""Ark's exceptions: each says what is wrong and what to do about it."""

from __future__ import annotations


class ArkError(Exception):
    """An error whose text is for the user.

    Args:
        reason: what is wrong, one sentence.
        remedy: what to do about it, one sentence.
    """

    def __init__(self, reason: str, remedy: str):
        self.reason, self.remedy = reason, remedy
        super().__init__(f"{reason} {remedy}")


class ModelFileError(ArkError):
    """A model file is missing, damaged, or not the kind of file its slot needs."""


class TransferFailed(Exception):
    """One way of bringing a file to the device failed; its text says why, and another way may serve."""


class InputError(ArkError):
    """An input of a node is outside what the model can do."""


class KernelUnavailable(ArkError):
    """No attention kernel of the kind asked for can run here.

    Args:
        reasons: `{kernel: why it cannot run}`.
    """

    def __init__(self, reasons: dict[str, str]):
        self.reasons = reasons
        listed = "; ".join(f"{name}: {why}" for name, why in reasons.items())
        super().__init__(
            f"No such attention kernel can run here ({listed}).", "Choose 'auto' or another kernel."
        )
