"""Train the byte-level Llama that the demo converts, on the sources of Python's standard library.

Whole packages are held out. The schedule runs on a clock: the learning rate stays flat and falls to zero over the
last third of `--minutes`, and the blocks grow from 256 bytes to the full context, so that a slow machine ends with a
finished model too. Two single-threaded processes share the work of two cores:

OMP_NUM_THREADS=1 torchrun --nproc_per_node 2 examples/train_demo_teacher.py --minutes 100 --output runs/teacher

A checkpoint is written every five minutes; the same command continues from it. A GPU has time for a larger teacher:

python examples/train_demo_teacher.py --device cuda --size 512x8x8 --packages --tokens-per-step 65536 --minutes 5
"""

import json
import lzma
import math
import os
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import torch.distributed as dist
import typer
from rich.progress import Progress
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from stdlib_text import END, TABLES, byte_tokenizer, fingerprint, read, source_files
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, set_seed


CONTEXT = 2048
TOKENS_PER_STEP = 8192
# Share of the run at which blocks get longer, and how long they then are: a long past is learnt late and costs most.
BLOCKS = ((0.0, 256), (0.45, 1024), (0.75, CONTEXT))
DECAY_FROM = 0.65
MATRIX_LR = 0.02
OTHER_LR = 3e-3
CHECKPOINT_SECONDS = 300


def teacher_config(size: str = "256x4x4") -> LlamaConfig:
    """Two query heads for each key head: 2.4 million parameters by default, 20 million at 512x8x8."""
    hidden, layers, heads = map(int, size.split("x"))
    return LlamaConfig(
        vocab_size=256,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        head_dim=hidden // heads,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=END,
        eos_token_id=END,
        pad_token_id=END,
    )


class Muon:
    """Momentum whose step is made orthogonal (Jordan et al. 2024) for matrices.

    `torch.optim.Muon` computes the orthogonal factor in bfloat16, which doubled the time of a step on a CPU without
    such units; this one stays in float32 and shares the matrices among the processes.
    """

    def __init__(self, matrices: list[torch.Tensor], momentum: float = 0.95) -> None:
        self.matrices, self.momentum = matrices, momentum
        self.buffers = [torch.zeros_like(matrix) for matrix in matrices]

    @torch.no_grad()
    def step(self, lr: float, rank: int, processes: int) -> None:
        updates = [torch.zeros_like(matrix) for matrix in self.matrices]
        for index, (matrix, buffer) in enumerate(zip(self.matrices, self.buffers, strict=True)):
            buffer.lerp_(matrix.grad, 1 - self.momentum)
            if index % processes == rank:
                scale = math.sqrt(max(1.0, matrix.shape[0] / matrix.shape[1]))
                updates[index].copy_(orthogonal(torch.lerp(matrix.grad, buffer, self.momentum)) * scale)
        reduce(updates, 1)
        for matrix, update in zip(self.matrices, updates, strict=True):
            matrix.add_(update, alpha=-lr)


def orthogonal(matrix: torch.Tensor) -> torch.Tensor:
    """Nearly orthogonal factor of a matrix by five quintic Newton-Schulz steps, `[M, N]`."""
    flip = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if flip else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.T if flip else x


def reduce(tensors: list[torch.Tensor], divisor: int) -> None:
    """Sum over the processes divided by `divisor`, in place."""
    if not dist.is_initialized():
        return
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(flat)
    for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor)).div_(divisor)


def training_text(packages: bool = False) -> np.ndarray:
    files, _ = source_files(packages)
    return read([path for path in files if path.parent.name != TABLES], end=bytes([END]))


def batch(text: np.ndarray, tokens: int, step: int, share: float, rank: int, processes: int) -> torch.Tensor:
    """This process's blocks of a step of so many tokens, `[B, T + 1]`."""
    length = [size for start, size in BLOCKS if share >= start][-1]
    rows = tokens // length // processes
    draw = np.random.default_rng((step, rank))
    starts = draw.integers(0, len(text) - length - 1, rows)
    return torch.from_numpy(np.stack([text[start : start + length + 1] for start in starts]).astype(np.int64))


def loss_of(model: LlamaForCausalLM, blocks: torch.Tensor) -> torch.Tensor:
    blocks = blocks.to(model.device)
    with torch.autocast("cuda", torch.bfloat16, enabled=model.device.type == "cuda"):
        logits = model(blocks[:, :-1], use_cache=False).logits
    return functional.cross_entropy(logits.float().flatten(0, 1), blocks[:, 1:].flatten())


@torch.no_grad()
def held_out_bits(model: LlamaForCausalLM, blocks: int) -> float:
    """Bits per byte over evenly spread held-out blocks of the full context."""
    text = read(source_files()[1], end=bytes([END]))
    starts = np.linspace(0, len(text) - CONTEXT - 1, blocks).astype(int)
    rows = torch.from_numpy(np.stack([text[start : start + CONTEXT + 1] for start in starts]).astype(np.int64))
    return sum(loss_of(model, row[None]).item() for row in rows) / blocks / math.log(2)


