"""Memory files on the loopback Hub, with the real client."""

import pytest
import torch
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


def test_the_card_names_the_model_where_it_is_on_the_hub(model):
    info = model.read([1, 2, 3]).info
    assert "base_model" not in memory_card(info, "user/book")
    model.config._name_or_path = "user/model"
    card = memory_card(model.read([1, 2, 3]).info, "user/book", "a.memory")
    assert "base_model: user/model" in card and "filename='a.memory'" in card
