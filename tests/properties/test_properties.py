"""The property suite on every registered architecture."""

import copy

import pytest
import torch
from tiny import tiny_configs
from transformers import PreTrainedModel

from hf_memory.evaluation import PROPERTIES, Budget, check_model
from hf_memory.evaluation.properties_tiny import random_model
from hf_memory.models import ARCHITECTURES


# Properties whose code the options of an architecture hardly touch run on one configuration in seven.
SELECTED = ["sampling", "beam_search", "batched_generation", "assisted_decoding", "static_cache", "text_pipeline",
            "cache_repeat", "cache_select", "cache_reset", "cache_fork", "cache_crop", "random_walk",
            "meta_init"]  # fmt: skip
COMMON = [name for name in PROPERTIES if name not in SELECTED]
# The one property that an architecture may answer with a refusal.
MAY_REFUSE = "assisted_decoding"
WALK_STEPS = 2000

MODEL_TYPES = [*ARCHITECTURES, "memory_hybrid"]
CONFIGS = {
    f"{model_type}-{name}": config for model_type in MODEL_TYPES for name, config in tiny_configs(model_type).items()
}
EXPENSIVE = list(CONFIGS)[::7]


def live(name: str) -> PreTrainedModel:
    """A model whose learned starts, gates and norms are away from the neutral values some of them begin at."""
    model = random_model(copy.deepcopy(CONFIGS[name]))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
            if name.endswith("scale"):  # of a memory beside attention, which starts by adding nothing
                parameter.add_(1)
    return model


def check(name: str, properties: list[str], budget: Budget) -> None:
    report = check_model(live(name), properties, budget)
    allowed = {"pass": PROPERTIES, "refused": [MAY_REFUSE]}
    unexpected = [result for result in report.results if result.name not in allowed.get(result.status, [])]
    assert not unexpected, "\n".join(map(str, unexpected))


def test_every_architecture_takes_part():
    assert ARCHITECTURES and {name.split("-")[0] for name in CONFIGS} == set(MODEL_TYPES)
    kinds = [{getattr(CONFIGS[name], "variant", None) for name in names} for names in (CONFIGS, EXPENSIVE)]
    assert kinds[0] == kinds[1], "every variant takes part in the expensive properties"


@pytest.mark.parametrize("name", CONFIGS)
def test_common_properties(name):
    check(name, COMMON, Budget(splits=1, new_tokens=5, long_tokens=128))


@pytest.mark.parametrize("name", EXPENSIVE)
def test_expensive_properties(name):
    steps = WALK_STEPS // len(EXPENSIVE)
    check(name, [*SELECTED, "autocast"], Budget(new_tokens=5, long_tokens=1024, walk_steps=steps))


# On the same few: a deep memory that forgets towards zero amplifies rounding beyond the tolerance of a walk this long.
@pytest.mark.slow
@pytest.mark.parametrize("name", EXPENSIVE)
def test_everything_at_length(name):
    check(name, list(PROPERTIES), Budget(splits=10, new_tokens=20, long_tokens=4096, walk_steps=WALK_STEPS))
