"""What a conversion measures: the student behind every stage, the finished model beside its teacher and controls."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from hf_memory._cli.loading import load_model
from hf_memory.conversion.adapters import load_adapters
from hf_memory.conversion.checkpoints import WorkFolder, read_whole, write_whole
from hf_memory.conversion.controls import CONTINUED, OFF, STUDENT, TEACHER, Chain, MemoryOff, control_options
from hf_memory.conversion.data import Batches, Corpus, bytes_per_token
from hf_memory.conversion.evaluate import SPEED_CONTEXTS, evaluate_pair
from hf_memory.conversion.gate import check, parse
from hf_memory.conversion.probe import Probe, probe_lengths
from hf_memory.conversion.processes import together, tracked
from hf_memory.conversion.progress import Voice
from hf_memory.conversion.recipe import Recipe
from hf_memory.conversion.report import environment, measure
from hf_memory.conversion.schema import ConversionError
from hf_memory.conversion.stage_options import TrainingStage
from hf_memory.conversion.stages import make_stage
from hf_memory.conversion.training import Run, fingerprint, last_checkpoint, load_tensors, seed_of, train_stage


if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

STAGE_BLOCKS = 8
"""Held-out blocks that the student is measured on behind a stage."""
CURVE_POINTS = 400
"""A curve in the report has so many points at most, each the mean of the steps around it."""
CONTROL = "continued"


class Assessment:
    """The measurements of one conversion.

    Args:
        recipe: What to do.
        work: Its folder. What is measured behind a stage is kept there, as is the teacher that is trained on.
        voice: Where to speak.
        accelerator: Processes and precision. The main process alone measures; all of them train the control.
        device, dtype: To compute on and in.
        corpus: Training and held-out tokens.
        tokenizer: The teacher's.

    Raises:
        ConversionError: A requirement on recall where no context is long enough to ask for anything.
    """

    def __init__(
        self,
        recipe: Recipe,
        work: WorkFolder,
        voice: Voice,
        accelerator: Accelerator,
        device: torch.device,
        dtype: torch.dtype,
        corpus: Corpus,
        tokenizer: PreTrainedTokenizerBase,
    ) -> None:
        self.recipe, self.work, self.voice, self.accelerator = recipe, work, voice, accelerator
        self.device, self.dtype = device, dtype
        self.corpus, self.tokenizer = corpus, tokenizer
        self.probe = Probe(
            tokenizer, corpus.held_out, probe_lengths(recipe.context), recipe.recall_samples, seed=recipe.seed
        )
        if not self.probe.lengths and any(parse(text).name == "recall" for text in recipe.require):
            raise ConversionError(
                f"`require` names recall, but blocks of {recipe.context} tokens are too short to hide a line in and "
                "ask for it: give a larger `context`, or drop the requirement."
            )

    def behind_stage(self, label: str, teacher: PreTrainedModel, student: PreTrainedModel) -> None:
        """Measure the student on a part of the held-out blocks, unless that was done before, and keep the figures."""
        with together(self.accelerator):
            if self.recipe.evaluate_stages and self.accelerator.is_main_process:
                self._measure_stage(label, teacher, student)

    def _measure_stage(self, label: str, teacher: PreTrainedModel, student: PreTrainedModel) -> None:
        stages = self.stages()
        if any(stage["stage"] == label for stage in stages):
            return
        blocks = self.corpus.held_out_blocks(self.recipe.context, min(STAGE_BLOCKS, self.recipe.held_out_blocks))
        with self.accelerator.autocast():
            found = evaluate_pair(teacher, student, blocks, bytes_per_token=bytes_per_token(blocks, self.tokenizer))
        parts = {
            name: {"whole": asdict(quality.whole), "curve": [asdict(span) for span in quality.curve]}
            for name, quality in found.items()
        }
        stages.append({"stage": label, "blocks": len(blocks)} | parts)
        try:
            write_whole(self._stages_file, json.dumps(stages, indent=2) + "\n")
        except OSError as error:
            raise self.work.unwritable(error) from error
        own, its = found["student"].whole, found["teacher"].whole
        self.voice.say(
            f"Behind {label}, on {len(blocks)} held-out blocks: {own.bits_per_byte:.4f} bits per byte (teacher "
            f"{its.bits_per_byte:.4f}), KL {own.kl_bits_per_token:.4f} bits per token, agreement {own.agreement:.1%}"
        )

    @property
    def _stages_file(self) -> Path:
        return self.work.path / "stages.json"

    def stages(self) -> list[dict[str, Any]]:
        """What was measured behind the stages so far: the entry `stages` of a report.

        Each has the `stage`, the number of `blocks`, and of `student` and `teacher` the spans `whole` and `curve` of
        `evaluate.Quality`.
        """
        file = self._stages_file
        return read_whole(file, json.loads) if file.exists() else []

    @property
    def _control_work(self) -> WorkFolder:
        return WorkFolder(self.work.path / CONTROL, holds=self.accelerator.is_main_process)

    def train_control(self, teacher: PreTrainedModel) -> None:
        """Train the teacher on with cross entropy, on the blocks of all stages in their order.

        One run of AdamW over all of them, with `continued_lr`. It goes on from its own checkpoints, and the last one,
        which stays in the work folder, is the control.

        Args:
            teacher: On the device; it is changed.
        """
        recipe, seeds = self.recipe, (self.recipe.seed, len(self.recipe.training_stages))
        taken = Counter(line["stage"] for line in self.work.log().read())
        parts = []
        for number, (label, stage) in enumerate(recipe.training_stages.items()):
            size = recipe.batch_size_of(stage)
            batches = Batches(self.corpus.train, recipe.context_of(stage), size, (recipe.seed, number))
            parts.append((batches, taken[label]))
        chain = Chain(parts, seeds)
        if not len(chain):
            return
        identity = {"teacher": fingerprint(teacher), "data": self.corpus.fingerprint}
        work = self._control_work
        with ExitStack() as stack:
            with together(self.accelerator):
                stack.enter_context(work)
                work.claim(recipe)
            done = last_checkpoint(work, self.accelerator, [CONTROL])
            if done is not None and any(done.numbers.get(name) != value for name, value in identity.items()):
                raise ConversionError(
                    "The teacher or the data is not what the control was trained with: put it back to continue, or "
                    "pass --restart (restart=True) to begin anew."
                )
            options = control_options(recipe)
            stage = make_stage(options, teacher, teacher.requires_grad_(True), seed_of(*seeds))
            run = Run(work, recipe.checkpoint_seconds, self.voice, self.accelerator, teacher, [CONTROL], identity)
            self.voice.say(f"A control: the teacher trained on, {len(chain):,} steps on the same blocks")
            with tracked(self.accelerator, f"{self.work.output.name}-{CONTROL}", asdict(options)):
                train_stage(run, CONTROL, stage, chain, len(chain), done)

    def report(
        self,
        teacher: PreTrainedModel,
        layers: list[int],
        stages: Mapping[str, TrainingStage],
        saved_dtype: torch.dtype,
    ) -> dict[str, Any]:
        """Teacher, saved student and controls measured on the held-out blocks.

        Args:
            teacher: On the device, in the dtype to compute in.
            layers: That were converted.
            stages: All that left losses in the log, by their labels.
            saved_dtype: Of the saved model: caches are counted in it, whatever is computed in.
        """
        recipe, precision = self.recipe, str(self.dtype).removeprefix("torch.")
        blocks = self.corpus.held_out_blocks(recipe.context, recipe.held_out_blocks)
        models: dict[str, PreTrainedModel | MemoryOff] = {TEACHER: teacher}
        saved = str(self.work.model)
        models[STUDENT] = load_adapters(load_model(saved, str(self.device), precision), self.work.model)
        controls, logged = {}, curves(self.work.log().read(), stages)
        if layers:
            controls["off"], models[OFF] = OFF, MemoryOff(models[STUDENT])
        if "continued" in recipe.controls and recipe.training_stages:
            controls["continued"], models[CONTINUED] = CONTINUED, self._load_control(precision)
            logged += curves(self._control_work.log().read(), {CONTROL: control_options(recipe)}, CONTINUED)
        required = [parse(text) for text in recipe.require]
        with self.voice.progress("evaluating, in blocks", len(blocks)) as bar:
            measured = measure(
                models,
                blocks,
                reference=TEACHER,
                bytes_per_token=bytes_per_token(blocks, self.tokenizer),
                speed_contexts=self._speed_contexts(),
                cache_contexts=[requirement.tokens for requirement in required if requirement.name == "cache_bytes"],
                cache_dtype=saved_dtype,
                on_progress=lambda done, total: bar.update(done),
            )
        if self.probe.lengths and self.probe.samples:
            with self.voice.progress("asking for what was hidden, in texts", self.probe.samples) as bar:
                recalled = self.probe.run(models, on_progress=lambda done, total: bar.update(done))
            for name, recall in recalled.items():
                measured[name]["recall"] = asdict(recall)
        report = {
            "title": f"{Path(recipe.teacher).name} with {recipe.memory} memory",
            "converted": {
                "layers": layers,
                "of": teacher.config.get_text_config(decoder=True).num_hidden_layers,
                "memory": recipe.memory,
                "mode": recipe.mode,
            },
            "student": STUDENT,
            "reference": TEACHER,
            "controls": controls,
            "models": measured,
            "stages": self.stages(),
            "curves": logged,
            "environment": environment(self.device) | {"dtype": precision},
        }
        if "off" in controls:
            report["notes"] = ["Memory off: the finished student, in which no token changes a memory."]
        return report | ({"gate": check(report, recipe.require)} if recipe.require else {})

    def _speed_contexts(self) -> list[int]:
        """Those of the table that fit; where a speed is required and none of them does, the context itself."""
        context = self.recipe.context
        fitting = [tokens for tokens in SPEED_CONTEXTS if tokens <= context]
        return fitting or [context] if any(parse(text).name == "speed" for text in self.recipe.require) else fitting

    def _load_control(self, precision: str) -> PreTrainedModel:
        recipe = self.recipe
        origin = (recipe.trust_remote_code, recipe.revision)
        model = load_model(recipe.teacher, str(self.device), precision, *origin).requires_grad_(False)
        with self._control_work as work:
            load_tensors(dict(model.named_parameters()), work.latest([CONTROL]).tensors)
        return model


def curves(log: list[dict[str, Any]], stages: Mapping[str, TrainingStage], run: str = STUDENT) -> list[dict[str, Any]]:
    """The losses of a log by stage, as a report draws them; `stages` by their labels."""
    found = []
    for label in dict.fromkeys(line["stage"] for line in log):
        lines = [line for line in log if line["stage"] == label]
        width = -(-len(lines) // CURVE_POINTS)
        groups = [lines[start : start + width] for start in range(0, len(lines), width)]
        found.append(
            {
                "stage": label,
                "run": run,
                "unit": stages[label].unit,
                "tokens": [group[-1]["tokens"] for group in groups],
                "loss": [sum(line["loss"] for line in group) / len(group) for group in groups],
            }
        )
    return found
