"""Tiny teachers of every family that can be converted, and what hybrids of them have to keep."""

import sys
from typing import Any

import torch
from torch.nn.functional import linear, normalize
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hf_memory.conversion.projections import read_projections
from hf_memory.evaluation.properties_tiny import random_model, tiny_config
from hf_memory.models.hybrid.configuration_hybrid import MemoryHybridConfig
from hf_memory.models.hybrid.modeling_hybrid import decoder_layers, find_attention


ROPE = {"rope_type": "default", "rope_theta": 10000.0}
BOTH_KINDS = {"layer_types": ["sliding_attention", "full_attention"]}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_chunk_size": 16}
HALF_LINEAR = {"layer_types": ["linear_attention", "full_attention"], "num_hidden_layers": 2}

# Families that every run of the tests tries: the ones that people convert, and one for each way to be different.
COMMON = (
    "cohere2", "dbrx", "gemma2", "gemma3_text", "glm4", "gpt2", "gpt_bigcode", "gpt_neox", "gpt_oss", "granite",
    "lfm2", "llama", "mistral", "mixtral", "nemotron", "olmo2", "opt", "persimmon", "phi", "phi3", "qwen2", "qwen3",
    "qwen3_moe", "smollm3", "stablelm", "starcoder2",
)  # fmt: skip
# The long tail.
OTHERS = (
    "afmoe", "apertus", "arcee", "aria_text", "bamba", "beam", "biogpt", "bitnet", "cohere", "cohere2_moe",
    "cohere_compass_text", "ctrl", "cwm", "dots1", "ernie4_5", "ernie4_5_moe", "exaone4", "exaone_moe",
    "flex_olmo", "flint", "gemma", "glm", "glm4_moe", "gpt-sw3", "granite_swa", "granitemoe", "granitemoe_swa",
    "granitemoehybrid", "granitemoeshared", "helium", "hunyuan_v1_dense", "hunyuan_v1_moe", "hy_v3", "hyperclovax",
    "internlm3", "iquestcoder", "jais2", "jamba", "kolibri1", "laguna", "lfm2_moe", "lfm3", "llama4_text",
    "mellum", "mimo_v2_flash", "minimax_m2", "minimax_m3_vl_text", "ministral", "ministral3", "modernbert-decoder",
    "nanochat", "nemotron_h", "olmo", "olmo3", "olmo_hybrid", "olmoe", "phimoe", "qwen2_moe", "qwen3_5_moe_text",
    "qwen3_5_text", "qwen3_next", "seed_oss", "solar_open", "vaultgemma",
)  # fmt: skip
SUPPORTED = tuple(sorted(COMMON + OTHERS))

# A gate of its own, or a norm, between attention and its output projection is not taken over.
GATED = {"afmoe", "beam", "bitnet", "laguna", "lfm3", "qwen3_5_moe_text", "qwen3_5_text", "qwen3_next"}
# Several tokens behind a cache are wrong in these teachers themselves, one token is right.
ONE_BY_ONE = {"jamba"}
# In this one the first token behind a cache is wrong already.
BREAKS_ITSELF = {"bamba"}

# Fields beside the usual ones that have to shrink, or to agree with what has shrunk. Where a family has layers without
# attention, layer 1 has it.
FIELDS: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1], **MAMBA},
    "cohere_compass_text": BOTH_KINDS | {"rope_parameters": dict.fromkeys(BOTH_KINDS["layer_types"], ROPE)},
    "dbrx": {
        "d_model": 64,
        "n_heads": 4,
        "n_layers": 2,
        "max_seq_len": 512,
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "gemma2": BOTH_KINDS | {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0},
    "gemma3_text": BOTH_KINDS,
    "granitemoehybrid": {"layer_types": ["mamba", "attention"], **MAMBA},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 8, "use_mamba_kernels": False},
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_ff_dim": 128},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "lfm3": {"layer_types": ["conv", "full_attention"]},
    "llama": {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
                                  "high_freq_factor": 4.0, "original_max_position_embeddings": 64}},
    "mimo_v2_flash": {"v_head_dim": 16, "n_routed_experts": 4},
    "nemotron_h": {"layers_block_type": ["mlp", "attention"]},
    "opt": {"ffn_dim": 128, "word_embed_proj_dim": 32},
    "olmo_hybrid": HALF_LINEAR | {"linear_num_key_heads": 4, "linear_num_value_heads": 4},
    "qwen3_5_moe_text": HALF_LINEAR,
    "qwen3_5_text": HALF_LINEAR,
    "qwen3_next": HALF_LINEAR,
    "stablelm": {"qk_layernorm": True, "use_qkv_bias": True},
}  # fmt: skip


# Their linear attention calls a kernel where one is installed, and on a CPU that fails.
LINEAR = {"olmo_hybrid", "qwen3_5_moe_text", "qwen3_5_text", "qwen3_next"}


def tiny_teacher(family: str) -> PreTrainedModel:
    """Two layers, with every parameter away from the neutral value that some start at."""
    model = random_model(tiny_config(family, **FIELDS.get(family, {}))).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # The shift of a norm on queries and keys is what a memory cannot take over (persimmon).
            if not name.endswith("layernorm.bias") or "self_attn" not in name:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


def inherited_and_expected(
    teacher: PreTrainedModel, config: MemoryHybridConfig, layer: int
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """What the projections for a memory give, and what attention itself makes of one token at position 0."""
    seen = {}

    def capture(module, query, key, value, *args, **kwargs):
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        heads = torch.randn(query.shape[0], query.shape[2], query.shape[1], value.shape[-1])
        seen["last"] = query, key, value, heads
        return heads, None

    def keep(module, args, kwargs, output):
        seen["call"] = (*seen["last"], args[0] if args else kwargs["hidden_states"], output[0])

    attention = find_attention(decoder_layers(teacher)[layer])[1]
    module = sys.modules[type(attention).__module__]
    interface, eager = ALL_ATTENTION_FUNCTIONS._global_mapping, module.eager_attention_forward
    sdpa = interface["sdpa"]
    handle = attention.register_forward_hook(keep, with_kwargs=True)
    try:
        interface["sdpa"] = module.eager_attention_forward = capture
        with torch.no_grad():
            teacher(torch.tensor([[5]]))
    finally:
        handle.remove()
        interface["sdpa"], module.eager_attention_forward = sdpa, eager
    query, key, value, heads, x, output = seen["call"]
    pairs = {}
    for name, (weight, bias) in read_projections(attention, config).items():
        if name == "o_proj":
            pairs[name] = linear(heads.flatten(2), weight, bias), output
            continue
        want = {"q_proj": query, "k_proj": key, "v_proj": value}[name].transpose(1, 2)
        got = linear(x, weight, bias).unflatten(-1, want.shape[2:])
        # Norms and scales change the length of queries and keys, and memories ignore it.
        pairs[name] = (got, want) if name == "v_proj" else (normalize(got, dim=-1), normalize(want, dim=-1))
    return pairs
