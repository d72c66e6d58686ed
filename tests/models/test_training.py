"""Training as users do it: Trainer, resuming, packing, LoRA, two processes."""

import os
import subprocess
import sys

import peft
import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from transformers import (
    AutoModelForSequenceClassification,
    DataCollatorWithFlattening,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from hf_memory import TitansConfig, TitansForCausalLM


def tiny_model(variant: str = "lmm", **overrides) -> TitansForCausalLM:
    set_seed(0)
    fields = {
        "vocab_size": 32,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "chunk_size": 4,
        "num_persistent_tokens": 4,
        "sliding_window": 8,
        "segment_size": 8,
        "num_memory_tokens": 4,
        "eos_token_id": None,
    }
    return TitansForCausalLM(TitansConfig(variant=variant, **fields | overrides))


@pytest.fixture(scope="module")
def copies() -> Dataset:
    """Random halves said twice: only a memory predicts the second one."""
    generator = torch.Generator().manual_seed(0)
    halves = torch.randint(32, (64, 8), generator=generator)
    return Dataset.from_dict({"input_ids": torch.cat([halves, halves], 1).tolist()})


def make_trainer(model, data: Dataset, output, steps: int = 6, **kwargs) -> Trainer:
    arguments = {
        "output_dir": str(output),
        "max_steps": steps,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-2,
        "save_steps": 3,
        "eval_strategy": "steps",
        "eval_steps": 3,
        "logging_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
    } | kwargs
    callbacks = arguments.pop("callbacks", None)
    collator = arguments.pop("data_collator", LanguageModelCollator())
    return Trainer(
        model,
        TrainingArguments(**arguments),
        train_dataset=data,
        eval_dataset=data.select(range(8)),
        data_collator=collator,
        callbacks=callbacks,
    )


class LanguageModelCollator:
    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        input_ids = torch.tensor([row["input_ids"] for row in rows])
        return {"input_ids": input_ids, "labels": input_ids.clone()}


class StopAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step


@pytest.mark.parametrize("variant", ["lmm", "mag", "mac", "mal"])
def test_trainer_evaluates_and_learns(variant, copies, tmp_path):
    trainer = make_trainer(tiny_model(variant), copies, tmp_path, steps=60, eval_steps=60, save_strategy="no")
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before - 0.3


def test_resume_ends_in_the_same_weights(copies, tmp_path):
    whole = make_trainer(tiny_model(), copies, tmp_path / "whole")
    whole.train()
    make_trainer(tiny_model(), copies, tmp_path / "cut", callbacks=[StopAt(3)]).train()
    resumed = make_trainer(tiny_model(), copies, tmp_path / "cut")
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 6
    for name, weight in whole.model.state_dict().items():
        assert torch.equal(weight, resumed.model.state_dict()[name]), name


@pytest.mark.parametrize("variant", ["lmm", "mag"])
def test_gradient_checkpointing_trains_to_the_same_weights(variant, copies, tmp_path):
    weights = []
    for checkpointing in (False, True):
        trainer = make_trainer(
            tiny_model(variant), copies, tmp_path, steps=3, gradient_checkpointing=checkpointing, eval_strategy="no"
        )
        trainer.train()
        weights.append(trainer.model.state_dict())
    for name in weights[0]:
        assert torch.allclose(weights[0][name], weights[1][name], rtol=1e-5, atol=1e-6), name


@pytest.mark.parametrize("variant", ["lmm", "mag"])
def test_packing_collator_gives_the_loss_of_separate_rows(variant, copies):
    model = tiny_model(variant).eval()
    rows = [{"input_ids": copies[i]["input_ids"][: 16 - 5 * i]} for i in range(3)]
    batch = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_position_ids=True)(rows)
    with torch.no_grad():
        packed = model(**batch)
        only_positions = model(batch["input_ids"], position_ids=batch["position_ids"])
        alone = [model(torch.tensor([row["input_ids"]])).logits[0] for row in rows]
    expected = torch.cat(alone)
    assert torch.allclose(packed.logits[0], expected, rtol=1e-4, atol=1e-5)
    assert torch.allclose(only_positions.logits[0], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_have_the_loss_of_unpadded_ones(side, copies):
    model = tiny_model("mag").eval()
    rows = [copies[i]["input_ids"][: 16 - 3 * i] for i in range(3)]
    width = max(map(len, rows))
    pads = [[0] * (width - len(row)) for row in rows]
    mask = [[1] * len(row) for row in rows]
    if side == "left":
        ids = torch.tensor([pad + row for pad, row in zip(pads, rows)])
        attention_mask = torch.tensor([pad + row for pad, row in zip(pads, mask)])
    else:
        ids = torch.tensor([row + pad for pad, row in zip(pads, rows)])
        attention_mask = torch.tensor([row + pad for pad, row in zip(pads, mask)])
    with torch.no_grad():
        logits = model(ids, attention_mask=attention_mask).logits
        for i, row in enumerate(rows):
            alone = model(torch.tensor([row])).logits[0]
            assert torch.allclose(logits[i][attention_mask[i].bool()], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("variant", ["lmm", "mag", "mac"])
def test_lora_with_default_targets(variant, copies, tmp_path):
    model = peft.get_peft_model(tiny_model(variant), peft.LoraConfig(task_type="CAUSAL_LM", r=4))
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert any("q_proj" in name for name in trained) and any("v_proj" in name for name in trained)
    make_trainer(model, copies, tmp_path / "run", steps=4, eval_strategy="no", save_strategy="no").train()
    model.save_pretrained(tmp_path / "adapter")

    input_ids = torch.tensor(copies[:2]["input_ids"])
    model.eval()
    with torch.no_grad():
        expected = model(input_ids).logits
        loaded = peft.PeftModel.from_pretrained(tiny_model(variant), tmp_path / "adapter").eval()
        base = tiny_model(variant).eval()(input_ids).logits
        assert torch.allclose(loaded(input_ids).logits, expected, rtol=1e-5, atol=1e-6)
        assert not torch.allclose(base, expected, atol=1e-3)
        generated = loaded.generate(input_ids[:, :9], max_new_tokens=6, do_sample=False)
        merged = loaded.merge_and_unload()
        assert torch.allclose(merged(input_ids).logits, expected, rtol=1e-4, atol=1e-5)
        assert torch.equal(merged.generate(input_ids[:, :9], max_new_tokens=6, do_sample=False), generated)


def test_sequence_classification_trains(copies):
    config = tiny_model().config
    config.num_labels, config.pad_token_id = 3, 0
    model = AutoModelForSequenceClassification.from_config(config)
    output = model(torch.tensor(copies[:4]["input_ids"]), labels=torch.tensor([0, 1, 2, 0]))
    output.loss.backward()
    assert output.logits.shape == (4, 3)
    assert all(p.grad is not None for p in model.score.parameters())


def test_truncated_backpropagation_through_a_cache(copies):
    """Gradients flow through a carried cache until somebody detaches it."""
    model = tiny_model()
    ids = torch.tensor(copies[:2]["input_ids"])
    whole = model(ids, labels=ids).loss
    expected = torch.autograd.grad(whole, model.model.embed_tokens.weight)[0]
    first = model(ids[:, :6], use_cache=True)
    second = model(ids[:, 6:], past_key_values=first.past_key_values)
    logits = torch.cat([first.logits, second.logits], 1)
    loss = model.loss_function(logits=logits, labels=ids, vocab_size=32)
    actual = torch.autograd.grad(loss, model.model.embed_tokens.weight)[0]
    assert torch.allclose(actual, expected, rtol=1e-4, atol=1e-6)


WORKER = """
import sys
import torch
from tests.models.test_training import train_with_accelerate

weights, processes = train_with_accelerate()
print(f"processes {processes}")  # one write: two processes share the pipe
if weights is not None:
    torch.save(weights, sys.argv[1])
torch.distributed.destroy_process_group()
"""


def train_with_accelerate() -> tuple[dict[str, torch.Tensor] | None, int]:
    """A few steps at a global batch of 8; the main process returns the weights."""
    accelerator = Accelerator(cpu=True)
    data = torch.randint(32, (16, 12), generator=torch.Generator().manual_seed(1))
    model = tiny_model("mag")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loader = torch.utils.data.DataLoader(data, batch_size=8 // accelerator.num_processes)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    for ids in loader:
        accelerator.backward(model(ids, labels=ids).loss)
        optimizer.step()
        optimizer.zero_grad()
    weights = accelerator.unwrap_model(model).state_dict() if accelerator.is_main_process else None
    # The group outlives this function: torch can hang when the wrapped model is freed after it.
    return weights, accelerator.num_processes


def test_two_processes_train_as_one(root, tmp_path):
    script, output = tmp_path / "worker.py", tmp_path / "weights.pt"
    script.write_text(WORKER)
    # `accelerate launch --cpu` starts several processes through MPI only; this flag means torchrun, on CPU as well.
    launch = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--multi_gpu"]
    launch += ["--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    launch += ["--main_process_port", "0", str(script), str(output)]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    result = subprocess.run(launch, capture_output=True, text=True, timeout=240, cwd=root, env=environment)
    assert result.stdout.count("processes 2") == 2, result.stdout + result.stderr
    expected, _ = train_with_accelerate()
    for name, weight in torch.load(output, weights_only=True).items():
        assert torch.allclose(weight, expected[name], rtol=1e-4, atol=1e-6), name
