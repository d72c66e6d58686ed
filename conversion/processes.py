"""The processes of one conversion: one, or those that `torchrun` or `accelerate launch` started.

Every process reads the data, holds both models and takes its rows of every batch. The main process alone writes. What
one process cannot do ends all of them, with the same sentence.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.state import AcceleratorState
from accelerate.utils import (
    DistributedType,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    ProjectConfiguration,
    broadcast_object_list,
    gather_object,
)

from hf_memory.conversion.schema import ConversionError


T = TypeVar("T")

# Processes wait while the main one evaluates and writes, which takes as long as it takes. That a process has ended is
# noticed by the launcher, not by a timeout.
PATIENCE = timedelta(days=7)
DATA_PARALLEL = ("NO", "MULTI_CPU", "MULTI_GPU", "MULTI_MLU", "MULTI_MUSA", "MULTI_NPU", "MULTI_XPU", "MULTI_HPU")


def make_accelerator(
    device: torch.device, dtype: torch.dtype, report_to: Sequence[str] = (), logs: Path | None = None
) -> Accelerator:
    """Device, precision, processes and trackers of a conversion.

    Args:
        device: As asked for; several processes on GPUs take one each.
        dtype: bfloat16 for autocast of float32 weights to it.
        report_to: Trackers, as accelerate names them.
        logs: Folder for trackers that write files.

    Raises:
        ConversionError: A tracker that is unknown or not installed, one device named for several processes, a launcher
            that shards the model, or half an environment of a launcher.
    """
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count > 1:
        check_launch(count, device)
    check_trackers(report_to)
    # A process may convert twice, in different precision; the state of accelerate is made for one.
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(
        cpu=device.type == "cpu",
        device_placement=False,
        mixed_precision="bf16" if dtype == torch.bfloat16 else "no",
        # Said here because the environment of a launcher would win over a default. The loop accumulates by itself.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        log_with=list(report_to) or None,
        project_config=ProjectConfiguration(logging_dir=None if logs is None else str(logs)),
        kwargs_handlers=[
            InitProcessGroupKwargs(timeout=PATIENCE),
            # An expert that no token of this process goes to has no gradient here.
            DistributedDataParallelKwargs(find_unused_parameters=True),
        ],
    )
    if accelerator.distributed_type.value not in DATA_PARALLEL:
        raise ConversionError(
            f"A conversion shares batches among processes and keeps models whole: launch it without "
            f"{accelerator.distributed_type.value}."
        )
    return accelerator


def check_launch(count: int, device: torch.device) -> None:
    """Refuse several processes that could not meet, or that would all sit on one GPU."""
    missing = [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise ConversionError(
            f"WORLD_SIZE is {count} but {missing[0]} is not set: start several processes with torchrun or accelerate "
            "launch, or unset WORLD_SIZE."
        )
    if device.index is not None:
        raise ConversionError(
            f"`device` {str(device)!r} is one device for {count} processes: name {device.type!r}, of which each "
            "process takes its own."
        )


def check_trackers(names: Sequence[str]) -> None:
    """Refuse trackers that accelerate does not know or cannot import."""
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    known = [str(name) for name in LOGGER_TYPE_TO_CLASS]
    available = [str(name) for name in get_available_trackers()]
    for name in names:
        if name not in known:
            raise ConversionError(f"`report_to` takes {', '.join(known)}, got {name!r}.")
        if name not in available:
            raise ConversionError(f"`report_to` names {name}, which is not installed: install it, or leave it out.")


def is_main_process() -> bool:
    """Whether this process is the one that speaks, as launchers number them."""
    return int(os.environ.get("WORLD_SIZE", "1")) == 1 or int(os.environ.get("RANK", "0")) == 0


def check_share(accelerator: Accelerator, label: str, batch_size: int) -> None:
    """Refuse a batch that processes cannot share evenly: the mean of their losses would not be that of the batch."""
    count = accelerator.num_processes
    if batch_size % count:
        raise ConversionError(
            f"`batch_size` {batch_size} of stage {label} cannot be shared evenly among {count} processes: give a "
            f"multiple of {count}."
        )


def place_of(accelerator: Accelerator, device: torch.device) -> torch.device:
    """Where this process computes, when `device` was asked for."""
    return device if accelerator.num_processes == 1 or device.type == "cpu" else accelerator.device


@contextmanager
def together(accelerator: Accelerator) -> Iterator[None]:
    """A part that ends in all processes when each has done it, or fails in all.

    Nothing inside may wait for another process.

    Raises:
        ConversionError: What went wrong in the first process in which something did; there it is its own error.
    """
    error = None
    try:
        yield
    except Exception as caught:  # whatever it is, the others must not wait for a process that is gone
        error = caught
    sentences = gathered(accelerator, None if error is None else sentence_of(error))
    if error is not None:
        raise error
    if any(sentences):
        raise ConversionError(next(filter(None, sentences)))


def sentence_of(error: Exception) -> str:
    """What other processes say about an error."""
    text = " ".join(str(error).split())
    return text if isinstance(error, ValueError) else f"{type(error).__name__}: {text}"


def gathered(accelerator: Accelerator, value: T) -> list[T]:
    """The values of all processes, in all of them."""
    return gather_object([value]) if accelerator.num_processes > 1 else [value]


def from_main(accelerator: Accelerator, value: T) -> T:
    """The main process's value, in all processes."""
    return broadcast_object_list([value])[0] if accelerator.num_processes > 1 else value


def check_equal(accelerator: Accelerator, what: str, value: T) -> None:
    """Raise one sentence in all processes unless the value is the same in all of them."""
    found = gathered(accelerator, value)
    if different := [number for number, other in enumerate(found) if other != found[0]]:
        raise ConversionError(
            f"Process {different[0]} has {what} other than the main process: all must see the same files."
        )


@contextmanager
def tracked(accelerator: Accelerator, name: str, settings: Mapping[str, Any]) -> Iterator[None]:
    """Trackers begin a run of this name with these settings, and end it."""
    accelerator.init_trackers(name, config=plain(settings))
    try:
        yield
    finally:
        # Not `end_training`, which parts the processes too.
        for tracker in accelerator.trackers:
            tracker.finish()
        accelerator.trackers.clear()


def plain(settings: Mapping[str, Any], where: str = "") -> dict[str, str | int | float | bool]:
    """Nested settings by one name each, as all trackers take them."""
    found = {}
    for key, value in settings.items():
        if isinstance(value, list) and value and isinstance(value[0], Mapping):
            for number, entry in enumerate(value):
                found |= plain(entry, f"{where}{key}.{number}.")
        elif isinstance(value, Mapping):
            found |= plain(value, f"{where}{key}.")
        elif value is not None:
            found[f"{where}{key}"] = value if isinstance(value, (str, int, float, bool)) else str(value)
    return found


def lost_another(error: RuntimeError) -> bool:
    """Whether an error only says that the connection to another process broke."""
    return isinstance(error, torch.distributed.DistError) or "gloo" in str(error)


def leave(accelerator: Accelerator) -> None:
    """Take leave of the other processes at the end of a conversion that went well."""
    if accelerator.distributed_type != DistributedType.NO:
        accelerator.wait_for_everyone()
        accelerator.state.destroy_process_group()
