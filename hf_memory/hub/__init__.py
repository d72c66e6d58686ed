"""Model folders: what they need beside the weights so that others can use them."""

from hf_memory.hub.remote_code import export_remote_code


__all__ = ["export_remote_code"]
