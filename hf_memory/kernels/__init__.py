"""Ops of the memory architectures: pure functions of tensors, one folder per class of recurrence."""

from pathlib import Path


# A wheel holds the op folders beside this file. A checkout has them in its top-level `kernels/`, known by a file that
# no package of that name in site-packages has.
_source = Path(__file__).resolve().parents[2] / "kernels"
if (_source / "SOURCE_CHECKOUT").is_file():
    __path__.append(str(_source))

# Behind the path above: in a checkout these modules are found only through it.
from .dispatch import OPS, anchored_linear, anchored_mlp, force_form, forms, overwrites_state  # noqa: E402
from .sphere_slots.op import sphere_slots  # noqa: E402
from .sphere_slots.types import SphereOptions  # noqa: E402
from .two_pass_slots.inputs import SlotOptions  # noqa: E402
from .two_pass_slots.op import two_pass_slots  # noqa: E402
from .types import AnchoredOptions, Gates, Norm, State  # noqa: E402


__all__ = [
    "OPS",
    "AnchoredOptions",
    "Gates",
    "Norm",
    "SlotOptions",
    "SphereOptions",
    "State",
    "anchored_linear",
    "anchored_mlp",
    "force_form",
    "forms",
    "overwrites_state",
    "sphere_slots",
    "two_pass_slots",
]
