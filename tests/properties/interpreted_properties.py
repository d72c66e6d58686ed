"""The property suite with every op in its Triton form; `test_interpreted_properties.py` runs this file."""

from hf_memory.evaluation import PROPERTIES, Budget, check_model
from hf_memory.evaluation.properties_tiny import random_model, tiny_config
from hf_memory.kernels import force_form


# Sizes at which the interpreter, a thousand times slower than a kernel, ends in a minute.
TINY = {
    "vocab_size": 64, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1,
    "head_dim": 16, "num_persistent_tokens": 0,
}  # fmt: skip
# These force forms themselves, or compile a model whose kernels the interpreter would have to run.
OTHER = ["forms", "static_cache"]
# Of a deep memory, whose kernels the interpreter needs ten times as long for, one of each kind.
OF_EACH_KIND = ["split_invariance", "left_padding", "beam_search", "gradient_checkpointing"]


def check(properties: list[str], model_type: str = "titans", **memory) -> None:
    sizes = TINY if model_type == "titans" else {n: x for n, x in TINY.items() if n != "num_persistent_tokens"}
    model = random_model(tiny_config(model_type, **sizes, chunk_size=4, **memory))
    budget = Budget(splits=1, new_tokens=2, long_tokens=64, walk_steps=6, walk_length=16)
    with force_form("triton"):
        report = check_model(model, properties, budget)
    allowed = {("assisted_decoding", "refused")}
    unexpected = [r for r in report.results if r.status != "pass" and (r.name, r.status) not in allowed]
    assert not unexpected, "\n".join(map(str, unexpected))


def test_linear():
    check([name for name in PROPERTIES if name not in OTHER], memory_depth=1)


def test_deep():
    check(OF_EACH_KIND, memory_depth=2, memory_expansion=2)


def test_trellis():
    check([name for name in PROPERTIES if name not in OTHER], "trellis", num_slots=16)
