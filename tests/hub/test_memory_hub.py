"""Memory files on the loopback Hub, with the real client."""

import pytest
import torch
from huggingface_hub import HfApi
from loopback import LoopbackHub

from hf_memory import MemoryCache, TitansConfig, TitansForCausalLM
from hf_memory.hub.memories import memory_card
from hf_memory.hub.push import PushError


@pytest.fixture
def model() -> TitansForCausalLM:
    sizes = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    return TitansForCausalLM(
        TitansConfig(**sizes, num_attention_heads=2, chunk_size=4, num_persistent_tokens=2)
    ).eval()


def test_push_and_load_a_memory(online: LoopbackHub, model):
    memory = model.read(torch.arange(30))
    url = memory.push_to_hub("tester/book")
    assert url.startswith(online.url)
    files = online.files("tester/book")
    assert {"memory.safetensors", "README.md"} <= files.keys() and len(online.commits("tester/book")) == 1
    assert b"30 tokens read" in files["README.md"] and b"memory-file" in files["README.md"]
    back = MemoryCache.from_pretrained("tester/book", model=model)
    more = torch.arange(9)[None]
    with torch.no_grad():
        assert torch.equal(
            model(more, past_key_values=back).logits, model(more, past_key_values=memory.clone()).logits
        )
    model.read(torch.arange(5), memory=memory).push_to_hub("tester/book", filename="second.memory")
    assert online.files("tester/book")["README.md"] == files["README.md"]
    assert MemoryCache.from_pretrained("tester/book", model=model, filename="second.memory").info.tokens == 35


def test_faults_are_survived_or_said(online: LoopbackHub, model):
    memory = model.read(torch.arange(30))
    online.inject("POST .*/commit/", status=500)
    memory.push_to_hub("tester/book")
    assert len(online.commits("tester/book")) == 1
    assert MemoryCache.from_pretrained("tester/book", model=model).info.tokens == 30
    with pytest.raises(PushError, match="may not write to .*stranger/book"):
        memory.push_to_hub("stranger/book")
    with pytest.raises(FileNotFoundError, match="no file 'other.memory'"):
        MemoryCache.from_pretrained("tester/book", model=model, filename="other.memory")
    with pytest.raises(FileNotFoundError, match="neither a file here nor a repository"):
        MemoryCache.from_pretrained("tester/nothing", model=model)
    with pytest.raises(FileNotFoundError, match="has no revision 'nowhere'"):
        MemoryCache.from_pretrained("tester/book", model=model, revision="nowhere")
    with pytest.raises(FileNotFoundError, match="'a folder/a book' is no name for a repository"):
        MemoryCache.from_pretrained("a folder/a book", model=model)


def test_a_download_that_breaks_off_is_said_and_made_again(online: LoopbackHub, model):
    model.read(torch.arange(30)).push_to_hub("tester/book")
    fault = {"cut": "answer", "times": None}
    online.inject("GET .*memory.safetensors", **fault)
    online.inject("GET .*/lfs", **fault)
    with pytest.raises(ConnectionError, match="'memory.safetensors' of 'tester/book' did not arrive, load it again"):
        MemoryCache.from_pretrained("tester/book", model=model)


def test_the_card_names_the_model_where_it_is_on_the_hub(model):
    info = model.read([1, 2, 3]).info
    assert "base_model" not in memory_card(info, "user/book")
    model.config._name_or_path = "user/model"
    card = memory_card(model.read([1, 2, 3]).info, "user/book", "a.memory")
    assert "base_model: user/model" in card and "filename='a.memory'" in card


@pytest.mark.parametrize(
    "filename",
    ("../evil.memory", "/evil.memory", "a/../../evil.memory", "./a.memory", "a\\b.memory", "book", "README.md")
    + ("config.json", "model.safetensors", "model-00001-of-00002.safetensors", "memory.bin"),
)
def test_a_name_that_is_no_place_for_a_memory_is_refused(online: LoopbackHub, model, filename, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(ValueError, match="relative name that ends in `.memory`"):
        model.read([1, 2, 3]).push_to_hub("tester/book", filename=filename)
    assert not online.requests and not list(tmp_path.rglob("*evil*"))


def test_the_card_has_the_full_name(online: LoopbackHub, model):
    model.read([1, 2, 3]).push_to_hub("book", filename="texts/first.memory")
    card = online.files("tester/book")["README.md"].decode()
    assert "from_pretrained('tester/book', model=model, filename='texts/first.memory')" in card
    back = MemoryCache.from_pretrained("tester/book", model=model, filename="texts/first.memory")
    assert back.info.tokens == 3


def test_a_model_with_or_without_a_card_stays_as_it_is(online: LoopbackHub, model):
    model.push_to_hub("tester/model")
    before = online.files("tester/model")
    model.read([1, 2, 3]).push_to_hub("tester/model", filename="book.memory")
    after = online.files("tester/model")
    assert after.keys() - before.keys() == {"book.memory"} and before.items() <= after.items()
    HfApi().delete_file("README.md", "tester/model")
    model.read([1, 2, 3, 4]).push_to_hub("tester/model", filename="book.memory")
    assert "README.md" not in online.files("tester/model")
