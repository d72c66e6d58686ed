"""Keeping autocast out of what must stay in float32."""

from contextlib import AbstractContextManager, nullcontext

import torch


def without_autocast(device: torch.device) -> AbstractContextManager:
    """Context in which autocast is off for a device (the meta device, which has none, included)."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)
