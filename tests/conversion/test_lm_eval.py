"""`lm_eval --model hf` on a converted model, in a fresh process, offline: its figures are ours."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_conversion import save_teacher, save_text, tiny_recipe
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_memory.conversion.run import convert


pytest.importorskip("lm_eval", reason="lm_eval is not installed (pip install 'hf-memory[eval]' brings it)")
pytestmark = pytest.mark.slow

QUESTIONS = [(f"{n} times {n} is", [f" {n * n}", f" {n * n + 1}", " none"]) for n in range(9)]
LETTERS = 6
COMMON = """
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
doc_to_text: "{{{{question}}}}"
"""
TASKS = {
    "chosen": """
task: chosen
output_type: multiple_choice
doc_to_choice: "{{choices}}"
doc_to_target: 0
target_delimiter: ""
metric_list: [{metric: acc}]
""",
    "written": f"""
task: written
output_type: generate_until
doc_to_target: "x"
generation_kwargs: {{until: ["<never>"], do_sample: false, max_gen_toks: {LETTERS}}}
metric_list: [{{metric: exact_match}}]
""",
    "read": """
task: read
output_type: loglikelihood_rolling
doc_to_target: "{{question}}"
metric_list: [{metric: bits_per_byte}]
""",
}


@pytest.fixture(scope="module")
def samples(tmp_path_factory) -> tuple[Path, dict[str, list[dict]]]:
    """A converted model, and what lm_eval wrote about it, by task and in the order of the questions."""
    folder = tmp_path_factory.mktemp("lm_eval")
    teacher, text = save_teacher(folder / "teacher", max_position_embeddings=256), save_text(folder / "text.txt")
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    # lm_eval reads texts behind it.
    tokenizer.eos_token = tokenizer.unk_token
    tokenizer.save_pretrained(teacher)
    model = convert(tiny_recipe(teacher, text, folder / "model", code=True, recall_samples=0))
    tasks, data = folder / "tasks", folder / "questions.jsonl"
    tasks.mkdir()
    lines = [json.dumps({"question": question, "choices": choices}) for question, choices in QUESTIONS]
    data.write_text("\n".join(lines) + "\n", encoding="utf-8")
    for name, task in TASKS.items():
        (tasks / f"{name}.yaml").write_text(task + COMMON.format(data=data), encoding="utf-8")
    command = [sys.executable, "-m", "lm_eval", "--model", "hf", "--tasks", ",".join(TASKS)]
    command += ["--model_args", f"pretrained={model},trust_remote_code=True,dtype=float32"]
    command += ["--include_path", str(tasks), "--device", "cpu", "--batch_size", "4", "--log_samples"]
    command += ["--output_path", str(folder / "results")]
    environment = os.environ | dict.fromkeys(("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "OMP_NUM_THREADS"), "1")
    environment |= {"HF_HOME": str(folder / "home"), "PYTHONPATH": os.pathsep.join(map(str, outside_of_here()))}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, cwd=folder)
    assert result.returncode == 0, result.stderr[-2000:]
    found = {}
    for name in TASKS:
        (file,) = (folder / "results").rglob(f"samples_{name}_*.jsonl")
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        found[name] = sorted(rows, key=lambda row: row["doc_id"])
    return model, found


def outside_of_here() -> list[Path]:
    """Where modules come from, without this checkout: the model has to bring its own code."""
    return [Path(entry) for entry in sys.path if entry and not (Path(entry) / "hf_memory").is_dir()]


@torch.no_grad()
def log_likelihood(model, context: list[int], rest: list[int]) -> float:
    tokens = torch.tensor([context + rest])
    scores = model(tokens, use_cache=False).logits[0, :-1].double().log_softmax(-1)
    return scores[torch.arange(len(context) - 1, tokens.shape[1] - 1), rest].sum().item()


def test_log_likelihoods_are_those_of_the_model(samples):
    folder, found = samples
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    for (question, choices), sample in zip(QUESTIONS, found["chosen"], strict=True):
        context = tokenizer(question)["input_ids"]
        expected = [log_likelihood(model, context, tokenizer(choice)["input_ids"]) for choice in choices]
        # What padded rows of several lengths round to.
        assert [float(answer[0][0]) for answer in sample["resps"]] == pytest.approx(expected, abs=1e-3)
        best = max(range(3), key=expected.__getitem__)
        assert sample["acc"] == float(best == 0)


def test_generation_is_that_of_the_model(samples):
    folder, found = samples
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    for (question, _), sample in zip(QUESTIONS, found["written"], strict=True):
        inputs = tokenizer(question, return_tensors="pt")
        written = model.generate(**inputs, max_new_tokens=LETTERS, do_sample=False)
        new = tokenizer.decode(written[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        assert sample["resps"] == [[new]]


def test_whole_texts_are_scored(samples):
    folder, found = samples
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    for (question, _), sample in zip(QUESTIONS, found["read"], strict=True):
        expected = log_likelihood(model, [start], tokenizer(question)["input_ids"])
        assert float(sample["resps"][0][0]) == pytest.approx(expected, abs=1e-3)
        assert math.isfinite(expected)
