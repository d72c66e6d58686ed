"""10,000 damaged memory files: each is refused with a sentence, or gives exactly the memory that was saved."""

import json
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load
from small import tensors_of, tiny

from hf_memory.memory_file import ModelFit, content_digest, read_memory


FILES = 10_000
NAMES = [
    "../../etc/passwd",
    "/etc/passwd",
    "C:\\x",
    "layers.0.conv/..",
    "",
    "a" * 300,
    "\0",
    "layers.99.conv",
    "__proto__",
]


def flip_bits(data: bytearray, rng: random.Random) -> bytearray:
    for _ in range(rng.choice((1, 1, 1, 2, 8))):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return data


def flip_header_bits(data: bytearray, rng: random.Random) -> bytearray:
    data[rng.randrange(8 + header_size(data))] ^= 1 << rng.randrange(8)
    return data


def truncate(data: bytearray, rng: random.Random) -> bytearray:
    return data[: rng.choice((rng.randrange(len(data)), len(data) - rng.randrange(1, 9), rng.randrange(16)))]


def extend(data: bytearray, rng: random.Random) -> bytearray:
    return data + rng.randbytes(rng.randrange(1, 64))


def move_a_block(data: bytearray, rng: random.Random) -> bytearray:
    size = rng.randrange(1, 64)
    source, target = (rng.randrange(len(data) - size) for _ in range(2))
    data[target : target + size] = data[source : source + size]
    return data


def delete_a_block(data: bytearray, rng: random.Random) -> bytearray:
    start = rng.randrange(len(data))
    return data[:start] + data[start + rng.randrange(1, 64) :]


def change_header_length(data: bytearray, rng: random.Random) -> bytearray:
    size = rng.choice((0, 1, header_size(data) - 1, header_size(data) + 1, 2**31, 2**63, rng.randrange(2**40)))
    return bytearray(size.to_bytes(8, "little")) + data[8:]


def change_shape(header: dict, rng: random.Random) -> None:
    entry = header[rng.choice(tensor_names(header))]
    change = rng.choice(("swap", "flatten", "negative", "huge", "extra", "zero"))
    shape = entry["shape"]
    if change == "swap":
        rng.shuffle(shape)
    elif change == "flatten":
        entry["shape"] = [torch.Size(shape).numel()]
    elif change == "extra":
        shape.append(1)
    else:
        shape[rng.randrange(len(shape))] = {"negative": -1, "huge": 2**62, "zero": 0}[change]


def change_dtype(header: dict, rng: random.Random) -> None:
    kinds = ("F32", "I32", "U32", "F64", "I64", "F16", "BF16", "U8", "BOOL", "F8_E4M3", "C64", "X1", "F4")
    header[rng.choice(tensor_names(header))]["dtype"] = rng.choice(kinds)


def change_offsets(header: dict, rng: random.Random) -> None:
    offsets = header[rng.choice(tensor_names(header))]["data_offsets"]
    offsets[rng.randrange(2)] += rng.choice((-4, 4, 1, 2**40, -(2**40)))


def exchange_tensors(header: dict, rng: random.Random) -> None:
    a, b = rng.sample(tensor_names(header), 2)
    header[a], header[b] = header[b], header[a]


def rename_a_tensor(header: dict, rng: random.Random) -> None:
    names = tensor_names(header)
    header[rng.choice((*NAMES, rng.choice(names)))] = header.pop(rng.choice(names))


def drop_a_tensor(header: dict, rng: random.Random) -> None:
    del header[rng.choice(tensor_names(header))]


def change_metadata(header: dict, rng: random.Random) -> None:
    metadata = header["__metadata__"]
    document = json.loads(metadata["hf_memory"])
    change = rng.randrange(9)
    if change == 0:
        document["tokens"] = rng.choice((0, -1, 62, 2**70, 1.5, "61", None, [], True))
    elif change == 1:
        document["format_version"] = rng.choice((0, 2, 10**30, "1", None, 1.0))
    elif change == 2:
        document["model"]["config"][rng.choice(list(document["model"]["config"]))] = rng.choice((None, 1, "x", [], {}))
    elif change == 3:
        document["model"]["weights"] = rng.choice((None, {}, [], {"dtype": "float32"}))
    elif change == 4:
        del document[rng.choice(list(document))]
    elif change == 5:
        document["notes"] = rng.choice(({"path": "../../etc/passwd"}, [], None, {"a": {"b": {}}}))
    elif change == 6:
        document["sha256"] = rng.choice(("", "0" * 64, document["sha256"].upper(), document["sha256"][:-1], 1, None))
    metadata["hf_memory"] = json.dumps(document, sort_keys=True)
    if change == 7:
        metadata["hf_memory"] = rng.choice(("", "{", "[" * 100_000, "1" * 5000, "null", "[]", '{"a": NaN}'))
    elif change == 8:
        header["__metadata__"] = rng.choice(({}, {"format": "pt"}, {"hf_memory": 1}, "text", None))


