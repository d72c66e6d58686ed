"""Memory-recurrent language models for Hugging Face transformers.

`import hf_memory` makes every architecture known to `AutoConfig`, `AutoModel`, `AutoModelForCausalLM` and
`AutoModelForSequenceClassification`. Ops are in `hf_memory.kernels`, conversion of pretrained models in
`hf_memory.conversion`.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from hf_memory.models import ARCHITECTURES
from hf_memory.registration import register_architectures


if TYPE_CHECKING:
    from hf_memory.cache import MemoryCache
    from hf_memory.compression.cache import PolarQuantCache, SubGenCache
    from hf_memory.models.lattice.configuration_lattice import LatticeConfig
    from hf_memory.models.lattice.modeling_lattice import (
        LatticeCache,
        LatticeForCausalLM,
        LatticeForSequenceClassification,
        LatticeModel,
    )
    from hf_memory.models.titans.configuration_titans import TitansConfig
    from hf_memory.models.titans.modeling_titans import (
        TitansCache,
        TitansForCausalLM,
        TitansForSequenceClassification,
        TitansModel,
    )
    from hf_memory.models.trellis.configuration_trellis import TrellisConfig
    from hf_memory.models.trellis.modeling_trellis import (
        TrellisCache,
        TrellisForCausalLM,
        TrellisForSequenceClassification,
        TrellisModel,
    )

__version__ = "0.1.0.dev0"

__all__ = [
    "LatticeCache",
    "LatticeConfig",
    "LatticeForCausalLM",
    "LatticeForSequenceClassification",
    "LatticeModel",
    "MemoryCache",
    "PolarQuantCache",
    "SubGenCache",
    "TitansCache",
    "TitansConfig",
    "TitansForCausalLM",
    "TitansForSequenceClassification",
    "TitansModel",
    "TrellisCache",
    "TrellisConfig",
    "TrellisForCausalLM",
    "TrellisForSequenceClassification",
    "TrellisModel",
    "__version__",
]


def _public_names() -> dict[str, str]:
    """Public name -> module that defines it."""
    modules = {"MemoryCache": "hf_memory.cache"}
    modules |= dict.fromkeys(("PolarQuantCache", "SubGenCache"), "hf_memory.compression.cache")
    for architecture in ARCHITECTURES.values():
        modules[architecture.config] = architecture.configuration_module
        modules.update(dict.fromkeys(architecture.modeling_names, architecture.modeling_module))
    return modules


_MODULES = _public_names()


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})


register_architectures()
