"""The training loop of all stages: seeds by step, checkpoints, and a resume that ends in the same weights."""

import hashlib
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_memory.conversion.checkpoints import Checkpoint, WorkFolder
from hf_memory.conversion.data import Batches
from hf_memory.conversion.progress import Interruption, Voice
from hf_memory.conversion.schema import ConversionError
from hf_memory.conversion.stage_options import TrainingStage
from hf_memory.conversion.stages import StageModule, only_these_train, what_trains


BETAS = (0.9, 0.95)


@dataclass
class Run:
    """What the stages of one conversion share.

    Args:
        work: The folder it works in.
        checkpoint_seconds: Time between two checkpoints.
        voice: Where it speaks.
        accelerator: Device and precision.
        student: The model that is trained.
        labels: Of all training stages, in order.
        identity: What must be the same when the run is continued, such as fingerprints of teacher and data.
        trained: Parameters of the student trained so far, by name; the stages add theirs.
    """

    work: WorkFolder
    checkpoint_seconds: float
    voice: Voice
    accelerator: Accelerator
    student: PreTrainedModel
    labels: list[str]
    identity: dict[str, Any]
    trained: dict[str, nn.Parameter] = field(default_factory=dict)


def make_accelerator(device: torch.device, dtype: torch.dtype) -> Accelerator:
    """One process on one device; with bfloat16, float32 weights computed with under autocast."""
    # A process may convert twice, in different precision; the state of accelerate is made for one.
    AcceleratorState._reset_state(reset_partial_state=True)
    return Accelerator(
        cpu=device.type == "cpu",
        device_placement=False,
        mixed_precision="bf16" if dtype == torch.bfloat16 else "no",
    )


def train_stage(
    run: Run, label: str, stage: StageModule, batches: Batches, steps: int, done: Checkpoint | None
) -> None:
    """Train one stage to its end.

    Args:
        run: The conversion it belongs to.
        label: Of the stage.
        stage: What to train, towards what.
        batches: The blocks of every step.
        steps: How many there are.
        done: A checkpoint inside this stage to continue from.

    Raises:
        ConversionError: A loss or gradient that is not finite, or a checkpoint that cannot be written.
        KeyboardInterrupt: After a checkpoint, when asked to stop.
    """
    as_masters(stage.parameters_by_name)
    before = dict(run.trained)
    run.trained |= stage.parameters_by_name
    start = 0 if done is None else done.step
    if done is not None:
        load_tensors(run.trained, done.tensors)
    for line in what_trains(run.student, stage.parameters_by_name):
        run.voice.say(line)
    if not stage.parameters_by_name:
        run.voice.say(f"{label}: nothing to train, left out")
        return
    optimizer = make_optimizer(stage)
    if done is not None:
        restore_moments(optimizer, stage.parameters_by_name, done.tensors)
    stage.prepare()
    with only_these_train(run.student, stage.parameters_by_name), Interruption() as interruption:
        loop = _Loop(run, label, stage, batches, steps, optimizer)
        with run.voice.progress(label, steps, start) as bar, _kept(run.work):
            saved_at = time.monotonic()
            for step in range(start, steps):
                note = loop.step(step)
                bar.update(step + 1, note)
                last = step + 1 == steps
                if last or interruption.asked or time.monotonic() - saved_at >= run.checkpoint_seconds:
                    name = loop.save(step + 1)
                    saved_at = time.monotonic()
                if interruption.asked:
                    run.voice.say(f"Stopped after the checkpoint {name}; the same command continues from it.")
                    raise KeyboardInterrupt
    run.trained = before | stage.finish()


