"""The training loop of all stages: seeds by step, checkpoints, and a resume that ends in the same weights."""

import hashlib
import math
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_memory.conversion.checkpoints import Checkpoint, WorkFolder
from hf_memory.conversion.data import Batches
from hf_memory.conversion.loading import values
from hf_memory.conversion.not_finite import first_not_finite
from hf_memory.conversion.processes import check_equal, check_share, gathered, together
from hf_memory.conversion.progress import Interruption, Voice
from hf_memory.conversion.schema import ConversionError
from hf_memory.conversion.stage_options import TrainingStage
from hf_memory.conversion.stages import StageModule, only_these_train, what_trains


# A stage ends early by the mean loss of so many steps.
STOP_STEPS = 20


@dataclass
class Run:
    """What the stages of one conversion share.

    Args:
        work: The folder it works in.
        checkpoint_seconds: Time between two checkpoints.
        voice: Where it speaks.
        accelerator: Processes, device and precision.
        student: The model that is trained.
        labels: Of all training stages, in order.
        identity: What must be the same when the run is continued, such as fingerprints of teacher and data.
        trained: Parameters of the student trained so far, by name; the stages add theirs.
        steps_behind: Steps of the stages that are done, which trackers count on from.
    """

    work: WorkFolder
    checkpoint_seconds: float
    voice: Voice
    accelerator: Accelerator
    student: PreTrainedModel
    labels: list[str]
    identity: dict[str, Any]
    trained: dict[str, nn.Parameter] = field(default_factory=dict)
    steps_behind: int = 0


def train_stage(
    run: Run, label: str, stage: StageModule, batches: Batches, steps: int, done: Checkpoint | None
) -> None:
    """Train one stage to its end.

    Every process takes its rows of each batch: row `n` belongs to process `n % processes`.

    Args:
        run: The conversion it belongs to.
        label: Of the stage.
        stage: What to train, towards what; from `make_stage`.
        batches: The blocks of every step, in all processes together.
        steps: How many there are; fewer are done when the stage's `stop_below` is reached.
        done: A checkpoint inside this stage to continue from.

    Raises:
        ConversionError: A loss or gradient that is not finite, or a checkpoint that cannot be written.
        KeyboardInterrupt: After a checkpoint, when asked to stop.
    """
    reached = run.trained | stage.parameters_by_name
    as_masters(reached)
    if done is not None:
        load_tensors(reached, done.tensors)
    if not stage.parameters_by_name:
        run.voice.say(f"{label}: nothing to train, left out")
        return
    if done is None or not done.ended:
        for line in what_trains(run.student, stage.parameters_by_name):
            run.voice.say(line)
        stage.prepare()
        with only_these_train(run.student, stage.parameters_by_name), Interruption() as interruption:
            loop = _Loop(run, label, stage, batches, steps, interruption)
            with _kept(run.work):
                loop.run_from(done)
        run.accelerator.free_memory()
    run.trained |= stage.finish()
    run.steps_behind += steps


def last_checkpoint(work: WorkFolder, accelerator: Accelerator, labels: list[str]) -> Checkpoint | None:
    """Where to go on from, in all processes; the log then ends there too."""
    done = None
    for holds in (True, False):
        # The process that holds the folder clears it before the others look.
        with together(accelerator):
            if work.holds == holds:
                done = work.latest(labels)
            if work.holds and holds:
                try:
                    work.log().rewind(labels, done)
                except OSError as error:
                    raise work.unwritable(error) from error
    check_equal(accelerator, "a checkpoint", None if done is None else done.name)
    return done


