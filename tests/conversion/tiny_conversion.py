"""A teacher and a text so small that a whole conversion takes a second."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

from hf_memory.conversion.recipe import Recipe, read_recipe
from hf_memory.evaluation.properties_generation import byte_tokenizer
from hf_memory.evaluation.properties_tiny import random_model, tiny_config


CONTEXT, STEPS = 16, 6


def save_teacher(folder: Path, dtype: torch.dtype = torch.float32, **fields: Any) -> Path:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "max_position_embeddings": 64}
    config = tiny_config("llama", **(sizes | {"head_dim": 8, "vocab_size": 260} | fields))
    random_model(config).to(dtype).save_pretrained(folder)
    tokenizer = byte_tokenizer(260)
    tokenizer.chat_template = "{{ messages[0].content }}"
    tokenizer.save_pretrained(folder)
    return folder


def random_teacher() -> PreTrainedModel:
    """Three layers in float32 that nobody trained, frozen."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "head_dim": 8, "vocab_size": 64}
    return random_model(tiny_config("llama", **sizes)).requires_grad_(False)


def save_text(file: Path, lines: int = 120) -> Path:
    file.write_text("".join(f"{n} times {n} is {n * n}, they say.\n" for n in range(lines)), encoding="utf-8")
    return file


def tiny_recipe(teacher: Path, data: Path | None, output: Path, **flags: Any) -> Recipe:
    values = {"layers": "1", "context": CONTEXT, "batch_size": 2, "tokens": STEPS * 2 * CONTEXT, "device": "cpu"}
    values |= {"held_out_blocks": 2, "code": False, "memory_options": {"memory_depth": 1, "chunk_size": 8}}
    names = {"teacher": str(teacher), "output": str(output), "data": None if data is None else str(data)}
    return read_recipe(flags=values | names | flags)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")