class _Loop:
    """The steps of one stage."""

    def __init__(
        self,
        run: Run,
        label: str,
        stage: StageModule,
        batches: Batches,
        steps: int,
        optimizer: torch.optim.Optimizer,
    ) -> None:
        self.run, self.label, self.stage, self.batches, self.steps = run, label, stage, batches, steps
        self.optimizer, self.log = optimizer, run.work.log()
        self.number = run.labels.index(label)
        self.device = next(iter(stage.parameters_by_name.values())).device
        self.began, self.tokens = time.monotonic(), 0

    def step(self, step: int) -> str:
        """One update; what the progress bar says about it."""
        run, options = self.run, self.stage.options
        # Dropout, where a teacher has it, then needs no state of a generator in the checkpoint.
        self.stage.step_seed = seed_of(*self.batches.seeds, step)
        torch.manual_seed(self.stage.step_seed)
        blocks = self.batches[step].to(self.device)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(options, group["peak"], step, self.steps)
        self.optimizer.zero_grad(set_to_none=True)
        loss, figures = 0.0, {}
        for part in blocks.chunk(min(options.accumulate, len(blocks))):
            weight = len(part) / len(blocks)
            with run.accelerator.autocast():
                value, parts = self.stage(part)
            run.accelerator.backward(value * weight)
            loss += value.item() * weight
            figures = {name: figures.get(name, 0.0) + float(part_value) * weight for name, part_value in parts.items()}
        self._check(loss, "loss", step)
        norm = float(run.accelerator.clip_grad_norm_(list(self.stage.parameters_by_name.values()), options.clip))
        self._check(norm, "gradient", step)
        self.optimizer.step()
        self.tokens += blocks[:, 1:].numel()
        speed = self.tokens / (time.monotonic() - self.began)
        line = {"stage": self.label, "step": step + 1, "tokens": (step + 1) * blocks[:, 1:].numel(), "loss": loss}
        numbers = {
            "lr": self.optimizer.param_groups[0]["lr"],
            "gradient_norm": norm,
            "tokens_per_second": round(speed, 1),
        }
        self.log.add(line | figures | numbers)
        return f"loss {loss:.4g}, {speed:,.0f} tokens/s"

    def _check(self, value: float, what: str, step: int) -> None:
        if not math.isfinite(value):
            good = self.run.work.last_good()
            raise ConversionError(
                f"The {what} of stage {self.label} is {value} in step {step + 1} of {self.steps} (last good "
                f"checkpoint: {good or 'none yet'}): begin anew with --restart and a smaller learning rate."
            )

    def save(self, step: int) -> str:
        """Write a checkpoint behind `step` updates; its name."""
        tensors = {f"weight.{name}": value.detach().cpu() for name, value in self.run.trained.items()}
        if step < self.steps:
            tensors |= moments(self.optimizer, self.stage.parameters_by_name)
        numbers = {"stage": self.label, "step": step, "threads": torch.get_num_threads()} | self.run.identity
        return self.run.work.save(Checkpoint(self.label, step, numbers, tensors)).name


@contextmanager
def _kept(work: WorkFolder) -> Iterator[None]:
    """Errors of writing as a sentence that names the last good checkpoint."""
    try:
        yield
    except OSError as error:
        raise work.unwritable(error) from error


def seed_of(*numbers: int) -> int:
    """One seed from several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


def learning_rate(options: TrainingStage, peak: float, step: int, steps: int) -> float:
    """Learning rate of a step counted from 0: a linear rise, then a cosine down to `floor * peak`."""
    rise = round(options.warmup * steps)
    if step < rise:
        return peak * (step + 1) / rise
    fallen = (step - rise) / max(1, steps - rise)
    return peak * (options.floor + (1 - options.floor) * 0.5 * (1 + math.cos(math.pi * fallen)))


def make_optimizer(stage: StageModule) -> torch.optim.AdamW:
    """AdamW in which matrices decay and vectors do not, and what the teacher has too may learn more slowly."""
    options = stage.options
    memories = set(stage.memories)
    kept_lr = options.lr if options.kept_lr is None else options.kept_lr
    groups = []
    for peak, own in ((options.lr, True), (kept_lr, False)):
        for decay, is_matrix in ((options.weight_decay, True), (0.0, False)):
            chosen = [
                value
                for name, value in stage.parameters_by_name.items()
                if (name in memories) == own and (value.ndim >= 2) == is_matrix
            ]
            if chosen:
                groups.append({"params": chosen, "weight_decay": decay, "lr": peak, "peak": peak})
    return torch.optim.AdamW(groups, betas=BETAS)


def as_masters(parameters: Mapping[str, nn.Parameter]) -> None:
    """Turn parameters that are to be trained into float32, in place: steps smaller than a rounding would be lost."""
    for parameter in parameters.values():
        if parameter.dtype != torch.float32:
            parameter.data = parameter.data.float()


@torch.no_grad()
def load_tensors(parameters: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor]) -> None:
    """Write the weights of a checkpoint into parameters, in place."""
    for name, parameter in parameters.items():
        parameter.copy_(tensors[f"weight.{name}"])


def moments(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """State of an optimiser as tensors named `KEY.PARAMETER`."""
    return {
        f"{key}.{name}": value.detach().cpu()
        for name, parameter in parameters.items()
        for key, value in optimizer.state[parameter].items()
    }


def restore_moments(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor]
) -> None:
    """The inverse of `moments`."""
    for full_name, value in tensors.items():
        key, _, name = full_name.partition(".")
        if key != "weight":
            place = "cpu" if key == "step" else parameters[name].device
            optimizer.state[parameters[name]][key] = value.to(place)


def fingerprint(model: nn.Module) -> str:
    """Of a model's weights: names, shapes, and up to 256 evenly spread elements of each."""
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        flat = value.detach().flatten()
        sample = flat[:: max(1, flat.numel() // 256)][:256].float().cpu().numpy()
        digest.update(f"{name} {tuple(value.shape)}".encode() + sample.tobytes())
    return digest.hexdigest()
