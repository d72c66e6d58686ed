"""Teachers that are spread over devices, lie on disk in part, or are held in 8 or 4 bits."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import align_module_device, has_offloaded_params
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_memory._cli.loading import load_model
from hf_memory.conversion.schema import ConversionError
from hf_memory.models.hybrid.modeling_hybrid import decoder_layers


def check_bits(bits: int | None) -> None:
    """Nothing where a teacher can be held in so many bits.

    Raises:
        ConversionError: bitsandbytes is not installed.
    """
    if bits is not None and find_spec("bitsandbytes") is None:
        raise ConversionError(
            f"`teacher_bits` {bits} needs the package bitsandbytes, which is not installed: install it, or leave "
            "`teacher_bits` out."
        )


def load_teacher(
    source: str,
    device: torch.device,
    dtype: str,
    *,
    device_map: str | dict[str, Any] | None = None,
    bits: int | None = None,
    offload: Path | None = None,
    trust_remote_code: bool = False,
    revision: str | None = None,
) -> PreTrainedModel:
    """A frozen teacher to read with.

    Args:
        source: Folder or Hub id.
        device: Where it goes without `device_map`, and what it computes on with `bits`.
        dtype: Name of a dtype, or `"auto"`.
        device_map: As of `from_pretrained`: a word of accelerate's, or devices by module, `"disk"` among them.
        bits: 8 or 4, through bitsandbytes. Default: none.
        offload: Folder for what lies on disk, where the checkpoint itself cannot be read from there.
        trust_remote_code: Run code that comes with the teacher.
        revision: Of a Hub id.

    Raises:
        ConversionError: bitsandbytes is missing, or the placement does not fit.
        UserError: The teacher cannot be loaded.
    """
    origin = (trust_remote_code, revision)
    if device_map is None and bits is None:
        return load_model(source, str(device), dtype, *origin).requires_grad_(False)
    check_bits(bits)
    settings: dict[str, Any] = {"device_map": device_map or {"": str(device)}}
    if offload is not None:
        settings["offload_folder"] = str(offload)
    if bits is not None:
        from transformers import BitsAndBytesConfig

        settings["quantization_config"] = BitsAndBytesConfig(load_in_8bit=bits == 8, load_in_4bit=bits == 4)
    try:
        model = load_model(source, str(device), dtype, *origin, **settings).requires_grad_(False)
    except (ValueError, RuntimeError) as error:
        raise ConversionError(
            f"The teacher cannot be placed as `device_map` {device_map!r} and `teacher_bits` {bits!r} say: "
            f"{' '.join(str(error).split())}"
        ) from error
    if model.device.type == "meta":
        raise ConversionError(
            "`device_map` leaves the teacher's embedding on disk: place it on a device, and only layers on disk, or "
            "set `stream`, which does that."
        )
    return model


@contextmanager
def fetched(module: nn.Module) -> Iterator[None]:
    """Inside the context, the weights of a module and its parts are there, wherever they lie otherwise."""
    with ExitStack() as stack:
        for part in module.modules():
            if has_offloaded_params(part):
                stack.enter_context(align_module_device(part))
        yield


def values(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Names and values of a model's tensors as in `state_dict`; what lies on disk is read one tensor at a time."""
    for name, value in model.state_dict().items():
        if not value.is_meta:
            yield name, value
            continue
        path, _, leaf = name.rpartition(".")
        hook = getattr(model.get_submodule(path), "_hf_hook", None)
        # Without a hook the whole model is one without values.
        yield name, value if hook is None else hook.weights_map[leaf]


def layers_on_disk(skeleton: PreTrainedModel, device: torch.device) -> dict[str, str]:
    """A `device_map` by which decoder layers stay on disk until they are called, one at a time.

    Args:
        skeleton: The teacher without values.
        device: Of all else.
    """
    layers, placed = decoder_layers(skeleton), {}

    def place(module: nn.Module, path: str) -> None:
        for name, child in module.named_children():
            if child is layers:
                placed.update({f"{path}{name}.{index}": "disk" for index in range(len(layers))})
            elif any(part is layers for part in child.modules()):
                place(child, f"{path}{name}.")
            else:
                placed[path + name] = str(device)

    place(skeleton, "")
    return placed
