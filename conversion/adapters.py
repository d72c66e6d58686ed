"""Low-rank adapters of peft in place of weights: put in, merged, or kept beside the model."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_memory.conversion.schema import ConversionError
from hf_memory.conversion.stage_options import TrainingStage


if TYPE_CHECKING:
    from peft import LoraConfig

# Projections as every mixer, and most attention, calls them.
DEFAULT_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")
ADAPTER = "default"
FOLDER = "adapter"
# What peft puts between a module and the weights that it had.
BASE_LAYER = ".base_layer."
LORA = ".lora_"
# In front of the names in its files, and the name of these.
PREFIX = "base_model.model."
WEIGHTS = "adapter_model.safetensors"


def plain_name(name: str) -> str:
    """Name of a parameter as it is without adapters."""
    return name.replace(BASE_LAYER, ".")


def lora_config(options: TrainingStage, targets: list[str]) -> "LoraConfig":
    """The configuration of peft for modules of these names."""
    from peft import LoraConfig

    return LoraConfig(
        r=options.lora_rank,
        lora_alpha=options.lora_alpha,
        lora_dropout=0.0,
        target_modules=sorted(targets),
        task_type="CAUSAL_LM",
    )


class Adapters:
    """Adapters of one stage inside a student.

    Args:
        model: The student; its linear layers are wrapped in place, which changes nothing that it computes.
        options: With `lora_rank`.
        scope: Parameters whose modules may be adapted, by name.
        seed: Of the adapters' random start.

    Raises:
        ConversionError: When a name among `lora_targets`, or all of the default, is not in the scope.
    """

    def __init__(
        self, model: PreTrainedModel, options: TrainingStage, scope: Mapping[str, nn.Parameter], seed: int
    ) -> None:
        from peft import inject_adapter_in_model

        self.model, self.options = model, options
        names = options.lora_targets or DEFAULT_TARGETS
        self.targets = [
            name
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and f"{name}.weight" in scope and name.rpartition(".")[2] in names
        ]
        found = {name.rpartition(".")[2] for name in self.targets}
        missing = [name for name in names if name not in found]
        # Not every student has all that are adapted by default.
        if scope and missing and (options.lora_targets or not found):
            raise ConversionError(
                f"`lora_targets` {', '.join(missing)} are no linear layers among what `trainable` {options.trainable} "
                "names here: choose others, or set `trainable` to all."
            )
        if not self.targets:
            return
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            inject_adapter_in_model(lora_config(options, self.targets), model, ADAPTER)

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The adapters' own parameters, by name."""
        inside = tuple(name + LORA for name in self.targets)
        return {name: value for name, value in self.model.named_parameters() if name.startswith(inside)}

    def merge(self) -> dict[str, nn.Parameter]:
        """Add the adapters to the weights, in float32, and take them out; the changed weights by name."""
        changed = {}
        for name in self.targets:
            wrapped = self.model.get_submodule(name)
            base = wrapped.get_base_layer()
            base.weight.data = base.weight.data.float()
            wrapped.merge()
            parent, _, leaf = name.rpartition(".")
            setattr(self.model.get_submodule(parent), leaf, base)
            changed[f"{name}.weight"] = base.weight
        if self.targets:
            # The model has none now, and peft reads this to know.
            del self.model.peft_config
        return changed


def save_adapters(options: TrainingStage, trained: Mapping[str, Tensor], folder: str | Path) -> None:
    """Write kept adapters, if there are any, into `folder/adapter`, as `PeftModel.from_pretrained` reads them.

    Args:
        options: The stage that trained them.
        trained: Weights by name; those of adapters are taken.
        folder: Of the model.
    """
    adapters = {name: value for name, value in trained.items() if LORA in name}
    if not adapters:
        return
    config = lora_config(options, sorted({name.partition(LORA)[0] for name in adapters}))
    config.inference_mode = True
    place = Path(folder) / FOLDER
    config.save_pretrained(place)
    weights = {PREFIX + name.replace(f".{ADAPTER}.", "."): value for name, value in adapters.items()}
    save_file(weights, place / WEIGHTS, metadata={"format": "pt"})


def load_adapters(model: PreTrainedModel, folder: str | Path) -> PreTrainedModel:
    """The model with the adapters, if any were kept beside it, at work in it."""
    place = Path(folder) / FOLDER
    if not place.is_dir():
        return model
    from peft import LoraConfig, inject_adapter_in_model

    inject_adapter_in_model(LoraConfig.from_pretrained(str(place)), model, ADAPTER)
    parameters, weights = dict(model.named_parameters()), load_file(place / WEIGHTS)
    with torch.no_grad():
        for name, parameter in parameters.items():
            if LORA in name:
                parameter.data = weights[PREFIX + name.replace(f".{ADAPTER}.", ".")].to(parameter.device)
    return model


__all__ = ["FOLDER", "LORA", "Adapters", "load_adapters", "plain_name", "save_adapters"]
