"""Properties of parameters and gradients: save and load, initialisation, checkpointing, autocast, op forms."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from transformers.modeling_layers import GradientCheckpointingLayer

from hf_memory.evaluation.properties_report import NotApplicableError, Result, Worst
from hf_memory.evaluation.properties_subject import Subject, deviation


def save_load(subject: Subject) -> Result:
    """Save and load (which builds the model on the meta device) gives every parameter and buffer back bit for bit."""
    model = copy.deepcopy(subject.model)
    # Values no initialisation would produce, so that a tensor made anew on loading cannot pass for the saved one.
    persistent = model.state_dict(keep_vars=True)
    for tensor in {id(tensor): tensor for tensor in persistent.values()}.values():
        if tensor.dtype.is_floating_point:
            noise = torch.rand(tensor.shape, generator=subject.random).to(tensor.device, torch.float32)
            tensor.data.copy_(tensor.float() * (1 + 0.1 * noise) + 0.01 * noise)
    tokens = subject.tokens(2, subject.prompt_length)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        loaded, info = type(model).from_pretrained(folder, dtype="auto", output_loading_info=True)
        loaded = loaded.to(subject.device).eval()
    faults = [f"{kind.replace('_', ' ')}: {', '.join(map(str, sorted(keys)))}" for kind, keys in info.items() if keys]
    before, after = _tensors(model), _tensors(loaded)
    faults += [f"only {side}: {', '.join(sorted(names))}" for side, names in _one_sided(before, after) if names]
    changed = [name for name in before.keys() & after.keys() if not _same(before[name], after[name])]
    if changed:
        faults.append(f"{len(changed)} tensors changed: {', '.join(sorted(changed)[:4])}")
    model.eval()
    # Not bit for bit: sums may run in another order where a loaded tensor lies otherwise in memory.
    value = deviation(loaded(tokens).logits, model(tokens).logits)
    if value > subject.tolerance:
        faults.append(f"logits deviate by {value:.1e}")
    detail = "; ".join(faults) or f"{len(before)} tensors equal"
    return Result("", "fail" if faults else "pass", float(max(len(changed), len(faults))), 0.0, detail)


def meta_init(subject: Subject) -> Result:
    """Initialising a model built on the meta device fills every parameter and buffer as constructing it does."""
    model_class, config = type(subject.model), subject.model.config
    with _poisoned_memory():
        built = model_class.from_pretrained(None, config=copy.deepcopy(config), state_dict={})
        twins = []
        for seed in range(2):
            torch.manual_seed(seed)
            twins.append(_tensors(model_class(copy.deepcopy(config))))
    faults = []
    for name, tensor in _tensors(built).items():
        first, second = (twin.get(name) for twin in twins)
        if first is None or second is None or first.shape != tensor.shape:
            faults.append(f"{name} is not in a constructed model")
        elif not torch.isfinite(tensor.float()).all():
            faults.append(f"{name} is left uninitialised")
        elif torch.equal(first, second):
            if not torch.equal(first, tensor.to(first)):
                faults.append(f"{name} differs from its constructed value")
        elif tensor.numel() >= 256 and not 0.5 < float(tensor.float().std() / first.float().std()) < 2:
            faults.append(f"{name} has another spread than constructed")
    detail = "; ".join(faults[:4]) or f"{len(_tensors(built))} tensors initialised"
    return Result("", "fail" if faults else "pass", float(len(faults)), 0.0, detail)


def gradient_checkpointing(subject: Subject) -> Result:
    """Gradient checkpointing recomputes layers and leaves the gradients as they are."""
    if not subject.model.supports_gradient_checkpointing:
        raise NotApplicableError("the model does not support gradient checkpointing")
    # Switching it on leaves hooks behind: on a copy.
    subject = copy.copy(subject)
    subject.model = model = copy.deepcopy(subject.model).train()
    tokens = subject.tokens(2, subject.prompt_length)
    mask = torch.ones_like(tokens)
    mask[0, :3] = 0
    labels = tokens.masked_fill(mask == 0, -100)
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    worst, calls = Worst(subject.tolerance), []
    # On a module inside the layer: the layer's own hooks may stay outside of what is recomputed.
    if layers:
        next(layers[0].children()).register_forward_pre_hook(lambda *_: calls.append(None))
    # transformers 5.23 renamed the switch, and warns about the old name.
    name = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    getattr(model, f"{name}_checkpointing_disable")()
    expected = _gradients(subject, tokens, labels, mask)
    plain_calls = len(calls)
    getattr(model, f"{name}_checkpointing_enable")()
    actual = _gradients(subject, tokens, labels, mask)
    for name, value in _gradient_deviations(actual, expected).items():
        worst.add(value, f"gradient of {name}")
    if layers and len(calls) <= 2 * plain_calls:
        return Result("", "fail", worst.measured, worst.tolerance, "switching it on recomputed no layer")
    return worst.result()


def autocast(subject: Subject) -> Result:
    """Logits and gradients under bf16 autocast are finite on long, large, repeated and zero inputs."""
    limit = getattr(subject.config, "max_position_embeddings", None) or subject.budget.long_tokens
    long = min(subject.budget.long_tokens, limit)
    short = max(long // 8, 1)
    tokens = subject.tokens(1, short)
    cases: dict[str, Callable[[], dict]] = {
        f"long, {long} tokens": lambda: {"tokens": subject.tokens(1, long)},
        "repeated token": lambda: {"tokens": tokens[:, :1].expand(1, short)},
    }
    if "inputs_embeds" in subject.parameters:
        embeds = subject.embed(tokens).detach()
        cases |= {
            "large, embeddings times 1000": lambda: {"embeds": 1000 * embeds},
            "large then small embeddings": lambda: {"embeds": torch.cat([1000 * embeds[:, :8], embeds[:, 8:]], dim=1)},
            "zero embeddings": lambda: {"embeds": torch.zeros_like(embeds)},
        }
    faults, total = [], 0
    parameters = [p for p in subject.model.parameters() if p.requires_grad]
    for label, make in cases.items():
        inputs = make()
        backward = bool(parameters) and not label.startswith("long")
        with torch.set_grad_enabled(backward), torch.autocast(subject.device.type, dtype=torch.bfloat16):
            logits = subject.forward(**inputs)
        bad = int((~torch.isfinite(logits)).sum())
        if backward:
            # A loss that weighs every logit: gradients reach every place of every layer.
            loss = logits.float().log_softmax(-1)[..., 0].mean()
            grads = torch.autograd.grad(loss, parameters, allow_unused=True)
            bad += sum(int((~torch.isfinite(grad)).sum()) for grad in grads if grad is not None)
        total += bad
        faults += [f"{label}: {bad} values not finite"] if bad else []
    detail = "; ".join(faults) or ", ".join(label.split(",")[0] for label in cases) + ": all finite"
    return Result("", "fail" if faults else "pass", float(total), 0.0, detail)


def forms(subject: Subject) -> Result:
    """The plain and the fast form of every op give equal logits, gradients and states (models of this library)."""
    try:
        from hf_memory.kernels import force_form
    except ImportError as error:
        raise NotApplicableError("hf_memory.kernels offers no forms to choose from") from error
    if not any(type(module).__module__.startswith("hf_memory.") for module in subject.model.modules()):
        raise NotApplicableError("the model has no op of this library")
    tokens = subject.tokens(2, subject.prompt_length)
    mask = torch.ones_like(tokens)
    mask[0, :5] = 0
    worst = Worst(subject.tolerance)
    # Left to itself, an op takes the fastest form that this device and its options allow.
    fast = None
    logits, grads = {}, {}
    for form in ("reference", fast):
        with force_form(form):
            logits[form] = subject.forward(tokens, mask=mask)
            grads[form] = _gradients(subject, tokens, tokens.masked_fill(mask == 0, -100), mask)
    valid = mask.bool()
    worst.add(deviation(logits[fast][valid], logits["reference"][valid]), "logits")
    for name, value in _gradient_deviations(grads[fast], grads["reference"]).items():
        worst.add(value / 10, f"gradient, {name}")
    with torch.no_grad():
        for first, second in (("reference", fast), (fast, "reference")):
            stream, pieces = subject.stream(), []
            for form, piece in zip((first, second), tokens.tensor_split([subject.prompt_length // 2 + 1], dim=1)):
                with force_form(form):
                    pieces.append(stream.feed(piece))
            value = deviation(torch.cat(pieces, dim=1)[1], logits["reference"][1])
            worst.add(value, f"state of the {first or 'fast'} form continued by the {second or 'fast'} one")
    return worst.result()


def _gradients(
    subject: Subject, tokens: torch.Tensor, labels: torch.Tensor, mask: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Gradient of the language-model loss for every parameter that has one; the model's own `.grad` is left alone."""
    named = {name: p for name, p in subject.model.named_parameters() if p.requires_grad}
    torch.manual_seed(0)
    loss = subject.call(tokens, mask=mask, labels=labels).loss
    grads = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {name: grad for name, grad in zip(named, grads) if grad is not None}