class _Loop:
    """The steps of one stage."""

    def __init__(
        self,
        run: Run,
        label: str,
        stage: StageModule,
        batches: Batches,
        steps: int,
        interruption: Interruption,
    ) -> None:
        self.run, self.label, self.stage, self.batches, self.steps = run, label, stage, batches, steps
        self.interruption, self.log = interruption, run.work.log()
        self.plain_optimizer = make_optimizer(stage)
        self.device = next(iter(stage.parameters_by_name.values())).device
        if run.accelerator.num_processes > 1:
            # Searching for parameters without a gradient, torch prints a warning where it finds none.
            stage.register_parameter("without_gradient", nn.Parameter(torch.zeros(1, device=self.device)))
        self.model, self.optimizer = run.accelerator.prepare(stage, self.plain_optimizer)
        self.recent: deque[float] = deque(maxlen=STOP_STEPS)
        self.began = self.saved_at = time.monotonic()
        self.tokens = 0
        # What the processes have agreed on: whether to stop, and whether a checkpoint is due.
        self.asked = self.due = False

    def run_from(self, done: Checkpoint | None) -> None:
        """All steps behind a checkpoint, with further checkpoints on the way."""
        run, start = self.run, 0
        if done is not None:
            start = done.step
            restore_moments(self.plain_optimizer, self.stage.parameters_by_name, done.tensors)
            self.recent.extend(done.numbers["recent"])
        with run.voice.progress(self.label, self.steps, start) as bar:
            for step in range(start, self.steps):
                note = self.step(step)
                bar.update(step + 1, note)
                low = self.low_enough()
                ended = low or step + 1 == self.steps
                if ended or self.asked or self.due:
                    name = self.save(step + 1, ended)
                    self.saved_at = time.monotonic()
                if self.asked:
                    run.voice.say(f"Stopped after the checkpoint {name}; the same command continues from it.")
                    raise KeyboardInterrupt
                if low:
                    below = self.stage.options.stop_below
                    run.voice.say(f"{self.label} ends: the mean loss of {STOP_STEPS} steps is below {below}.")
                    return

    def low_enough(self) -> bool:
        """Whether the stage has reached its `stop_below`."""
        below = self.stage.options.stop_below
        full = len(self.recent) == STOP_STEPS
        return below is not None and full and math.fsum(self.recent) / STOP_STEPS < below

    def step(self, step: int) -> str:
        """One update; what the progress bar says about it."""
        accelerator, options = self.run.accelerator, self.stage.options
        blocks = self.batches[step]
        check_share(accelerator, self.label, len(blocks))
        rows = blocks[accelerator.process_index :: accelerator.num_processes].to(self.device)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(options, group["peak"], step, self.steps)
        measured = self.gradients(step, rows)
        norm = accelerator.clip_grad_norm_(list(self.stage.parameters_by_name.values()), options.clip)
        due = time.monotonic() - self.saved_at >= self.run.checkpoint_seconds
        figures = self.agreed(
            measured
            | {"gradient_norm": norm, "asked": self.interruption.asked, "due": due and accelerator.is_main_process}
        )
        self.asked, self.due = figures.pop("asked") > 0, figures.pop("due") > 0
        loss, norm = figures.pop("loss"), figures.pop("gradient_norm")
        for what, value in (("loss", loss), ("gradient", norm)):
            if not math.isfinite(value):
                raise self.not_finite(what, value, step, rows, figures)
        self.optimizer.step()
        self.recent.append(loss)
        self.tokens += blocks[:, 1:].numel()
        speed = self.tokens / (time.monotonic() - self.began)
        self.write(
            {"stage": self.label, "step": step + 1, "tokens": (step + 1) * blocks[:, 1:].numel(), "loss": loss},
            figures
            | {
                "lr": self.optimizer.param_groups[0]["lr"],
                "gradient_norm": norm,
                "tokens_per_second": round(speed, 1),
            },
        )
        return f"loss {loss:.4g}, {speed:,.0f} tokens/s"

    def gradients(self, step: int, rows: Tensor, shared: bool = True) -> dict[str, Tensor]:
        """Leave the gradients of a step in the parameters; its loss and figures, of these rows.

        Args:
            step: Counted from 0.
            rows: `[B, T + 1]` int64, this process's part of the batch.
            shared: Whether processes share their gradients.
        """
        accelerator, totals = self.run.accelerator, {}
        # Dropout, where a teacher has it, then needs no state of a generator in the checkpoint.
        self.stage.step_seed = seed_of(*self.batches.seeds, step)
        torch.manual_seed(seed_of(self.stage.step_seed, accelerator.process_index))
        self.optimizer.zero_grad(set_to_none=True)
        parts = rows.chunk(min(self.stage.options.accumulate, len(rows)))
        for number, part in enumerate(parts):
            weight = len(part) / len(rows)
            waits = not shared or number + 1 < len(parts)
            with accelerator.no_sync(self.model) if waits else nullcontext():
                loss, figures = self.model(part)
                accelerator.backward(loss * weight)
            for name, value in ({"loss": loss} | figures).items():
                totals[name] = totals.get(name, 0.0) + torch.as_tensor(value).detach() * weight
        return totals

    def agreed(self, numbers: Mapping[str, float | Tensor]) -> dict[str, float]:
        """Means over the processes, in one message and one look at the device."""
        values = [torch.as_tensor(value, dtype=torch.float32, device=self.device) for value in numbers.values()]
        return dict(zip(numbers, self.run.accelerator.reduce(torch.stack(values), "mean").tolist()))

    def write(self, place: dict[str, Any], numbers: dict[str, float]) -> None:
        """One line for the log, and the same for the trackers."""
        if self.run.accelerator.is_main_process:
            self.log.add(place | numbers)
        values = {f"{self.label}/{name}": value for name, value in ({"loss": place["loss"]} | numbers).items()}
        self.run.accelerator.log(values, step=self.run.steps_behind + place["step"])

    def not_finite(
        self, what: str, value: float, step: int, rows: Tensor, figures: Mapping[str, float]
    ) -> ConversionError:
        """A sentence that says where it began, for which the step is done again under observation."""
        found = first_not_finite(
            self.stage, self.stage.parameters_by_name, lambda: self.gradients(step, rows, shared=False)
        )
        found = next(filter(None, gathered(self.run.accelerator, found)), "")
        found = found or next(
            (name for name, figure in figures.items() if not math.isfinite(figure)), "the loss alone"
        )
        good = self.run.work.last_good()
        return ConversionError(
            f"The {what} of stage {self.label} is {value} in step {step + 1} of {self.steps}; it began in {found} "
            f"(last good checkpoint: {good or 'none yet'}): begin anew with --restart and a smaller learning rate."
        )

    def save(self, step: int, ended: bool) -> str:
        """Write a checkpoint behind `step` updates; its name."""
        numbers = {"stage": self.label, "step": step, "ended": ended, "recent": list(self.recent)}
        numbers |= {"threads": torch.get_num_threads(), "processes": self.run.accelerator.num_processes}
        checkpoint = Checkpoint(self.label, step, numbers | self.run.identity, {})
        with together(self.run.accelerator):
            if self.run.accelerator.is_main_process:
                trained = self.run.trained | self.stage.parameters_by_name
                checkpoint.tensors.update({f"weight.{name}": value.detach().cpu() for name, value in trained.items()})
                if not ended:
                    checkpoint.tensors.update(moments(self.plain_optimizer, self.stage.parameters_by_name))
                self.run.work.save(checkpoint)
        return checkpoint.name


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
    """Learning rate of a step counted from 0: a linear rise over `warmup`, then what `schedule` says.

    `cosine` and `linear` fall from there to `floor * peak`, `wsd` linearly over the last `decay` of the steps, and
    `constant` not at all.
    """
    rise = round(options.warmup * steps)
    if step < rise:
        return peak * (step + 1) / rise
    start = max(rise, steps - round(options.decay * steps)) if options.schedule == "wsd" else rise
    fallen = max(0, step - start) / max(1, steps - start)
    left = {
        "cosine": 0.5 * (1 + math.cos(math.pi * fallen)),
        "linear": 1 - fallen,
        "wsd": 1 - fallen,
        "constant": 1.0,
    }[options.schedule]
    return peak * (options.floor + (1 - options.floor) * left)


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
    return torch.optim.AdamW(groups, betas=tuple(options.betas))


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


def fingerprint(model: PreTrainedModel) -> str:
    """Of a model's weights: names, shapes, and up to 256 evenly spread elements of each."""
    digest = hashlib.sha256()
    for name, value in values(model):
        flat = value.detach().flatten()
        sample = flat[:: max(1, flat.numel() // 256)][:256].float().cpu().numpy()
        digest.update(f"{name} {tuple(value.shape)}".encode() + sample.tobytes())
    return digest.hexdigest()
