"""Run conversions in one process and in two, each a fork of this one, which has imported the libraries already.

Run as `python several_processes.py PORT PROCESSES:RECIPE[:FAULT] ...`. A conversion that fails prints its sentence,
and every run prints how its processes ended.
"""

import os
import sys
import time
from collections.abc import Callable

import torch

from hf_memory.conversion import run, training
from hf_memory.conversion.recipe import ConversionError, read_recipe


def unreadable(*args: object) -> None:
    raise ConversionError("The data is on another machine.")


def lost(self: object, step: int) -> str:
    if step == 3:
        os._exit(9)
    return original_step(self, step)


def asked(self: object, step: int) -> str:
    self.interruption.asked = step == 3
    return original_step(self, step)


def nan(self: object, step: int) -> str:
    if step == 3:
        self.stage.student.model.layers[1].mlp.register_forward_hook(
            lambda module, args, output: output * float("nan")
        )
    return original_step(self, step)


# What goes wrong in process 1, alone.
FAULTS = {"unreadable": (run, "load_corpus", unreadable)}
FAULTS |= {step.__name__: (training._Loop, "step", step) for step in (lost, asked, nan)}
original_step = training._Loop.step


def in_processes(count: int, port: int, work: Callable[[int], int]) -> list[int]:
    """Exit codes `work(index)` of so many processes with the environment of a launcher."""
    children = []
    for index in range(count):
        child = os.fork()
        if child == 0:
            if count > 1:
                os.environ |= {"WORLD_SIZE": str(count), "RANK": str(index), "LOCAL_RANK": str(index)}
                os.environ |= {"LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            code = work(index)
            sys.stdout.flush()
            os._exit(code)
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def convert(recipe_file: str, fault: str, index: int) -> int:
    if fault and index == 1:
        setattr(*FAULTS[fault])
    try:
        run.convert(read_recipe(recipe_file))
    except ConversionError as error:
        print(f"{index}: {error}", flush=True)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    for number, argument in enumerate(sys.argv[2:]):
        count, recipe_file, fault = [*argument.split(":"), ""][:3]
        began = time.monotonic()
        codes = in_processes(
            int(count),
            int(sys.argv[1]) + number,
            lambda index, file=recipe_file, fault=fault: convert(file, fault, index),
        )
        print(f"ended {argument} {codes} after {time.monotonic() - began:.1f} s", flush=True)