def in_header(change: Callable[[dict, random.Random], None]) -> Callable[[bytearray, random.Random], bytearray]:
    """A change of the file that is one of its header, tensor bytes left alone."""

    def mutate(data: bytearray, rng: random.Random) -> bytearray:
        size = header_size(data)
        header = json.loads(bytes(data[8 : 8 + size]))
        change(header, rng)
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        return bytearray(len(text).to_bytes(8, "little")) + text + data[8 + size :]

    mutate.__name__ = change.__name__
    return mutate


def signed(mutate: Callable[[bytearray, random.Random], bytearray]) -> Callable[[bytearray, random.Random], bytearray]:
    """The same damage by somebody who makes the hash right."""

    def mutate_and_sign(data: bytearray, rng: random.Random) -> bytearray:
        changed = mutate(data, rng)
        size = header_size(changed)
        header = json.loads(bytes(changed[8 : 8 + size]))
        try:
            fields = json.loads(header["__metadata__"]["hf_memory"])
            del fields["sha256"]
            fields["sha256"] = content_digest(fields, load(bytes(changed)))
        except Exception:
            return changed  # no safetensors file any more
        return in_header(lambda header, rng: header["__metadata__"].update(hf_memory=json.dumps(fields)))(changed, rng)

    mutate_and_sign.__name__ = f"{mutate.__name__} and sign"
    return mutate_and_sign


def header_size(data: bytearray) -> int:
    return int.from_bytes(data[:8], "little")


def tensor_names(header: dict) -> list[str]:
    return [name for name in header if name != "__metadata__"]


OF_BYTES = (flip_bits, flip_header_bits, truncate, extend, move_a_block, delete_a_block, change_header_length)
OF_HEADER = (
    change_shape, change_dtype, change_offsets, exchange_tensors, rename_a_tensor, drop_a_tensor, change_metadata,
)  # fmt: skip
# What changes the meaning of a signed file: other tensors of the right names and shapes would be another memory.
SIGNED = (change_shape, change_dtype, rename_a_tensor, drop_a_tensor)
MUTATIONS = (*OF_BYTES, *map(in_header, OF_HEADER), *(signed(in_header(change)) for change in SIGNED))


@pytest.mark.parametrize("variant", ["lmm", "mag"])
def test_damaged_files_are_refused_or_load_exactly(variant, tmp_path: Path):
    model = tiny(variant=variant, num_hidden_layers=1, memory_depth=1, hidden_size=16, num_persistent_tokens=0)
    fit = ModelFit(model)
    memory = model.read(torch.arange(61) % 50)
    original = memory.save_pretrained(tmp_path / "a.memory").read_bytes()
    expected, identity = tensors_of(memory), memory.model_identity
    rng, file = random.Random(0), tmp_path / "b.memory"
    outcomes: dict[str, Counter] = {mutate.__name__: Counter() for mutate in MUTATIONS}
    for number in range(FILES // 2):
        mutate = MUTATIONS[number % len(MUTATIONS)]
        file.write_bytes(mutate(bytearray(original), rng))
        try:
            back = read_memory(file, fit)
        except ValueError as error:
            assert str(error).startswith(str(file)) or "does not fit the model" in str(error)
            outcomes[mutate.__name__]["refused"] += 1
            continue
        outcomes[mutate.__name__]["loaded"] += 1
        assert all(map(torch.equal, tensors_of(back), expected)) and len(tensors_of(back)) == len(expected)
        assert back.model_identity == identity and int(back.seen_tokens) == 61 and back.notes == {}
    # Each kind of damage does damage: where a mutation changes nothing, or spaces in the header only, the file loads.
    assert all(outcome["refused"] > 0 for outcome in outcomes.values()), outcomes
    assert sum(outcome["loaded"] for outcome in outcomes.values()) < FILES // 20, outcomes
