"""Convert half of a Transformer's layers to Titans memory, measure it beside two controls, and let it write.

Without arguments the teacher is `demo_teacher`, a small byte-level Llama trained on the sources of Python's standard
library, and the text is that library as the running interpreter has it, whole packages held out. `--teacher` takes any
model that `hf-memory convert` takes, `--data` any text file or folder, of which the end is held out.

python examples/demo.py

The controls get as many tokens as the student: the teacher trained on with cross entropy, and the same student with
its memory switched off (inner step size 0). Everything goes to `--output`: `student/`, `report.md`, `report.json`,
`report.png`, and the controls. An interrupted demo goes on where it was when the same command is given again; a
finished one is printed again; `--restart` begins anew.
"""

import json
import lzma
import os
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any


# Read by the libraries when they are imported. Nothing is fetched, unless for a teacher of one's own.
os.environ.setdefault("HF_HUB_OFFLINE", str(int(not any(word.startswith("--teacher") for word in sys.argv))))

import numpy as np
import torch
import typer
from rich.console import Console
from stdlib_text import library_text
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from hf_memory.conversion.card import write_card
from hf_memory.conversion.data import bytes_per_token, load_corpus
from hf_memory.conversion.evaluate import SPEED_CONTEXTS
from hf_memory.conversion.probe import Probe, probe_lengths
from hf_memory.conversion.recipe import ConversionError, Recipe, read_recipe
from hf_memory.conversion.report import environment, measure, rich_report, write_report
from hf_memory.conversion.run import convert, read_report
from hf_memory.conversion.stage_options import DistillStage, InitStage


HERE = Path(__file__).resolve().parent
TEACHER = HERE / "demo_teacher"
RECIPE = HERE / "demo_recipe.yaml"
STUDENT, OFF, CONTINUED = "student", "student, memory off", "teacher, continued"
FOLDERS = {STUDENT: "student", OFF: "memory_off", CONTINUED: "continued"}
"""The models that are made, and where in the output they go."""

CONTINUED_LR = 1e-4
"""Of the teacher that is trained on: low, since it has been trained to the end already."""
FIRST_LOOK = 2
"""Held-out blocks that each conversion is measured on by itself; the comparison of all reads those of the recipe."""
RECALL_SECONDS = 10
"""For the recall probe of all models together; one text for each length and depth is read in any case."""
PROMPT_CHARACTERS, NEW_TOKENS = 600, 240

NOTES = [
    "Memory off: converted and trained like the student, with inner step size 0 from the start.",
    "The text is the standard library of the Python that ran this, so the figures move a little from one version to "
    "another.",
]
PLACES = {"replace": "in the place of attention", "retrofit": "beside attention that sees the last {} tokens only"}

PLAN, TEXT = "plan.json", "text"
"""What is in the output before the first model is."""

CONTINUE = """
import sys
from transformers import pipeline, set_seed
from transformers.utils import logging

logging.set_verbosity_error()
logging.disable_progress_bar()
set_seed(0)
generator = pipeline("text-generation", model=sys.argv[1], trust_remote_code=True, device="cpu")
prompt = sys.stdin.buffer.read().decode("utf-8")
options = {"max_new_tokens": int(sys.argv[2]), "do_sample": True, "temperature": 0.6, "return_full_text": False}
text = generator(prompt, **options)[0]["generated_text"]
sys.stdout.buffer.write(text.encode("utf-8", "replace"))
"""


def recipes(student: Recipe) -> dict[str, Recipe]:
    """The recipe of the student and those of the controls, which read as many tokens."""
    student = replace(student, held_out_blocks=FIRST_LOOK, recall_samples=0)
    unobserved = replace(student, evaluate_stages=False)
    folder = Path(student.output).parent
    tokens = sum(stage.tokens for stage in student.training_stages.values())
    train_on = DistillStage(tokens=tokens, lr=CONTINUED_LR, trainable="all", kl_weight=0, ce_weight=1)
    return {
        STUDENT: student,
        OFF: replace(
            unobserved,
            output=str(folder / FOLDERS[OFF]),
            memory_options=student.memory_options | {"theta_max": 0},
        ),
        # A hybrid without a converted layer is the teacher.
        CONTINUED: replace(
            unobserved,
            output=str(folder / FOLDERS[CONTINUED]),
            layers=[],
            memory_options={},
            stages=[InitStage(), train_on],
        ),
    }


