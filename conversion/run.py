"""A conversion from its recipe to the folder of the finished model."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

from hf_memory._cli.loading import UserError, load_config, load_model, load_tokenizer, resolve_device
from hf_memory._cli.state_size import build_without_weights, readable_size
from hf_memory.conversion.adapters import save_adapters
from hf_memory.conversion.assessment import Assessment
from hf_memory.conversion.auto_layers import LABEL, SENSITIVITY, LayerSearch, alignment, publish_choices
from hf_memory.conversion.checkpoints import Checkpoint, WorkFolder
from hf_memory.conversion.data import Batches, Corpus, load_corpus
from hf_memory.conversion.footprint import PeakMeter, expected_peak
from hf_memory.conversion.layer_choice import is_auto, parse_budget, plan_cache
from hf_memory.conversion.loading import check_bits, layers_on_disk, load_teacher
from hf_memory.conversion.processes import (
    check_equal,
    check_share,
    from_main,
    leave,
    lost_another,
    make_accelerator,
    place_of,
    together,
    tracked,
)
from hf_memory.conversion.progress import Voice, sigterm_like_ctrl_c
from hf_memory.conversion.recipe import ConversionError, Recipe
from hf_memory.conversion.sampling import SampledText, is_teacher, sampled_size
from hf_memory.conversion.stage_options import TrainingStage
from hf_memory.conversion.stages import make_stage
from hf_memory.conversion.surgery import build_student, memory_parameters
from hf_memory.conversion.teachers import attention_of_layers, refuse_unsupported
from hf_memory.conversion.training import (
    Run,
    as_masters,
    fingerprint,
    last_checkpoint,
    load_tensors,
    seed_of,
    train_stage,
)


if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


# A full disk, a quota, and a limit on the size of files.
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def convert(recipe: Recipe, *, restart: bool = False) -> Path:
    """
    Convert a teacher as a recipe says, or continue where an earlier call was cut off.

    What is not finished lies in `<output>.converting`; the output appears in one step when it is complete. A
    conversion that was cut off, whether by Ctrl-C, an error or a kill, goes on from its last checkpoint when the same
    recipe is given again, and with the same number of threads and processes ends in the same weights, bit for bit.

    Under `torchrun` or `accelerate launch` every process calls this; each takes its share of every batch, and they end
    within rounding of one process.

    Args:
        recipe: What to do.
        restart: Delete what an earlier conversion to the same output left. Default: continue it.

    Returns:
        The folder of the model. A requirement that is not met does not keep it back: `gate.failures` of what
        `read_report` finds in the folder names those.

    Raises:
        ConversionError: One sentence, for an input that cannot be used, a work folder that belongs to another recipe,
            a loss that is not finite, a disk that is full, or another process that ended.
        KeyboardInterrupt: After Ctrl-C or SIGTERM, behind a checkpoint.

    Example:

    ```python
    >>> from hf_memory.conversion.recipe import read_recipe
    >>> from hf_memory.conversion.run import convert

    >>> recipe = read_recipe(flags={"teacher": "my-llama", "layers": "odd", "data": "text.txt", "output": "my-hybrid"})
    >>> convert(recipe)
    ```
    """
    try:
        device = resolve_device(recipe.device)
        runs = WorkFolder(recipe.output).runs
        accelerator = make_accelerator(device, _compute_dtype(recipe, device), recipe.report_to, runs)
        with sigterm_like_ctrl_c(), ExitStack() as stack:
            work = WorkFolder(recipe.output, restart, accelerator.is_main_process)
            with together(accelerator):
                stack.enter_context(work)
                conversion = _Conversion(recipe, work, accelerator)
            folder = conversion.run()
        leave(accelerator)
        return folder
    except UserError as error:
        raise ConversionError(str(error)) from error
    except StrictDataclassError as error:
        # A field of the memory's configuration; the cause has the sentence.
        raise ConversionError(f"A memory cannot be built like this: {error.__cause__ or error}") from error
    except OSError as error:
        # What is read has sentences of its own; that there is no room shows wherever something is written.
        if error.errno in NO_ROOM:
            raise work.unwritable(error) from error
        raise
    except RuntimeError as error:
        if lost_another(error):
            good = work.last_good() or "none yet"
            raise ConversionError(
                f"Another process of this conversion has ended; it said why (last good checkpoint: {good})."
            ) from error
        raise


class _Conversion:
    """One call of `convert`."""

    def __init__(self, recipe: Recipe, work: WorkFolder, accelerator: Accelerator) -> None:
        self.work, self.accelerator = work, accelerator
        self.voice = Voice(silent=not accelerator.is_main_process)
        self.origin = (recipe.trust_remote_code, recipe.revision)
        self.config = self._teacher_config(recipe)
        self.recipe = recipe
        self.device = place_of(accelerator, resolve_device(recipe.device))
        self.placement = recipe.device_map
        self.dtype = _compute_dtype(recipe, self.device)
        # Now: a model made of a configuration writes its own dtype into it.
        self.saved_dtype = self._saved_dtype()
        with torch.device("meta"):
            self.skeleton = build_without_weights(self.config, self.dtype)
        refuse_unsupported(self.skeleton)
        self.attention = list(attention_of_layers(self.skeleton))
        numbers = self._layers
        if not is_auto(recipe.layers):
            # Numbers instead of words, so that the same layers under another name are the same recipe.
            self.recipe = replace(recipe, layers=numbers)

    def run(self) -> Path:
        main = self.accelerator.is_main_process
        with together(self.accelerator):
            for label, stage in self._all_stages.items():
                check_share(self.accelerator, label, self.recipe.batch_size_of(stage))
            self.work.compare(self.recipe)
        if from_main(self.accelerator, self.work.finished):
            self.voice.say(f"{str(self.work.output)!r} was finished before.")
            return self.work.output
        with together(self.accelerator):
            self._check_surgery()
            if main and is_teacher(self.recipe.data):
                self.work.claim(self.recipe)
                self.voice.say(f"Expected peak of memory: {self.expected}")
                self._sample()
        with together(self.accelerator):
            tokenizer, corpus = self._text()
            if corpus is not None:
                parts = (self.recipe, self.work, self.voice, self.accelerator, self.device, self.dtype)
                self.assessment = Assessment(*parts, corpus, tokenizer)
            self.work.claim(self.recipe)
        if not is_teacher(self.recipe.data):
            self.voice.say(f"Expected peak of memory: {self.expected}")
        self.peak = PeakMeter(self.device)
        # Teacher and student of the training are gone by the time the model is built again.
        trained = self._train(corpus)
        if "continued" in self.recipe.controls:
            self.assessment.train_control(self._load(self._precision, self.device, None, None))
        with together(self.accelerator):
            if main:
                self._write(trained, tokenizer, corpus)
        return self.work.output

    def _write(
        self, trained: dict[str, torch.Tensor], tokenizer: PreTrainedTokenizerBase | None, corpus: Corpus | None
    ) -> None:
        final = self._final_model(trained)
        try:
            self._assemble(final, trained, tokenizer, corpus)
            if self.work.runs.exists():
                shutil.copytree(self.work.runs, self.work.model / self.work.runs.name)
            self.work.publish()
        except Exception as error:  # tokenizers has no class of its own for a file that it cannot write
            if isinstance(error, (OSError, SafetensorError)) or "os error" in str(error):
                raise self.work.unwritable(error) from error
            raise

    def _teacher_config(self, recipe: Recipe) -> PreTrainedConfig:
        from transformers import CONFIG_MAPPING

        if not Path(recipe.teacher).exists() and recipe.teacher in CONFIG_MAPPING:
            raise ConversionError(f"`teacher` {recipe.teacher!r} names an architecture: name a saved model.")
        config = load_config(recipe.teacher, *self.origin)
        if config.model_type == "memory_hybrid":
            raise ConversionError(
                f"`teacher` {recipe.teacher!r} is a hybrid already: name the model it was made from."
            )
        longest = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
        wanted = max([recipe.context, *(recipe.context_of(stage) for stage in recipe.training_stages.values())])
        if recipe.data is not None and longest is not None and wanted > longest:
            raise ConversionError(f"`context` {wanted} is beyond the {longest} positions that the teacher knows.")
        return config

    def _check_surgery(self) -> None:
        """Surgery and stages on tensors without memory, before anything large is loaded; what the run will need."""
        check_bits(self.recipe.teacher_bits)
        skeleton = self.skeleton
        with torch.device("meta"):
            student = self._student_of(skeleton)
            self.cache_plan = None
            if self.recipe.cache_budget is not None:
                everywhere = self._student_of(skeleton, self.attention).config
                budget = parse_budget(self.recipe.cache_budget)
                self.cache_plan = plan_cache(budget, self.config, everywhere, self.saved_dtype)
        if self.recipe.stream:
            self.placement = layers_on_disk(skeleton, self.device)
        parts = (self.recipe, skeleton, student, self.device, self.accelerator.num_processes)
        self.expected = expected_peak(*parts)
        with torch.device("meta"):
            for options in self._all_stages.values():
                make_stage(options, skeleton, student).finish()
        if self.cache_plan is not None and not self._searches:
            self.cache_plan.check(self._layers)
        elif self.cache_plan is not None:
            self.cache_plan.check_search()

    @property
    def _precision(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def _num_layers(self) -> int:
        return self.config.get_text_config(decoder=True).num_hidden_layers

    @property
    def _layers(self) -> list[int]:
        """The layers to convert; all, as long as they are not found yet."""
        return self.recipe.layer_numbers(self._num_layers, self.attention)

    @property
    def _searches(self) -> bool:
        return is_auto(self.recipe.layers) and self.recipe.chosen_layers is None

    @property
    def _all_stages(self) -> dict[str, TrainingStage]:
        """The stages that train, with the alignment of all layers in front when layers are to be found."""
        searched = {LABEL: alignment(self.recipe)} if self._searches else {}
        return searched | self.recipe.training_stages

    def _saved_dtype(self) -> torch.dtype:
        if self.recipe.save_dtype != "teacher":
            return getattr(torch, self.recipe.save_dtype)
        return self.config.get_text_config(decoder=True).dtype or torch.float32

    def _student_of(self, teacher: PreTrainedModel, layers: Sequence[int] | None = None) -> PreTrainedModel:
        recipe = self.recipe
        try:
            return build_student(
                teacher,
                layers=self._layers if layers is None else layers,
                memory=recipe.memory,
                memory_options=recipe.memory_options,
                mode=recipe.mode,
                window=recipe.window,
                seed=recipe.seed,
            )
        except ValueError as error:
            raise ConversionError(str(error)) from error

    def _text(self) -> tuple[PreTrainedTokenizerBase | None, Corpus | None]:
        if self.recipe.data is None:
            try:
                return load_tokenizer(self.recipe.teacher, *self.origin), None
            except UserError:
                # Nothing is read: a teacher without a tokenizer becomes a student without one.
                return None, None
        tokenizer = load_tokenizer(self.recipe.teacher, *self.origin)
        tokens = self._sampled().read() if is_teacher(self.recipe.data) else None
        with self.voice.progress("reading, in characters", None) as bar:
            corpus = load_corpus(
                self.recipe, tokenizer, lambda tokens, read: bar.update(read, f"{tokens:,} tokens"), tokens
            )
        vocabulary = self.config.get_text_config(decoder=True).vocab_size
        if (highest := max(part.max() for part in (corpus.train, corpus.held_out))) >= vocabulary:
            raise ConversionError(
                f"The tokenizer beside `teacher` {self.recipe.teacher!r} gives the token {highest}, but the teacher "
                f"knows {vocabulary} only: put the tokenizer there that it was trained with."
            )
        return tokenizer, corpus

    def _sampled(self) -> SampledText:
        """Text of the teacher's own, kept in the work folder: a resumed run reads the same."""
        return SampledText(self.work.path / "sampled.bin", *sampled_size(self.recipe))

    def _sample(self) -> None:
        text = self._sampled()
        if not text.missing:
            return
        tokenizer = load_tokenizer(self.recipe.teacher, *self.origin)
        teacher = self._load_teacher(self._precision, self.device)
        if tokenizer.bos_token_id is None:
            self.voice.say("The teacher has no token to begin a text with: each begins with a random one.")
        what = "sampling from the teacher, in tokens"
        with self.voice.progress(what, text.size, text.size - text.missing) as bar:
            try:
                text.write(teacher, tokenizer, self.recipe.batch_size, self.recipe.seed, bar.update)
            except OSError as error:
                raise self.work.unwritable(error) from error

    def _train(self, corpus: Corpus | None) -> dict[str, torch.Tensor]:
        """The weights that are no longer those of the start behind all stages, by name, on the CPU."""
        from hf_memory.conversion.card import without_paths

        recipe, stages = self.recipe, self.recipe.training_stages
        labels = list(self._all_stages)
        done = last_checkpoint(self.work, self.accelerator, labels)
        with together(self.accelerator):
            precision = self._precision
            teacher = self._load_teacher(precision, self.device)
            # Weights in a few bits are nothing to inherit.
            source = teacher if recipe.teacher_bits is None else self._load_plain(precision, torch.device("cpu"))
            identity = {"teacher": fingerprint(source), "data": corpus.fingerprint if corpus is not None else ""}
            if done is not None:
                self._check_unchanged(done, identity)
            student = self._student_of(source).requires_grad_(True).to(self.device)
            del source
        check_equal(self.accelerator, "a teacher", identity["teacher"])
        check_equal(self.accelerator, "data", identity["data"])
        run = Run(self.work, recipe.checkpoint_seconds, self.voice, self.accelerator, student, labels, identity)
        # When layers are chosen, another takes its place.
        del student
        if done is not None:
            self.voice.say(f"Continuing from the checkpoint {done.name}.")
        with tracked(self.accelerator, self.work.output.name, without_paths(recipe.to_dict())):
            if self._searches:
                self._choose_layers(run, teacher, corpus, done)
            self._say_plan(run.student, corpus)
            if stages:
                self.assessment.behind_stage("init", teacher, run.student)
            behind = -1 if done is None or done.stage == LABEL else list(stages).index(done.stage)
            for number, (label, options) in enumerate(stages.items()):
                stage = make_stage(options, teacher, run.student, seed_of(recipe.seed, number))
                steps = recipe.steps_of(options)
                if number < behind:
                    run.trained |= stage.finish()
                    run.steps_behind += steps
                    continue
                size, context = recipe.batch_size_of(options), recipe.context_of(options)
                batches = Batches(corpus.train, context, size, (recipe.seed, number))
                train_stage(run, label, stage, batches, steps, done if number == behind else None)
                self.assessment.behind_stage(label, teacher, run.student)
        return {name: value.detach().cpu() for name, value in run.trained.items()}

    def _choose_layers(self, run: Run, teacher: PreTrainedModel, corpus: Corpus, done: Checkpoint | None) -> None:
        """Put a student with memories in the layers that cost least into a run; its memories start aligned."""
        chosen, tensors = LayerSearch(run, self.recipe, teacher, corpus, self.cache_plan).choose(done)
        self.recipe = replace(self.recipe, chosen_layers=chosen)
        run.student = self._student_of(teacher).requires_grad_(True)
        run.trained = memory_parameters(run.student)
        as_masters(run.trained)
        if tensors:
            load_tensors(run.trained, tensors)

    def _load_teacher(self, dtype: str, device: torch.device) -> PreTrainedModel:
        """The teacher to read with, placed as the recipe says."""
        return self._load(dtype, device, self.placement, self.recipe.teacher_bits)

    def _load(
        self, dtype: str, device: torch.device, placement: str | dict[str, Any] | None, bits: int | None
    ) -> PreTrainedModel:
        self.voice.say(f"Loading {self.recipe.teacher}")
        how = {"device_map": placement, "bits": bits, "offload": self.work.path / "offload"}
        origin = dict(zip(("trust_remote_code", "revision"), self.origin))
        return load_teacher(self.recipe.teacher, device, dtype, **how, **origin)

    def _load_plain(self, dtype: str, device: torch.device) -> PreTrainedModel:
        """The teacher as it is stored, with its layers on disk if it is streamed."""
        placement = None
        if self.recipe.stream:
            placement = {name: "disk" if where == "disk" else str(device) for name, where in self.placement.items()}
        return self._load(dtype, device, placement, None)

    def _check_unchanged(self, done: Checkpoint, identity: dict[str, str]) -> None:
        for name, value in identity.items():
            if done.numbers.get(name) != value:
                raise ConversionError(
                    f"The {name} is not what checkpoint {done.name} was trained with: put it back "
                    "to continue, or pass --restart (restart=True) to begin anew."
                )
        present = {"threads": torch.get_num_threads(), "processes": self.accelerator.num_processes}
        for name, value in present.items():
            if (before := done.numbers.get(name)) != value:
                self.voice.say(
                    f"The checkpoint was made with {name}: {before}, now they are {value}: sums may round differently "
                    "from here on."
                )

    def _say_plan(self, student: PreTrainedModel, corpus: Corpus | None) -> None:
        recipe, say = self.recipe, self.voice.say
        layers = ", ".join(map(str, self._layers)) or "none"
        how = {"replace": "in place of attention", "retrofit": "beside attention over a window"}[recipe.mode]
        say(f"Teacher {recipe.teacher}: {self.config.model_type}, {student.config.num_hidden_layers} layers")
        say(f"Layers that get a {recipe.memory} memory {how}: {layers}")
        say("Inherited: projections of queries, keys, values and output; all outside the memories, bit for bit")
        new = sum(value.numel() for value in memory_parameters(student).values())
        say(f"Parameters: {new:,} in memories, {student.num_parameters() - new:,} of the teacher's")
        if corpus is not None:
            say(f"Text: {len(corpus.train):,} tokens to train on, {len(corpus.held_out):,} held out")
        for label, stage in recipe.training_stages.items():
            steps, size, length = recipe.steps_of(stage), recipe.batch_size_of(stage), recipe.context_of(stage)
            trains = stage.trainable if stage.lora_rank is None else f"adapters in {stage.trainable}"
            say(
                f"Stage {label} trains {trains}: {stage.tokens:,} tokens, {steps:,} steps of {size} blocks of {length}"
            )
        precision = self._precision
        say(f"On {self.device} in {precision}; unfinished work lies in {self.work.path}")

    def _final_model(self, trained: dict[str, torch.Tensor]) -> PreTrainedModel:
        """The teacher's tensors as they are stored, with the surgery done again and the trained weights on top."""
        final = self._student_of(self._load_plain("auto", torch.device("cpu")))
        with torch.no_grad():
            for name, parameter in final.named_parameters():
                if name in trained:
                    parameter.copy_(trained[name])
        return final

    def _assemble(
        self,
        final: PreTrainedModel,
        trained: dict[str, torch.Tensor],
        tokenizer: PreTrainedTokenizerBase | None,
        corpus: Corpus | None,
    ) -> None:
        from hf_memory.conversion.card import write_card, write_recipe
        from hf_memory.conversion.report import write_report

        folder, recipe = self.work.model, self.recipe
        final.save_pretrained(folder)
        if recipe.save_dtype != "teacher":
            # Through loading, which knows what has to stay in float32.
            load_model(str(folder), "cpu", recipe.save_dtype).save_pretrained(folder)
        for stage in recipe.training_stages.values():
            if not stage.lora_merge:
                save_adapters(stage, trained, folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        report = None
        if corpus is not None:
            report = self._report()
            write_report(report, folder, self.voice.console)
        if recipe.code:
            from hf_memory.hub.remote_code import export_remote_code

            export_remote_code(final, folder)
        publish_choices(self.work.path / SENSITIVITY, folder, f"{Path(recipe.teacher).name}: {recipe.layers}")
        write_recipe(folder, recipe.to_dict())
        revision = getattr(self.config, "_commit_hash", None) or recipe.revision
        write_card(folder, config=final.config, recipe=recipe.to_dict(), report=report, revision=revision)

    def _report(self) -> dict[str, Any]:
        """Teacher, saved student and controls measured on the held-out blocks, and the peak of memory."""
        teacher = self._load_teacher(self._precision, self.device)
        stages = {LABEL: alignment(self.recipe)} | self.recipe.training_stages
        report = self.assessment.report(teacher, self._layers, stages, self.saved_dtype)
        used, expected = self.peak.measure(), self.expected
        report["peak"] = {"expected": expected.total, "when": expected.when, "parts": expected.parts, "used": used}
        measured = "not known" if used is None else f"{readable_size(used)} used"
        report.setdefault("notes", []).append(
            f"Peak of memory on {self.device}: {measured}, {readable_size(expected.total)} expected."
        )
        return report


def _compute_dtype(recipe: Recipe, device: torch.device) -> torch.dtype:
    if recipe.dtype != "auto":
        return getattr(torch, recipe.dtype)
    has_bfloat16 = device.type == "cuda" and torch.cuda.is_bf16_supported()
    return torch.bfloat16 if has_bfloat16 else torch.float32


def read_report(folder: Path) -> dict[str, Any] | None:
    """The report of a converted model; `None` when nothing was measured."""
    file = folder / "report.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None
