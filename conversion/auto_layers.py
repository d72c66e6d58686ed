"""`layers: auto`: align memories in all layers once, then find those that cost the least."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from hf_memory.conversion.data import Batches, Corpus, spread_blocks
from hf_memory.conversion.layer_choice import CachePlan
from hf_memory.conversion.schema import ConversionError
from hf_memory.conversion.sensitivity import (
    Choice,
    measurements,
    parts_of,
    plot_choices,
    read_choices,
    search_layers,
    sensitivity_table,
    write_choices,
)
from hf_memory.conversion.stage_options import AlignStage
from hf_memory.conversion.stages import make_stage
from hf_memory.conversion.surgery import memory_parameters
from hf_memory.conversion.training import Run, train_stage


if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from hf_memory.conversion.checkpoints import Checkpoint
    from hf_memory.conversion.recipe import Recipe

# Label of the alignment of all layers, in front of the stages of the recipe.
LABEL = "auto"
SENSITIVITY = "sensitivity.json"
# Another seed than that of any stage: they are counted from 0.
_NUMBER = 2**31


def alignment(recipe: Recipe) -> AlignStage:
    """The stage that aligns all layers: as the recipe's first alignment, but of whole memories to whole blocks."""
    aligning = [stage for stage in recipe.stages if isinstance(stage, AlignStage)]
    # Matrices are oriented with blocks and rates of their own; outputs are what is measured.
    first = next((stage for stage in aligning if stage.target != "matrix"), AlignStage())
    whole = {"target": "block", "stream": "teacher", "trainable": "memory", "stop_below": None}
    adapters = {"lora_rank": None, "lora_targets": None, "lora_merge": True}
    return replace(first, tokens=recipe.auto_tokens or first.tokens, **whole, **adapters)


class LayerSearch:
    """The search of one conversion.

    Args:
        run: Its student has memories in all layers, and its first label is `LABEL`.
        recipe: With `layers` of auto.
        teacher: Frozen.
        corpus: The text; it is measured on what the stages train on, and the held-out part stays unseen.
        plan: Of the cache, where a budget says how many layers; None with auto:K.
    """

    def __init__(
        self, run: Run, recipe: Recipe, teacher: PreTrainedModel, corpus: Corpus, plan: CachePlan | None
    ) -> None:
        self.run, self.recipe, self.teacher, self.corpus = run, recipe, teacher, corpus
        self.file = run.work.path / SENSITIVITY
        self.candidates = sorted(run.student.config.memory_layers) if plan is None else plan.saving
        wanted = int(recipe.layers.partition(":")[2]) if plan is None else plan.needed()
        self.wanted = wanted
        self.enough: Callable[[list[int]], bool] = (
            plan.fits if plan is not None else lambda layers: len(layers) >= wanted
        )

    def choose(self, done: Checkpoint | None) -> tuple[list[int], dict[str, Tensor]]:
        """The layers, and the aligned weights of all memories as in a checkpoint.

        Args:
            done: Where the conversion stands. Behind the search, there are no weights to return: they are in there.
        """
        choices = read_choices(self.file)
        if done is not None and done.stage != LABEL:
            if not self.enough([choice.layer for choice in choices]):
                raise ConversionError(
                    f"{str(self.file)!r} is missing or incomplete, and a later stage has begun: pass --restart "
                    "(restart=True) to begin anew."
                )
            self.run.steps_behind += self.recipe.steps_of(alignment(self.recipe))
            return sorted(choice.layer for choice in choices), {}
        self._align(done)
        choices = self._search(choices)
        tensors = {
            f"weight.{name}": value.detach().cpu() for name, value in memory_parameters(self.run.student).items()
        }
        return sorted(choice.layer for choice in choices), tensors

    def _align(self, done: Checkpoint | None) -> None:
        run, recipe, options = self.run, self.recipe, alignment(self.recipe)
        if done is None or not done.ended:
            run.voice.say(f"To find the layers that cost the least, all are aligned first: {options.tokens:,} tokens")
        stage = make_stage(options, self.teacher, run.student, recipe.seed)
        batches = Batches(
            self.corpus.train, recipe.context_of(options), recipe.batch_size_of(options), (recipe.seed, _NUMBER)
        )
        train_stage(run, LABEL, stage, batches, recipe.steps_of(options), done)

    def _search(self, known: Sequence[Choice]) -> Sequence[Choice]:
        run, recipe = self.run, self.recipe
        blocks = spread_blocks(self.corpus.train, recipe.context, recipe.auto_blocks)[:, :-1]
        total, made = (measurements(len(self.candidates), count) for count in (self.wanted, len(known)))
        run.voice.say(
            f"Choosing {self.wanted} of {len(self.candidates)} layers: {total:,} measurements of {len(blocks)} blocks "
            f"of {blocks.shape[1]} tokens, {made:,} of them made"
        )
        passes = len(parts_of(blocks, self.teacher, run.accelerator))
        count = itertools.count(made * passes + 1)
        with self._interruptible(), run.voice.progress("choosing layers", total * passes, made * passes) as bar:
            choices = search_layers(
                self.teacher,
                run.student,
                blocks,
                self.candidates,
                self.enough,
                known=known,
                accelerator=run.accelerator,
                on_forward=lambda: bar.update(next(count)),
                on_choice=lambda choices: self._keep(choices, blocks.numel()),
            )
        if choices:
            run.voice.console.print(sensitivity_table(choices))
        return choices

    @contextmanager
    def _interruptible(self) -> Iterator[None]:
        """What was chosen is on disk after every choice: there is nothing to wait for."""
        try:
            yield
        except KeyboardInterrupt:
            count = len(read_choices(self.file))
            self.run.voice.say(f"Stopped with {count} of {self.wanted} layers chosen; the same command continues.")
            raise

    def _keep(self, choices: list[Choice], tokens: int) -> None:
        if self.run.accelerator.is_main_process:
            write_choices(choices, self.file, tokens)


def publish_choices(work_file: Path, folder: Path, title: str) -> None:
    """Put what a search measured beside the model: `sensitivity.json`, and a picture where matplotlib is installed."""
    choices = read_choices(work_file)
    if not choices:
        return
    (folder / SENSITIVITY).write_text(work_file.read_text(encoding="utf-8"), encoding="utf-8")
    try:
        plot_choices(choices, folder / "sensitivity.png", title)
    except ImportError:
        return
