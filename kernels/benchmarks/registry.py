"""The ops that have a benchmark. A new op is one entry of `OPS`; a new form of an op appears by itself."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial

import torch
from torch import Tensor

from .. import presets
from ..dispatch import anchored_linear, anchored_mlp, force_form, forms
from ..sphere_slots.op import sphere_slots
from ..sphere_slots.types import SphereOptions
from ..sphere_slots.types import check_inputs as check_sphere
from ..two_pass_slots import op as two_pass
from ..two_pass_slots import plan as two_pass_plan
from ..two_pass_slots.inputs import SlotOptions
from ..types import AnchoredOptions, State, check_inputs
from .inputs import (
    Shape,
    Tensors,
    attention_inputs,
    cast,
    gates_of,
    memory_inputs,
    norm_of,
    slot_inputs,
    sphere_inputs,
    weights_of,
    window,
)
from .peers import (
    FLA_GATED_DELTA_RULE,
    FLA_GATED_OJA_RULE,
    FLA_GATED_SLOT_ATTENTION,
    FLA_MOMENTUM_DELTA_RULE,
    SDPA,
    Provider,
    fla_ttt_linear,
    softmax_attention,
)


OWN = "hf_memory"
"""Name of this package among the providers."""

COMPILED = "compiled"
"""Its chunk form under `torch.compile`, a form of its own in the rows."""

Run = Callable[[Tensors, State | None, bool], tuple[Tensor, State | None]]
"""`(operands, initial state, whether to return the final one)` -> outputs and final state."""


Make = Callable[[Shape, torch.Generator], Tensors]
"""Random float32 operands for a shape."""


def takes_everything(width: int, dtype: torch.dtype, mode: str) -> str | None:
    """`Op.refuses` of a Triton form that takes all widths and dtypes that are measured."""
    return None


@dataclass(frozen=True)
class Op:
    """One function with everything that computes it.

    Attributes:
        name: its name in the rows.
        make: random float32 operands for a shape.
        truth: the function, in the dtype of its operands; with all of them in float64, the standard of the gate.
        run: the op of this package that computes it, if there is one.
        grid: chunk size of the inner gradients, where there are some.
        widths: widths it is measured at unless shapes are named; decode at the largest.
        float32_width: the width in their place in float32, where the Triton form takes less there.
        refuses: `(width, dtype, mode)` -> why the Triton form cannot be measured there, `None` if it can.
        float32_error: what its error in float32 may not exceed, whatever the reference loses.
        options: what else defines the function, for the rows.
        peers: how other libraries compute the same function.
        forms: which forms of `run` a device has, its default first.
    """

    name: str
    make: Make
    truth: Callable[[Tensors], Tensor]
    run: Run | None = None
    grid: int | None = None
    widths: tuple[int, ...] = (64, 128)
    float32_width: int | None = None
    refuses: Callable[[int, torch.dtype, str], str | None] = takes_everything
    float32_error: float = float("inf")
    options: str = ""
    peers: tuple[Provider, ...] = ()
    forms: Callable[[torch.device | str], list[str]] = forms

    @property
    def label(self) -> str:
        """Name with the grid: `anchored_mlp/16`."""
        return self.name if self.grid is None else f"{self.name}/{self.grid}"

    def providers(self, device: torch.device, peers: bool = False) -> list[Provider]:
        """Everything that can compute the op on a device, our own fast forms first."""
        own = [] if self.run is None else [_own(self.run, form) for form in self.forms(device) if form != "reference"]
        if own and not peers:
            return own
        if own:
            own.append(_compiled(self.run))
        return own + [peer for peer in self.peers if device.type in peer.devices and peer.is_installed]


def _own(run: Run, form: str) -> Provider:
    def forward(inputs: Tensors) -> Tensor:
        with force_form(form):
            return run(inputs, None, False)[0]

    def decode(inputs: Tensors, start: int) -> Callable[[int], Tensor]:
        # A kernel for one token may take more than those for a prompt, which then runs in another form.
        with force_form(None if form == "triton" else form):
            _, state = run(window(inputs, 0, start), None, True)

        def step(token: int) -> Tensor:
            nonlocal state
            with force_form(form):
                out, state = run(window(inputs, token, token + 1), state, True)
            return out

        return step

    return Provider(OWN, form, "hf-memory", forward, decode)


def _compiled(run: Run) -> Provider:
    @cache
    def compiled() -> Run:
        # Not `dynamic`: a row has one length. A break of the graph is an error: what is behind it would be timed as if
        # it were compiled.
        return torch.compile(lambda *operands: run(*operands), fullgraph=True, dynamic=False)

    def call(inputs: Tensors, state: State | None, final: bool) -> tuple[Tensor, State | None]:
        return compiled()(inputs, state, final)

    return replace(_own(call, "chunk"), form=COMPILED)


def _truth(run: Run) -> Callable[[Tensors], Tensor]:
    def truth(inputs: Tensors) -> Tensor:
        with force_form("reference"):
            return run(inputs, None, False)[0]

    return truth


def _linear(inputs: Tensors, state: State | None, final: bool, options: AnchoredOptions) -> tuple:
    operands = (inputs["q"], inputs["k"], inputs["v"], gates_of(inputs), *weights_of(inputs), norm_of(inputs))
    # Nobody but the decoded token knows the state of a row.
    options = replace(options, overwrite_state=state is not None)
    return anchored_linear(*operands, state, final, options=options)


def _mlp(inputs: Tensors, state: State | None, final: bool, options: AnchoredOptions) -> tuple:
    operands = (inputs["q"], inputs["k"], inputs["v"], gates_of(inputs), weights_of(inputs), norm_of(inputs))
    # Nobody but the decoded token knows the state of a row.
    options = replace(options, overwrite_state=state is not None)
    return anchored_mlp(*operands, state, final, options=options)


def _gated_delta_rule(inputs: Tensors, state: State | None, final: bool) -> tuple:
    g, beta = inputs["log_decay"].squeeze(-1), inputs["step"].squeeze(-1)
    return presets.gated_delta_rule(inputs["q"], inputs["k"], inputs["v"], g, beta, state, final)


def _gated_delta_rule_inputs(shape: Shape, generator: torch.Generator) -> Tensors:
    inputs = memory_inputs(shape, generator, momentum=False)
    del inputs["weight_0"]
    return inputs


def _op(name: str, run: Run, make: Make, **fields) -> Op:
    return Op(name, make, _truth(run), run, **fields)


def _anchored_refuses(width: int, dtype: torch.dtype, mode: str, make: Make, options: AnchoredOptions) -> str | None:
    if mode.startswith("decode"):  # its kernels take all that is measured, behind a prompt in any form
        return None
    from ..triton_form import unsupported

    inputs = cast(make(Shape(1, 1, 1, width), torch.Generator()), dtype)
    operands = (inputs["q"], inputs["k"], inputs["v"], gates_of(inputs), weights_of(inputs), norm_of(inputs))
    return unsupported(check_inputs(*operands, None, options))


def _anchored(grid: int) -> list[Op]:
    zero = AnchoredOptions(chunk_size=grid)
    init = replace(zero, decay_target="init")
    with_norm, deep = partial(memory_inputs, norm=True), partial(memory_inputs, depth=2, norm=True)
    return [
        _op(
            "anchored_linear",
            partial(_linear, options=zero),
            memory_inputs,
            grid=grid,
            refuses=partial(_anchored_refuses, make=memory_inputs, options=zero),
            # fla's chunk form of the online rule loses everything in float32.
            float32_error=1e-5,
            options="plain, momentum, decay to zero",
            peers=(FLA_MOMENTUM_DELTA_RULE,) if grid == 1 else (),
        ),
        _op(
            "anchored_linear_norm",
            partial(_linear, options=init),
            with_norm,
            grid=grid,
            refuses=partial(_anchored_refuses, make=with_norm, options=init),
            options="LayerNorm + residual, momentum, decay to init",
            peers=(fla_ttt_linear(grid),),
        ),
        _op(
            "anchored_mlp",
            partial(_mlp, options=init),
            deep,
            grid=grid,
            refuses=partial(_anchored_refuses, make=deep, options=init),
            widths=(64,),
            options="depth 2, expansion 4, momentum, decay to init",
        ),
    ]


# What the slot memories are measured at: a wider one has no Triton form.
SLOT_WIDTHS = (64,)


def _sphere(inputs: Tensors, state: State | None, final: bool, options: SphereOptions) -> tuple:
    operands = (inputs["q"], inputs["k"], inputs["v"], gates_of(inputs), inputs["slots"])
    return sphere_slots(*operands, state, final, options=options)


def _sphere_refuses(width: int, dtype: torch.dtype, mode: str, options: SphereOptions) -> str | None:
    from ..sphere_slots.triton_op import unsupported

    inputs = cast(sphere_inputs(Shape(1, 1, 1, width), torch.Generator()), dtype)
    operands = (inputs["q"], inputs["k"], inputs["v"], gates_of(inputs), inputs["slots"])
    return unsupported(check_sphere(*operands, None, options))


def _sphere_ops() -> list[Op]:
    return [
        _op(
            "sphere_slots",
            partial(_sphere, options=SphereOptions(chunk_size=grid)),
            sphere_inputs,
            grid=grid,
            widths=SLOT_WIDTHS,
            refuses=partial(_sphere_refuses, options=SphereOptions(chunk_size=grid)),
            options="dec, retract, slots as wide as a head",
            peers=(FLA_GATED_OJA_RULE,),
        )
        for grid in (1, 16)
    ]


def _two_pass(inputs: Tensors, state: State | None, final: bool, options: SlotOptions) -> tuple:
    operands = (inputs[name] for name in ("q", "k", "v", "targets"))
    # Nobody but the decoded token knows the state of a row.
    options = replace(options, overwrite_state=state is not None)
    return two_pass.two_pass_slots(*operands, gates_of(inputs), None, state, final, options=options)


def _two_pass_refuses(width: int, dtype: torch.dtype, mode: str, options: SlotOptions) -> str | None:
    if mode.startswith("decode"):
        return two_pass_plan.too_large_to_decode(width, width)
    return two_pass_plan.unsupported(options, dtype, width, width)


def _two_pass_op(name: str, options: SlotOptions, **fields) -> Op:
    return _op(
        name,
        partial(_two_pass, options=options),
        slot_inputs,
        grid=options.chunk_size,
        widths=SLOT_WIDTHS,
        refuses=partial(_two_pass_refuses, options=options),
        options=f"write map {options.write_map}, read map ln_silu, slots as wide as a head",
        peers=(FLA_GATED_SLOT_ATTENTION,),
        forms=two_pass.forms,
        **fields,
    )


def _two_pass_ops() -> list[Op]:
    identity = SlotOptions(chunk_size=1, write_map="identity")
    return [
        _two_pass_op("two_pass_slots", SlotOptions(chunk_size=16), float32_width=32),
        _two_pass_op("two_pass_slots_identity", identity),
    ]


def _all_ops() -> list[Op]:
    ops = [op for grid in (1, 16, 64) for op in _anchored(grid)]
    # Tiles of one token: the deep memories on the exact online rule are as slow as a loop over tokens has to be.
    ops = [op for op in ops if op.grid > 1 or op.name == "anchored_linear"]
    ops.append(
        _op(
            "gated_delta_rule",
            _gated_delta_rule,
            _gated_delta_rule_inputs,
            grid=1,
            options="no momentum",
            peers=(FLA_GATED_DELTA_RULE,),
        )
    )
    ops += _sphere_ops()
    ops += _two_pass_ops()
    ops.append(Op("softmax_attention", attention_inputs, softmax_attention, options="causal", peers=(SDPA,)))
    return ops


OPS: dict[str, Op] = {op.label: op for op in _all_ops()}
"""Label (`name/grid`) -> op."""
