"""The property suite with every op in its Triton form; `test_interpreted_properties.py` runs this file."""

from hf_memory.evaluation import PROPERTIES, Budget, check_model
from hf_memory.evaluation.properties_tiny import random_model, tiny_config
from hf_memory.kernels import force_form


# Sizes at which the interpreter, a thousand times slower than a kernel, ends in a minute.
TINY = {
    "vocab_size": 64, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1,
    "head_dim": 16,
}  # fmt: skip
# These force forms themselves, or compile a model whose kernels the interpreter would have to run.
OTHER = ["forms", "static_cache"]
# Of memories whose kernels the interpreter needs much longer for, one of each kind.
OF_EACH_KIND = ["split_invariance", "left_padding", "beam_search", "gradient_checkpointing"]
# What a decoded token can spoil: rows that stand still, and rows of different phases.
DECODED = ["idle_rows", "batched_generation"]


def check(properties: list[str], model_type: str, **memory) -> None:
    model = random_model(tiny_config(model_type, **TINY, chunk_size=4, **memory))
    budget = Budget(splits=1, new_tokens=2, long_tokens=64, walk_steps=6, walk_length=16)
    with force_form("triton"):
        report = check_model(model, properties, budget)
    allowed = {("assisted_decoding", "refused")}
    unexpected = [r for r in report.results if r.status != "pass" and (r.name, r.status) not in allowed]
    assert not unexpected, "\n".join(map(str, unexpected))


def test_linear():
    check([name for name in PROPERTIES if name not in OTHER], "titans", num_persistent_tokens=0, memory_depth=1)


def test_deep():
    check(OF_EACH_KIND, "titans", num_persistent_tokens=0, memory_depth=2, memory_expansion=2)


def test_trellis():
    check([*OF_EACH_KIND, *DECODED], "trellis", num_slots=16)
