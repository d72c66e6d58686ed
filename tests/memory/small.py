"""Small models with memories, for the tests of reading and of memory files."""

import torch

from hf_memory import TitansConfig, TitansForCausalLM
from hf_memory.cache import MemoryCache
from hf_memory.memory_file import named_tensors


def tiny(**fields) -> TitansForCausalLM:
    sizes = {"vocab_size": 260, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "chunk_size": 4, "num_persistent_tokens": 3, "sliding_window": 8}
    # Ten times the usual weights, so that what is lost shows.
    fixed = {"eos_token_id": None, "initializer_range": 0.2}
    return TitansForCausalLM(TitansConfig(**(sizes | fixed | fields))).eval()


def logits_behind(model: torch.nn.Module, memory: MemoryCache, ids: torch.Tensor) -> torch.Tensor:
    """What the model says about more tokens; the memory stays as it is."""
    with torch.no_grad():
        return model(ids, past_key_values=memory.clone(), use_cache=True).logits


def tensors_of(memory: MemoryCache) -> list[torch.Tensor]:
    """All that a memory has learned from its text, in the order of the names."""
    return [tensor for _, tensor in sorted(named_tensors(memory).items())]
