"""The command line, in process through typer's runner; every wrong input ends in one sentence and exit code 2."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, T5Config
from typer.testing import CliRunner

from hf_memory.cli import app
from hf_memory.evaluation.properties_generation import byte_tokenizer
from hf_memory.evaluation.properties_tiny import random_model, tiny_config


TITANS = {
    "lmm": {"variant": "lmm", "num_hidden_layers": 3},
    "mag": {"variant": "mag", "num_hidden_layers": 3, "sliding_window": 8},
    "mag-linear": {
        "variant": "mag",
        "memory_depth": 1,
        "chunk_size": 1,
        "memory_momentum": False,
        "sliding_window": 5,
    },
}


def run(*arguments: object, text: str | None = None):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], input=text)


def table_text(result) -> str:
    """Printed output with line breaks inside table cells undone."""
    return " ".join(result.stdout.split())


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    random_model(tiny_config("llama", vocab_size=300)).save_pretrained(folder)
    byte_tokenizer(300).save_pretrained(folder)
    return folder


def test_help_names_the_commands():
    result = run("--help")
    assert result.exit_code == 0
    assert all(command in result.stdout for command in ("generate", "info", "doctor", "check"))


def test_generate_streams_the_greedy_continuation(llama):
    result = run("generate", llama, "hello there", "--max-new-tokens", 12, "--device", "cpu")
    assert result.exit_code == 0, result.output
    model, tokenizer = AutoModelForCausalLM.from_pretrained(llama), AutoTokenizer.from_pretrained(llama)
    inputs = tokenizer("hello there", return_tensors="pt", return_token_type_ids=False)
    sequence = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs.input_ids.shape[1] :]
    assert result.stdout.strip() == tokenizer.decode(sequence, skip_special_tokens=True).strip()


def test_generate_reads_standard_input_and_repeats_a_seed(llama):
    arguments = (
        "generate",
        llama,
        "-",
        "--max-new-tokens",
        12,
        "--do-sample",
        "--temperature",
        2.0,
        "--device",
        "cpu",
    )
    first, again = (run(*arguments, "--seed", 3, text="hello there") for _ in range(2))
    other = run(*arguments, "--seed", 4, text="hello there")
    assert first.exit_code == 0 and first.stdout == again.stdout != other.stdout


@pytest.mark.parametrize("name", TITANS)
def test_info_counts_the_bytes_of_a_titans_cache(name, tmp_path):
    config = tiny_config("titans", **TITANS[name])
    config.save_pretrained(tmp_path)
    result = run("info", tmp_path, "--json")
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    model = random_model(config)
    assert document["parameters"] == sum(p.numel() for p in model.parameters())
    for tokens in (1, 2, 7, 8, 9, 20):
        with torch.no_grad():
            cache = model(input_ids=torch.ones(1, tokens, dtype=torch.long), use_cache=True).past_key_values
        predicted = [
            layer["bytes"] + layer["bytes_per_token"] * (min(tokens, layer["window"] or tokens) - 1)
            for layer in document["layers"]
        ]
        assert predicted == [layer.nbytes for layer in cache.layers]


@pytest.mark.parametrize("model_type, grows", [("llama", True), ("mistral", False), ("mamba2", False)])
def test_info_of_other_models(model_type, grows, tmp_path):
    config = tiny_config(model_type)
    config.save_pretrained(tmp_path)
    document = json.loads(run("info", tmp_path / "config.json", "--json").stdout)
    short, *_, long = (row["state_bytes"] for row in document["growth"])
    assert (long == 1024 * short) == grows and (long == short) != grows
    if model_type == "llama":
        # Two tensors, 2 layers, 2 heads of width 16, 4 bytes.
        assert (
            document["growth"][0]["state_bytes"]
            == document["growth"][0]["kv_cache_bytes"]
            == 2 * 2 * 2 * 16 * 4 * 1024
        )
    if model_type == "mistral":
        assert document["layers"][0]["window"] == config.sliding_window - 1


def test_info_prints_tables():
    result = run("info", "titans", "--dtype", "bfloat16")
    text = table_text(result)
    assert result.exit_code == 0, result.output
    assert "TitansForCausalLM" in text and "0 to 23" in text and "1,048,576" in text and "bfloat16" in text


def test_doctor_reports_versions_devices_and_ops():
    result = run("doctor", "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    versions = {entry["name"]: entry for entry in report["versions"]}
    assert versions["torch"]["installed"] == torch.__version__ and versions["transformers"]["verdict"] == "ok"
    assert report["devices"][0]["name"] == "cpu"
    assert {check["op"] for check in report["ops"]} >= {"anchored_linear", "anchored_mlp"}
    assert all(check["ok"] for check in report["ops"])
    assert "by default" in table_text(run("doctor"))


@pytest.mark.parametrize("fault", ["wrong", "crashing"])
def test_doctor_fails_when_a_form_is_wrong(fault, monkeypatch):
    from hf_memory.kernels.dispatch import OPS

    def self_check(form, device):
        if fault == "crashing":
            raise RuntimeError("no such instruction")
        return 0.5

    monkeypatch.setitem(OPS, "anchored_mlp", dataclasses.replace(OPS["anchored_mlp"], self_check=self_check))
    result = run("doctor")
    assert result.exit_code == 1 and "fails" in table_text(result)
    assert ("no such instruction" in table_text(result)) == (fault == "crashing")


def test_check_a_random_model(tmp_path):
    report = tmp_path / "report.json"
    arguments = ("--random", "--property", "causality", "--property", "split_invariance", "--json", report)
    result = run("check", "titans", *arguments)
    assert result.exit_code == 0, result.output
    assert [entry["status"] for entry in json.loads(report.read_text())["results"]] == ["pass", "pass"]
    assert "TitansForCausalLM" in result.stdout and "split_invariance" in result.stdout


def test_check_a_saved_model_and_a_configuration(llama):
    assert run("check", llama, "--property", "left_padding", "--device", "cpu").exit_code == 0
    assert run("check", llama / "config.json", "--random", "--property", "left_padding").exit_code == 0


def test_check_fails_with_the_model(monkeypatch):
    import hf_memory.evaluation.properties_tiny

    class LeaksTheFuture(LlamaForCausalLM):
        def forward(self, input_ids=None, **kwargs):
            embeds = self.get_input_embeddings()(input_ids)
            return super().forward(inputs_embeds=embeds + embeds.flip(1), **kwargs)

    def random_model(config, seed):
        return LeaksTheFuture(config)

    monkeypatch.setattr(hf_memory.evaluation.properties_tiny, "random_model", random_model)
    result = run("check", "llama", "--random", "--property", "causality")
    assert result.exit_code == 1 and "fail" in result.stdout


@pytest.fixture(scope="module")
def faulty(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("faulty")
    (folder / "empty").mkdir()
    T5Config(d_model=16, num_layers=1, num_heads=2, d_kv=8, d_ff=16).save_pretrained(folder / "encoder-decoder")
    (folder / "unknown").mkdir()
    (folder / "unknown" / "config.json").write_text('{"model_type": "no-such-type"}')
    (folder / "torn").mkdir()
    (folder / "torn" / "config.json").write_text('{"model_type": "llama", ')
    LlamaConfig().save_pretrained(folder / "no-weights")
    return folder


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        ("check FAULTY/missing", "There is no file or folder"),
        ("check FAULTY/empty", "holds no config.json"),
        ("check FAULTY/encoder-decoder", "holds no causal language model"),
        ("check FAULTY/unknown", "is unknown to the installed transformers"),
        ("check FAULTY/torn", "is not a valid JSON file"),
        ("check FAULTY/no-weights", "holds no model that can be read"),
        ("check nobody/nothing", "the Hub cannot be reached"),
        ("check llama", "is a model type, not a saved model: `check` takes it with --random"),
        ("check t5 --random", "has no causal language model"),
        ("check nothing-known --random", "the Hub cannot be reached"),
        ("check llama --random --property nonsense", "unknown property nonsense"),
        ("check llama --random --budget huge", "is not known; use one of quick, full"),
        ("check llama --random --json FAULTY/missing/report.json", "There is no folder"),
        ("check llama --random --device cuda:99", "is not available here"),
        ("check llama --random --dtype int3", "Unknown dtype 'int3'; use one of auto, float32"),
        ("info FAULTY/encoder-decoder", "has no causal language model"),
        ("info nobody/nothing", "the Hub cannot be reached"),
        ("generate FAULTY/no-weights hello", "holds no model that can be read"),
    ],
)
def test_wrong_input_is_one_sentence(arguments, sentence, faulty, llama):
    words = arguments.replace("FAULTY", str(faulty)).split()
    result = run(*words)
    assert result.exit_code == 2
    assert sentence in result.stderr and "Traceback" not in result.stderr
    assert result.stderr.startswith("Error: ") and result.stderr.count("\n") == 1


def test_an_empty_prompt_is_refused(llama):
    result = run("generate", llama, "", "--device", "cpu")
    assert result.exit_code == 2 and "The prompt is empty" in result.stderr


def test_debug_shows_where(faulty):
    result = run("--debug", "check", faulty / "missing")
    assert isinstance(result.exception, Exception) and not isinstance(result.exception, SystemExit)