def save_checkpoint(path: Path, model: LlamaForCausalLM, muon: Muon, adam: torch.optim.Adam, progress: dict) -> None:
    tensors = {f"model.{name}": value for name, value in model.named_parameters()}
    tensors |= {f"muon.{index}": value for index, value in enumerate(muon.buffers)}
    for index, state in enumerate(adam.state.values()):
        tensors |= {f"adam.{index}.{name}": value for name, value in state.items()}
    beside = path.with_suffix(".part")
    save_file(
        {name: value.detach().contiguous() for name, value in tensors.items()}, beside, {"at": json.dumps(progress)}
    )
    beside.replace(path)


def load_checkpoint(path: Path, model: LlamaForCausalLM, muon: Muon, adam: torch.optim.Adam) -> dict:
    tensors = load_file(path, str(model.device))
    with torch.no_grad():
        for name, value in model.named_parameters():
            value.copy_(tensors[f"model.{name}"])
        for index, buffer in enumerate(muon.buffers):
            buffer.copy_(tensors[f"muon.{index}"])
    for index, parameter in enumerate(adam.param_groups[0]["params"]):
        prefix = f"adam.{index}."
        adam.state[parameter] = {n.removeprefix(prefix): v for n, v in tensors.items() if n.startswith(prefix)}
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["at"])


def save_model(model: LlamaForCausalLM, folder: Path) -> None:
    """The finished model in bfloat16 with its tokenizer, as `from_pretrained` reads them."""
    model.to(torch.bfloat16).save_pretrained(folder)
    byte_tokenizer(CONTEXT).save_pretrained(folder)


def main(
    minutes: Annotated[float, typer.Option(help="How long to train, spread over restarts")] = 100,
    output: Annotated[Path, typer.Option(help="Where checkpoint, log and model go")] = Path("runs/teacher"),
    seed: Annotated[int, typer.Option()] = 0,
    size: Annotated[str, typer.Option(help="HIDDENxLAYERSxHEADS")] = "256x4x4",
    packages: Annotated[bool, typer.Option("--packages", help="Read the installed packages too")] = False,
    tokens_per_step: Annotated[int, typer.Option()] = TOKENS_PER_STEP,
    device: Annotated[str, typer.Option(help="cpu or cuda; a GPU computes in bfloat16")] = "cpu",
) -> None:
    rank, processes = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if processes > 1:
        dist.init_process_group("gloo")
    set_seed(seed)
    output.mkdir(parents=True, exist_ok=True)
    text = training_text(packages)
    model = LlamaForCausalLM(teacher_config(size)).to(device)
    matrices = [parameter for parameter in model.model.layers.parameters() if parameter.ndim == 2]
    others = [parameter for parameter in model.parameters() if all(parameter is not matrix for matrix in matrices)]
    muon, adam = Muon(matrices), torch.optim.Adam(others, lr=OTHER_LR, betas=(0.9, 0.95))
    at = {"step": 0, "seconds": 0.0, "bytes": 0}
    if (output / "checkpoint.safetensors").exists():
        at = load_checkpoint(output / "checkpoint.safetensors", model, muon, adam)
    log = (output / "log.jsonl").open("a") if rank == 0 else None
    if rank == 0 and not at["step"]:
        held_out = b"".join(path.read_bytes() for path in source_files()[1])
        bits = 8 * len(lzma.compress(held_out, preset=9 | lzma.PRESET_EXTREME)) / len(held_out)
        first = {"training_bytes": len(text), "training_text": fingerprint(text), "parameters": model.num_parameters()}
        print(json.dumps(first | {"held_out_xz_9e": round(bits, 4)}), file=log, flush=True)
    start = time.monotonic() - at["seconds"]
    saved, recent = at["seconds"], []
    with Progress(disable=rank > 0) as bar:
        task = bar.add_task("Training", total=1.0)
        while True:
            # The clock of the first process decides for all.
            share = torch.tensor((time.monotonic() - start) / (60 * minutes))
            if processes > 1:
                dist.broadcast(share, 0)
            share = share.item()
            if share >= 1:
                break
            loss = loss_of(model, batch(text, tokens_per_step, at["step"], share, rank, processes))
            model.zero_grad()
            loss.backward()
            reduce([parameter.grad for parameter in model.parameters()], processes)
            fall = min(1.0, (1 - share) / (1 - DECAY_FROM))
            muon.step(MATRIX_LR * fall, rank, processes)
            adam.param_groups[0]["lr"] = OTHER_LR * fall
            adam.step()
            recent.append(loss.item() / math.log(2))
            at = {"step": at["step"] + 1, "seconds": time.monotonic() - start, "bytes": at["bytes"] + tokens_per_step}
            bar.update(task, completed=share, description=f"Training, {recent[-1]:.2f} bits/byte")
            if rank == 0 and at["step"] % 50 == 0:
                row = at | {"train_bits": round(sum(recent) / len(recent), 4)}
                if at["seconds"] - saved > CHECKPOINT_SECONDS:
                    row["held_out_bits"] = round(held_out_bits(model, 8), 4)
                    save_checkpoint(output / "checkpoint.safetensors", model, muon, adam, at)
                    saved = at["seconds"]
                print(json.dumps(row | {"seconds": round(at["seconds"])}), file=log, flush=True)
                recent = []
    if rank == 0:
        row = at | {"held_out_bits": round(held_out_bits(model, 64), 4), "seconds": round(at["seconds"])}
        print(json.dumps(row), file=log, flush=True)
        save_model(model, output / "model")
    if processes > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    typer.run(main)
