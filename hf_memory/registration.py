"""Tells transformers and peft about our architectures. Runs once, from `import hf_memory`."""

import logging
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

from transformers.models.auto.configuration_auto import CONFIG_MAPPING, AutoConfig
from transformers.models.auto.modeling_auto import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from hf_memory.models import ARCHITECTURES, Architecture


logger = logging.getLogger(__name__)

LORA_TARGET_MODULES = ("q_proj", "v_proj")
_PEFT_CONSTANTS = "peft.utils.constants"
_PEFT_LORA_TABLE = "TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING"


def register_architectures() -> None:
    """Make every row of `ARCHITECTURES` known to the Auto classes and to peft's LoRA defaults."""
    for model_type, architecture in ARCHITECTURES.items():
        _announce_to_docstrings(architecture.folder, architecture.config)
        _register_with_auto_classes(model_type, architecture)
    _register_hybrid()
    _complete_push_to_hub()
    _register_with_peft()


def _announce_to_docstrings(folder: str, config: str) -> None:
    # `@auto_docstring` prints an error for each class below a folder named `models` whose model type it does not know.
    try:
        from transformers.utils.auto_docstring import HARDCODED_CONFIG_FOR_MODELS
    except ImportError:
        return
    HARDCODED_CONFIG_FOR_MODELS.setdefault(folder.replace("_", "-"), config)


def _register_with_auto_classes(model_type: str, architecture: Architecture) -> None:
    if model_type in CONFIG_MAPPING:
        logger.warning(
            "transformers already has a model type %r. hf_memory is imported, so its own classes are used for it.",
            model_type,
        )
    # The config comes first: `@auto_docstring` looks it up while the modeling module is imported.
    config = architecture.load("config")
    AutoConfig.register(model_type, config, exist_ok=True)
    AutoModel.register(config, architecture.load("base_model"), exist_ok=True)
    AutoModelForCausalLM.register(config, architecture.load("causal_lm"), exist_ok=True)
    AutoModelForSequenceClassification.register(config, architecture.load("sequence_classification"), exist_ok=True)


def _register_hybrid() -> None:
    # Its classes are made when a teacher is known, so that it is no row of the table.
    _announce_to_docstrings("hybrid", "MemoryHybridConfig")
    from hf_memory.models.hybrid.configuration_hybrid import MemoryHybridConfig
    from hf_memory.models.hybrid.modeling_hybrid import MemoryHybridForCausalLM, MemoryHybridModel

    AutoConfig.register(MemoryHybridConfig.model_type, MemoryHybridConfig, exist_ok=True)
    AutoModel.register(MemoryHybridConfig, MemoryHybridModel, exist_ok=True)
    AutoModelForCausalLM.register(MemoryHybridConfig, MemoryHybridForCausalLM, exist_ok=True)


def _complete_push_to_hub() -> None:
    """Let `push_to_hub` of our models send their code and a filled card along.

    Set from here, since the classes themselves travel with checkpoints and must not bring `hf_memory.hub` with them.
    A class that was loaded from a model's folder keeps the method of transformers, which sends that folder's code.
    """
    from hf_memory.modeling import MemoryPreTrainedModel
    from hf_memory.models.hybrid.modeling_hybrid import MemoryHybridForCausalLM, MemoryHybridModel

    def push_to_hub(self, repo_id: str, **options) -> str:
        """Push weights, code and a filled card in one commit; arguments as those of transformers' `push_to_hub`."""
        from hf_memory.hub.push import push_to_hub

        return push_to_hub(self, repo_id, **options)

    for model_class in (MemoryPreTrainedModel, MemoryHybridForCausalLM, MemoryHybridModel):
        model_class.push_to_hub = push_to_hub


def _register_with_peft() -> None:
    """Add our default LoRA targets to peft's table: now if peft is there, else at the moment somebody imports it.

    peft has no call for this, only a dict. Importing peft for it would take 0.3 to 0.4 s, more than all of
    `import hf_memory`, in every program that uses no adapters; looking only at whether peft is already imported would
    miss the notebook that builds the model in one cell and imports peft in the next. Hence a finder that sees the one
    module pass by. It changes nothing of peft except our own entries of that dict.
    """
    if _PEFT_CONSTANTS in sys.modules:
        _add_lora_defaults(sys.modules[_PEFT_CONSTANTS])
    else:
        sys.meta_path.insert(0, _PeftConstantsFinder())


def _add_lora_defaults(constants: ModuleType) -> None:
    table = getattr(constants, _PEFT_LORA_TABLE, {})
    for model_type in (*ARCHITECTURES, "memory_hybrid"):
        table[model_type] = list(LORA_TARGET_MODULES)


class _PeftConstantsFinder(MetaPathFinder):
    """Lets Python import `peft.utils.constants` as usual and adds our defaults when its body has run."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _PEFT_CONSTANTS:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_add(module: ModuleType) -> None:
            execute(module)
            _add_lora_defaults(module)

        spec.loader.exec_module = execute_and_add
        return spec
