"""Cards of every architecture: what the Hub reads in them, what they count, and that a template is all they need."""

import re
from types import SimpleNamespace

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from safetensors.torch import save_file

from hf_memory import TitansForSequenceClassification
from hf_memory._cli.loading import UserError
from hf_memory._cli.state_size import build_without_weights, kv_cache_bytes, layer_states, readable_size
from hf_memory.evaluation.properties_tiny import tiny_config
from hf_memory.hub import cards
from hf_memory.hub.remote_code import EXPORTABLE, export_remote_code
from hf_memory.models import ARCHITECTURES


MACROS = ("summary", "memory", "limits", "citation")
TEMPLATES = sorted(path.stem for path in cards.template_folder().glob("*.md") if path.stem not in ("README", "card"))


def test_every_architecture_has_a_template_and_every_template_its_macros():
    assert set(EXPORTABLE) <= set(TEMPLATES)
    for name in TEMPLATES:
        module = cards._environment().get_template(f"{name}.md").module
        assert all(callable(getattr(module, macro, None)) for macro in MACROS), name


@pytest.mark.parametrize("chunk_size", [1, 16])
@pytest.mark.parametrize("normalization", ["retract", "lazy", "none"])
@pytest.mark.parametrize("name", ["lattice", "trellis"])
def test_slots_are_described_by_what_their_configuration_says(name, normalization, chunk_size):
    module = cards._environment().get_template(f"{name}.md").module
    fields = {"num_hidden_layers": 3, "num_slots": 17, "head_dim": 8, "memory_decay": True}
    fields |= {"write_map": "ln_silu", "refinements": 0}
    config = SimpleNamespace(chunk_size=chunk_size, normalization=normalization, **fields)
    assert "3 layers" in module.summary(config, cards.Made()) and "arXiv" in module.citation()
    text = module.memory(config)
    assert "17 slots" in text and ("`chunk_size`" in text) == (chunk_size > 1)
    assert name == "trellis" or ("orthogonal" in text) == (normalization != "none")
    assert all(line.startswith("- ") for line in module.limits(config).strip().splitlines())


@pytest.mark.parametrize(
    "name, fields, sentence",
    [
        ("lattice", {}, "far from the exact rule"),
        ("lattice", {"chunk_size": 1}, ""),
        ("trellis", {"num_slots": 8}, "fewer than 16 slots"),
        ("trellis", {"write_map": "silu"}, "diverges once they add up to 2"),
        ("trellis", {"write_map": "silu", "num_slots": 8, "chunk_size": 1}, ""),
        ("trellis", {}, ""),
    ],
)
def test_limits_of_slots_are_those_of_the_configuration(name, fields, sentence):
    module = cards._environment().get_template(f"{name}.md").module
    common = {"chunk_size": 16, "num_slots": 64, "normalization": "retract", "write_map": "ln_silu"}
    limits = module.limits(SimpleNamespace(**common | fields)).strip()
    assert sentence in limits and bool(limits) == bool(sentence)


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_a_card_from_the_configuration_alone(model_type, tmp_path):
    config = tiny_config(model_type, architectures=[ARCHITECTURES[model_type].causal_lm])
    config.save_pretrained(tmp_path)
    export_remote_code(config, tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    card = ModelCard.load(cards.write_card(tmp_path, config, name="mine", metadata={"license": "mit", "tags": ["x"]}))
    assert card.data.to_dict() == {
        "library_name": "transformers",
        "license": "mit",
        "pipeline_tag": "text-generation",
        "tags": ["hf-memory", model_type, "memory", "x"],
        "model_name": "mine",
    }
    text = card.text
    dtype = config.dtype or torch.float32
    assert f"{build_without_weights(config, dtype).num_parameters():,} parameters" in text
    layers = layer_states(config, dtype)
    for tokens in (1024, 32 * 1024, 1024 * 1024):
        state = readable_size(sum(layer.after(tokens) for layer in layers))
        assert f"| {tokens:,} | {state} | {readable_size(kv_cache_bytes(config, dtype, tokens))} |" in text
    assert "Nothing was measured" in text and "trust_remote_code=True" in text and "@article" in text
    assert "None" not in text and "\n\n\n" not in text
    assert [line for line in text.splitlines() if line.startswith("## ")] == [
        f"## {section}" for section in ("Use", "Size", "Measured", "Limits", "Citation")
    ]


def test_other_heads_and_the_weights_that_are_there(tmp_path, monkeypatch):
    monkeypatch.setattr(cards, "_states", lambda config, dtype: [])
    config = tiny_config("titans", architectures=["TitansForSequenceClassification"])
    card = ModelCard.load(cards.write_card(tmp_path, config))
    assert card.data.pipeline_tag == "text-classification" and "## Size" not in card.text
    model = TitansForSequenceClassification(config)
    model.save_pretrained(tmp_path, max_shard_size="200KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    # A memory file that lies there, too, holds no parameters.
    save_file({"layers.0.memory": torch.zeros(1, 9)}, tmp_path / "memory.safetensors", {"hf_memory": "{}"})
    card = ModelCard.load(cards.write_card(tmp_path, config))
    assert f"\n{model.num_parameters():,} parameters, in float32.\n" in card.text
    assert "AutoModelForSequenceClassification.from_pretrained" in card.text and "pipeline(" not in card.text
    assert cards.card_data(tiny_config("titans", architectures=["Other"]), "x", {}).pipeline_tag is None


@pytest.mark.parametrize(
    "fields, sentence",
    [
        ({"variant": "lmm", "memory_depth": 2}, "a network of 2 layers"),
        ({"variant": "mag", "memory_depth": 1, "chunk_size": 1}, "taken at the memory that the token before has left"),
        ({"variant": "mag", "memory_depth": 1, "chunk_size": 8}, "The gradients of 8 tokens are taken at one memory"),
        ({"memory_momentum": False, "memory_decay": False}, "with a step size that depend"),
    ],
)
def test_a_titans_card_says_which_titans(fields, sentence):
    module = cards._environment().get_template("titans.md").module
    assert sentence in module.memory(tiny_config("titans", **fields))


def test_an_architecture_without_a_template_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(cards, "template_folder", lambda: tmp_path)
    with pytest.raises(cards.CardError, match=r"There is no card for 'titans': model_cards/titans.md is missing"):
        cards.write_card(tmp_path, tiny_config("titans"))
    assert not (tmp_path / "README.md").exists()


def test_a_state_that_cannot_be_counted_is_left_out(tmp_path, monkeypatch):
    def refuse(config, dtype):
        raise UserError("too large to try")

    monkeypatch.setattr(cards, "layer_states", refuse)
    text = cards.write_card(tmp_path, tiny_config("titans")).read_text()
    assert "parameters, in float32." in text and "| tokens read |" not in text


def test_rendered_it_is_headings_tables_lists_and_code(tmp_path):
    text = cards.write_card(tmp_path, tiny_config("titans")).read_text()
    header, body = re.match(r"---\n(.*?)---\n(.*)", text, re.DOTALL).groups()
    assert yaml.safe_load(header)["library_name"] == "transformers"
    html = MarkdownIt("commonmark").enable("table").render(body)
    assert html.count("<table>") == 1 and html.count("<h1>") == 1 and html.count("<pre>") == 2
    assert "<ul>" in html and "|" not in re.sub(r"<pre>.*?</pre>", "", html, flags=re.DOTALL)
