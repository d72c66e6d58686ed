"""Tiny models for compressed caches, and a Llama that makes such a cache for itself, for the property suite."""

import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from hf_memory import SubGenCache


TINY = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "initializer_range": 0.3,
}


def tiny_llama(model_class: type[LlamaForCausalLM] = LlamaForCausalLM, **fields) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return model_class(LlamaConfig(**TINY | fields)).eval()


def tiny_qwen(**fields) -> Qwen3ForCausalLM:
    """Query and key norms, and heads that are not hidden size / heads wide."""
    torch.manual_seed(0)
    return Qwen3ForCausalLM(Qwen3Config(**TINY | {"head_dim": 32} | fields)).eval()


class CachedLlama(LlamaForCausalLM):
    """Uses its own kind of cache where it would make a `DynamicCache`, and tells it of padding."""

    make_cache = None

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        use_cache=None,
        **kwargs,
    ):
        is_new = past_key_values is None or (
            type(past_key_values) is DynamicCache and not past_key_values.get_seq_length()
        )
        if is_new and use_cache is not False and not self.training:
            past_key_values = type(self).make_cache(self.config)
        if isinstance(past_key_values, SubGenCache) and not past_key_values.get_seq_length():
            known = isinstance(attention_mask, Tensor) and attention_mask.dim() == 2
            inputs = inputs_embeds if input_ids is None else input_ids
            past_key_values.set_padding(attention_mask if known else torch.ones(inputs.shape[:2]))
        kwargs |= {"past_key_values": past_key_values, "use_cache": use_cache, "inputs_embeds": inputs_embeds}
        return super().forward(input_ids, attention_mask=attention_mask, position_ids=position_ids, **kwargs)