def _gradient_deviations(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> dict[str, float]:
    """Deviation per parameter, relative to its own gradient, or to a thousandth of the largest where that is tiny."""
    if actual.keys() != expected.keys():
        return {"parameters without one: " + ", ".join(sorted(actual.keys() ^ expected.keys())): float("inf")}
    sizes = {name: float(grad.double().pow(2).mean().sqrt()) for name, grad in expected.items()}
    floor = 1e-3 * max(sizes.values(), default=0.0)
    found = {}
    for name, size in sizes.items():
        difference = float((actual[name].double() - expected[name].double()).pow(2).mean().sqrt())
        found[name] = difference / max(size, floor, 1e-12) if difference == difference else float("inf")
    return found


def _tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _same(left: torch.Tensor, right: torch.Tensor) -> bool:
    return left.dtype == right.dtype and left.shape == right.shape and torch.equal(left, right.to(left.device))


def _one_sided(before: dict, after: dict) -> list[tuple[str, set[str]]]:
    return [("before saving", before.keys() - after.keys()), ("after loading", after.keys() - before.keys())]


@contextmanager
def _poisoned_memory() -> Iterator[None]:
    """Fills new uninitialised tensors with NaN, so that one nobody wrote is seen."""
    was = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(was[0], warn_only=was[1])
