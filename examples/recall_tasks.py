"""Tasks and models of `recall.py`: what a batch looks like, and models of equal numbers of parameters."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

import hf_memory  # noqa: F401  (registers the models)


TITANS = {"num_persistent_tokens": 0}
GATED_DELTA_RULE = {"memory_depth": 1, "chunk_size": 1, "memory_momentum": False, "decay_before_grad": True}
Fields = Callable[[int], dict]
MODELS: dict[str, tuple[str, Fields]] = {
    "softmax attention": ("llama", lambda width: {}),
    "gated delta rule": ("titans", lambda width: TITANS | GATED_DELTA_RULE),
    "Titans, matrix": ("titans", lambda width: TITANS | {"memory_depth": 1, "chunk_size": 1}),
    "Titans, two layers": ("titans", lambda width: TITANS | {"memory_depth": 2, "memory_expansion": 2}),
    "Lattice, m = d": ("lattice", lambda width: {}),
    "Lattice, m = d/4": ("lattice", lambda width: {"num_slots": width // 4}),
    # Fewer than 16 slots are chaotic (kernels/two_pass_slots/README.md).
    "Trellis": ("trellis", lambda width: {"num_slots": max(16, width)}),
    "Trellis, identity": ("trellis", lambda width: {"num_slots": max(16, width), "write_map": "identity"}),
    "sliding window": ("mistral", lambda width: {"sliding_window": 128}),
}
"""Type of a model, and its fields at a head width."""

TASKS = {
    "recall": [name for name in MODELS if name != "sliding window"],
    "passkey": ["gated delta rule", "Titans, matrix", "Titans, two layers", "sliding window"],
}
DEEP_CHUNK = {"recall": 8, "passkey": 64}
"""Gradient grid of the memory of two layers: inputs of 512 tokens would be 64 chunks of 8, one behind the other."""

REFERENCE = "Titans, two layers"
TOLERANCE = 0.02
DIGITS, NOISE, MARKER = 10, 32, 42
"""Passkey tokens: digits 0 to 9, noise 10 to 41, and the marker."""
KEY_LENGTH = 4
IGNORED = -100
END_OF_CALL = "end of the call"
"""Why a run was cut that is to be made again; it is in no average."""


@dataclass(frozen=True)
class Sizes:
    """Sizes of models and tasks.

    Attributes:
        hidden, layers: of the models.
        widths: of a head; `hidden` over the width is the number of heads. The first is the most wanted.
        pairs: of a key and a value in a row of `recall`.
        symbols: keys, and values, to choose from.
        context: tokens of a row of `passkey` in training.
        lengths: tokens at which it is asked.
        batch: tokens per step.
        steps: of training.
        held_out: tokens that each accuracy of `passkey` is measured on, and eight times those of `recall`.
    """

    hidden: int = 64
    layers: int = 2
    widths: tuple[int, ...] = (16, 8, 32)
    pairs: int = 16
    symbols: int = 64
    context: int = 512
    lengths: tuple[int, ...] = (512, 2048, 8192, 16384)
    batch: int = 4096
    steps: int = 1000
    held_out: int = 2**18


def recall_batch(sizes: Sizes, rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Tokens `[rows, 4 pairs]`, and labels that ask for the values of the second half only."""
    random = partial(torch.rand, generator=generator, device=generator.device)
    shape = rows, sizes.pairs
    keys = random(rows, sizes.symbols).argsort(1)[:, : sizes.pairs]
    values = sizes.symbols + (sizes.symbols * random(shape)).long()
    order = random(shape).argsort(1)
    asked = torch.stack([keys.gather(1, order), values.gather(1, order)], 2).flatten(1)
    ids = torch.cat([torch.stack([keys, values], 2).flatten(1), asked], 1)
    labels = torch.full_like(ids, IGNORED)
    labels[:, 2 * sizes.pairs + 1 :: 2] = asked[:, 1::2]
    return ids, labels


def passkey_batch(length: int, rows: int, generator: torch.Generator, times: int = 2) -> tuple[Tensor, Tensor]:
    """Tokens `[rows, length]` that show marker and digits `times` times, and labels that ask for all but the first.

    The last place is always the end, the others are random ones of the places that the row divides into.
    """
    device = generator.device
    draw = partial(torch.randint, generator=generator, device=device)
    ids = DIGITS + draw(NOISE, (rows, length))
    digits = draw(DIGITS, (rows, KEY_LENGTH))
    shown = torch.cat([torch.full((rows, 1), MARKER, device=device), digits], 1)
    places = length // (KEY_LENGTH + 1)
    earlier = torch.rand(rows, places - 1, generator=generator, device=device).argsort(1)[:, : times - 1]
    place = torch.cat([earlier.sort(1).values, torch.full((rows, 1), places - 1, device=device)], 1)
    first = length - (KEY_LENGTH + 1) * (places - place)
    where = first[..., None] + torch.arange(KEY_LENGTH + 1, device=device)
    ids.scatter_(1, where.flatten(1), shown.repeat(1, times))
    labels = torch.full_like(ids, IGNORED)
    labels.scatter_(1, where[:, 1:, 1:].flatten(1), digits.repeat(1, times - 1))
    return ids, labels


def batch_of(task: str, sizes: Sizes, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A batch to train on, on the device of the generator."""
    if task == "recall":
        return recall_batch(sizes, sizes.batch // (4 * sizes.pairs), generator)
    rows, context = sizes.batch // sizes.context, sizes.context
    # Four answers in 512 tokens are little to learn from: half of the rows show the passkey in every other place that
    # there is, the other half as the test does.
    often = context // (KEY_LENGTH + 1) // 2
    halves = [passkey_batch(context, rows // 2, generator), passkey_batch(context, rows - rows // 2, generator, often)]
    return tuple(torch.cat(parts) for parts in zip(*halves))


def make_config(name: str, task: str, width: int, sizes: Sizes, intermediate: int) -> PreTrainedConfig:
    """Configuration of one of `MODELS` with heads of a width."""
    model_type, fields = MODELS[name]
    heads = sizes.hidden // width
    extra = dict(fields(width))
    if model_type in ("llama", "mistral"):
        extra["num_key_value_heads"] = heads
    if extra.get("memory_depth") == 2:
        extra["chunk_size"] = DEEP_CHUNK[task]
    return AutoConfig.for_model(
        model_type,
        vocab_size=2 * sizes.symbols if task == "recall" else MARKER + 1,
        hidden_size=sizes.hidden,
        intermediate_size=intermediate,
        num_hidden_layers=sizes.layers,
        num_attention_heads=heads,
        head_dim=width,
        max_position_embeddings=max(sizes.lengths),
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        **extra,
    )


def matched_config(name: str, task: str, width: int, sizes: Sizes) -> PreTrainedConfig:
    """The configuration whose MLP makes the number of parameters that of `REFERENCE`, within 2 %."""

    def count(model: str, intermediate: int) -> int:
        with torch.device("meta"):
            config = make_config(model, task, width, sizes, intermediate)
            return AutoModelForCausalLM.from_config(config).num_parameters()

    target = count(REFERENCE, 2 * sizes.hidden)
    low, high = count(name, 8), count(name, 16)
    intermediate = 8 + round((target - low) / ((high - low) / 8))
    off = count(name, intermediate) / target - 1
    if abs(off) > TOLERANCE:
        raise ValueError(f"No MLP width gives {name} {target} parameters, the closest is {off:+.1%} off.")
    return make_config(name, task, width, sizes, intermediate)
