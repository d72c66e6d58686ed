"""The table of architectures. A new one is a folder `hf_memory/models/<folder>/` and one row here."""

from importlib import import_module
from typing import NamedTuple


class Architecture(NamedTuple):
    """Where the classes of a model type are, by the naming rule that all architectures follow.

    Attributes:
        folder: `hf_memory/models/<folder>/` holds `configuration_<folder>.py` and `modeling_<folder>.py`.
        prefix: first part of every class name.
    """

    folder: str
    prefix: str

    @property
    def configuration_module(self) -> str:
        return f"hf_memory.models.{self.folder}.configuration_{self.folder}"

    @property
    def modeling_module(self) -> str:
        return f"hf_memory.models.{self.folder}.modeling_{self.folder}"

    @property
    def config(self) -> str:
        return f"{self.prefix}Config"

    @property
    def pretrained_model(self) -> str:
        return f"{self.prefix}PreTrainedModel"

    @property
    def base_model(self) -> str:
        return f"{self.prefix}Model"

    @property
    def causal_lm(self) -> str:
        return f"{self.prefix}ForCausalLM"

    @property
    def sequence_classification(self) -> str:
        return f"{self.prefix}ForSequenceClassification"

    @property
    def cache(self) -> str:
        return f"{self.prefix}Cache"

    @property
    def modeling_names(self) -> tuple[str, ...]:
        """The public names of the modeling module."""
        return self.base_model, self.causal_lm, self.sequence_classification, self.cache

    def load(self, role: str) -> type:
        """Import a class of this architecture; `role` is the property that names it, as in `load("config")`."""
        module = self.configuration_module if role == "config" else self.modeling_module
        return getattr(import_module(module), getattr(self, role))


ARCHITECTURES: dict[str, Architecture] = {
    "titans": Architecture(folder="titans", prefix="Titans"),
    "lattice": Architecture(folder="lattice", prefix="Lattice"),
    "trellis": Architecture(folder="trellis", prefix="Trellis"),
}
"""Model type (`config.model_type`) -> architecture."""