def compressed_bits(texts: list[bytes]) -> float:
    """Bits per byte that `xz -9e` needs for texts, each by itself."""
    packed = sum(len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)) for text in texts)
    return 8 * packed / sum(map(len, texts))


def baselines(folder: Path | None, tokens: np.ndarray, tokenizer: Any) -> dict[str, float]:
    """`xz` on the held-out text: on the files of a folder, else on the decoded tokens."""
    if folder is None:
        text = tokenizer.decode(tokens.tolist(), skip_special_tokens=True).encode("utf-8", "replace")
        return {"xz -9e on all of it at once": compressed_bits([text])}
    files = [path.read_bytes() for path in sorted(folder.rglob("*.py")) if path.stat().st_size]
    return {
        "xz -9e on all files at once": compressed_bits([b"".join(files)]),
        "xz -9e file by file": compressed_bits(files),
    }


def prompt_of(text: str) -> str:
    """Whole lines from the start of a block, whose first line is cut off."""
    lines = text[text.find("\n") + 1 :][:PROMPT_CHARACTERS]
    return lines[: lines.rfind("\n") + 1] or text


def load(folder: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def stage_curves(folders: dict[str, Path]) -> list[dict]:
    """Loss curves of all runs, from the report beside each model."""
    curves = []
    for name, folder in folders.items():
        for curve in read_report(folder)["curves"]:
            stage = "cross entropy" if name == CONTINUED else curve["stage"]
            curves.append(curve | {"run": name, "stage": stage})
    return curves


def continue_file(folder: Path, prompt: str) -> str:
    """What the saved model writes behind a prompt, in a fresh interpreter that does not import hf_memory."""
    command = [sys.executable, "-c", CONTINUE, str(folder), str(NEW_TOKENS)]
    result = subprocess.run(command, input=prompt.encode("utf-8"), capture_output=True, check=False)
    if result.returncode:
        last = result.stderr.decode("utf-8", "replace").strip().splitlines()[-1:]
        raise ConversionError(f"The saved model could not be loaded by a pipeline: {' '.join(last)}")
    return result.stdout.decode("utf-8", "replace")


class Demo:
    """One demo in its folder.

    Args:
        output: Where everything goes.
        recipe: Of the student; teacher, data and output are filled in already.
        library: Whether the text is the standard library, which is copied into the folder.
        console: Where to speak.
    """

    def __init__(self, output: Path, recipe: Recipe, library: bool, console: Console) -> None:
        self.output, self.recipe, self.library, self.console = output, recipe, library, console
        self.tokens = sum(stage.tokens for stage in recipe.training_stages.values())

    @property
    def plan(self) -> dict[str, Any]:
        """Everything that decides about the results; two runs with the same plan are one demo."""
        return self.recipe.to_dict() | {"output": "", "library": self.library, "continued_lr": CONTINUED_LR}

    def announce(self) -> None:
        """Say what is about to happen."""
        text = "Python's standard library" if self.library else self.recipe.data
        say = self.console.print
        say(f"Teacher: {self.recipe.teacher}. Text: {text}.", markup=False)
        say(
            f"1. {self.recipe.memory.capitalize()} memory {PLACES[self.recipe.mode].format(self.recipe.window)} "
            f"(layers: {self.recipe.layers}), trained on {self.tokens:,} tokens to do what the teacher does."
        )
        say("2. A control: the same with its memory switched off (inner step size 0).")
        say("3. A control: the teacher itself, trained on as many tokens of the same text.")
        say("4. All of them measured on held-out text: bits, cache, speed.")
        say("5. The saved model, loaded again, continues a held-out text.")
        say(f"Everything goes to {self.output}. Ctrl-C is safe: the same command goes on.", markup=False)

    def run(self) -> None:
        """All parts that are not done yet."""
        began = time.monotonic()
        made = recipes(self.recipe)
        for number, (name, recipe) in enumerate(made.items(), 1):
            self._part(f"{number} of 5: {name}", began)
            if Path(recipe.output).is_dir():
                self.console.print(f"Made before, in {recipe.output}")
            else:
                convert(recipe)
        self._part("4 of 5: measuring all of them on the same held-out text", began)
        report, prompt = self._measure({name: Path(recipe.output) for name, recipe in made.items()})
        self._part("5 of 5: the saved student continues a held-out text", began)
        self.console.print("In a fresh Python that has not imported hf_memory, through transformers.pipeline().")
        written = continue_file(Path(self.recipe.output), prompt)
        report["continuation"] = {"prompt": prompt, "text": written}
        self._describe_student(report)
        # Last of all: from here on the demo counts as finished.
        files = write_report(report, self.output, self.console)
        self.show(report)
        minutes = (time.monotonic() - began) / 60
        self.console.print(
            f"\n{minutes:.1f} minutes. Wrote {', '.join(map(str, files))}; the model is in {made[STUDENT].output}"
        )

    def discard_if_nothing_was_made(self) -> None:
        """Remove the folder when it holds no more than what is written before the first conversion."""
        made = {path.name for path in self.output.iterdir()} if self.output.is_dir() else set()
        if made and made <= {PLAN, TEXT}:
            shutil.rmtree(self.output)

    def show(self, report: dict[str, Any]) -> None:
        """Table and continuation of a finished demo."""
        self.console.print(rich_report(report))
        self.console.rule("prompt")
        self.console.print(report["continuation"]["prompt"], markup=False, highlight=False)
        self.console.rule("continuation")
        self.console.print(report["continuation"]["text"], markup=False, highlight=False)
        self.console.rule()

    def _part(self, title: str, began: float) -> None:
        self.console.rule(f"[bold]{title}[/] ({time.monotonic() - began:.0f} s so far)", align="left")

    def _describe_student(self, report: dict[str, Any]) -> None:
        """The comparison in the student's own folder, in the place of the first look."""
        folder, recipe = Path(self.recipe.output), self.recipe.to_dict()
        write_report(report, folder, self.console)
        write_card(folder, config=AutoConfig.from_pretrained(folder), recipe=recipe, report=report)

    def _measure(self, folders: dict[str, Path]) -> tuple[dict[str, Any], str]:
        recipe = self.recipe
        tokenizer = AutoTokenizer.from_pretrained(recipe.teacher)
        corpus = load_corpus(recipe, tokenizer)
        blocks = corpus.held_out_blocks(recipe.context, recipe.held_out_blocks)
        models = {"teacher": load(recipe.teacher)} | {name: load(str(folder)) for name, folder in folders.items()}
        with self.console.status("reading held-out blocks") as status:
            measured = measure(
                models,
                blocks,
                reference="teacher",
                bytes_per_token=bytes_per_token(blocks, tokenizer),
                speed_contexts=SPEED_CONTEXTS,
                on_progress=lambda done, total: status.update(f"read {done} of {total} held-out blocks"),
            )
        probe = Probe(tokenizer, corpus.held_out, probe_lengths(recipe.context), recipe.recall_samples)
        with self.console.status("asking for what was hidden"):
            recalled = probe.run(models, seconds=RECALL_SECONDS)
        for name, recall in recalled.items():
            measured[name]["recall"] = asdict(recall)
        config = models[STUDENT].config
        report = {
            "title": f"{Path(recipe.teacher).name}, {len(config.memory_layers)} of {config.num_hidden_layers} layers "
            f"converted to {recipe.memory.capitalize()} memory",
            "text": "held-out packages of Python's standard library" if self.library else "the end of the text",
            "student": STUDENT,
            "reference": "teacher",
            "controls": {"off": OFF, "continued": CONTINUED},
            "stages": read_report(folders[STUDENT])["stages"],
            "converted": {
                "layers": config.memory_layers,
                "of": config.num_hidden_layers,
                "memory": recipe.memory,
                "mode": recipe.mode,
            },
            "models": measured,
            "curves": stage_curves(folders),
            "baselines": baselines(Path(recipe.held_out) if self.library else None, corpus.held_out, tokenizer),
            "notes": NOTES if self.library else NOTES[:1],
            "environment": environment() | {"dtype": "float32"},
        }
        return report, prompt_of(tokenizer.decode(blocks[len(blocks) // 2].tolist(), skip_special_tokens=True))


def make_recipe(teacher: str, data: str | None, output: Path, recipe: Path, tokens: int | None) -> Recipe:
    """The recipe of the student, with the library's text in the output folder where no other is given."""
    flags: dict[str, Any] = {"teacher": teacher, "output": str(output / FOLDERS[STUDENT])}
    if data is not None:
        flags["data"] = data
    else:
        flags |= {"data": str(output / TEXT / "training"), "held_out": str(output / TEXT / "held_out")}
    made = read_recipe(recipe, flags)
    if tokens is not None:
        share = tokens / sum(stage.tokens for stage in made.training_stages.values())
        for stage in made.training_stages.values():
            stage.tokens = max(1, round(stage.tokens * share))
    return made


def prepare(demo: Demo, restart: bool) -> dict[str, Any] | None:
    """Make the folder ready; the report of a demo that was finished in it with the same settings.

    Raises:
        ConversionError: The folder holds something else.
    """
    output, plan_file = demo.output, demo.output / PLAN
    plan = json.loads(json.dumps(demo.plan))
    if output.exists() and not plan_file.is_file() and any(output.iterdir()):
        raise ConversionError(f"The folder {str(output)!r} holds something that is no demo: name another --output.")
    if restart and output.exists():
        shutil.rmtree(output)
    if not plan_file.is_file():
        output.mkdir(parents=True, exist_ok=True)
        plan_file.write_text(json.dumps(plan, indent=2) + "\n", encoding="utf-8")
    elif json.loads(plan_file.read_text(encoding="utf-8")) != plan:
        raise ConversionError(
            f"The folder {str(output)!r} holds a demo with other settings: pass --restart to begin anew, or another "
            "--output."
        )
    if (output / "report.json").is_file():
        return json.loads((output / "report.json").read_text(encoding="utf-8"))
    if demo.library:
        library_text(output / TEXT, demo.tokens, demo.recipe.seed)
    return None


def main(
    teacher: Annotated[str, typer.Option(help="Folder of a saved model, or its id on the Hub.")] = str(TEACHER),
    data: Annotated[
        str | None, typer.Option(help="Text file or folder, the end of which is held out. Default: Python's library.")
    ] = None,
    output: Annotated[Path, typer.Option(help="Folder for everything that comes out.")] = Path("demo_out"),
    recipe: Annotated[Path, typer.Option(help="YAML file with layers, memory and stages.")] = RECIPE,
    tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens that each model is trained on. Default: those of the recipe.")
    ] = None,
    restart: Annotated[
        bool, typer.Option("--restart", help="Delete what an earlier demo left, and begin anew.")
    ] = False,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = torch.get_num_threads(),
) -> None:
    """Convert half of a Transformer's layers to memory, measure it beside controls, and let it write."""
    torch.set_num_threads(threads)
    logging.disable_progress_bar()
    console = Console(width=None if sys.stdout.isatty() else 120)
    demo = None
    try:
        demo = Demo(output, make_recipe(teacher, data, output, recipe, tokens), data is None, console)
        finished = prepare(demo, restart)
        if finished is not None:
            demo.show(finished)
            console.print(f"This demo was finished before, in {output}; --restart does it again.")
            return
        demo.announce()
        demo.run()
    except (ValueError, OSError) as error:
        if demo is not None:
            demo.discard_if_nothing_was_made()
        print(f"Error: {' '.join(str(error).split())}", file=sys.stderr)
        raise typer.Exit(2) from error
    except KeyboardInterrupt:
        print("Stopped; the same command goes on from here.", file=sys.stderr)
        raise typer.Exit(130) from None


if __name__ == "__main__":
    typer.run(main)
