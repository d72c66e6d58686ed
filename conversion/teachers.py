"""Which models can be teachers, and why the others cannot."""

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from hf_memory.conversion.schema import ConversionError
from hf_memory.models.hybrid.modeling_hybrid import decoder_layers, find_attention


# What only the code of a family tells, by model type.
WIDER = "heads of its global layers are wider than those of its local ones, and a hybrid has memories of one width"
STATES = "keys and values pass convolutions with states of their own inside attention"
SHARED = "its attention layers share their weights"
LATENT = "its attention keeps compressed keys and values (multi-head latent attention)"
ASSISTANT = "it drafts tokens for another model, whose keys and values it reads"
REASONS = {
    "bailing_hybrid": f"{LATENT}, or is linear",
    "blt": "it is made of several models that read bytes and patches of bytes",
    "diffllama": "each of its heads subtracts two attention maps, which no memory has a counterpart of",
    "doge": "which keys a token sees is computed from all cached values",
    "falcon_h1": "each layer runs attention and a state-space model side by side and keeps both in one cache layer",
    "gemma4_assistant": ASSISTANT,
    "gemma4_text": WIDER,
    "gemma4_unified_assistant": ASSISTANT,
    "gemma4_unified_text": WIDER,
    "inkling2_text": STATES,
    "inkling_text": STATES,
    "jetmoe": "the queries of each token come from experts that are chosen for it",
    "kimi_linear": f"{LATENT}, or is linear",
    "longcat_flash": LATENT,
    "minimax": "it works with a cache class of its own only",
    "moshi": "it is one part of a speech model, which calls it with codebooks",
    "phi4_multimodal": "it holds an image and a speech model besides the language model",
    "qwen4_exp_text": "an index of its own chooses the keys that a token sees",
    "recurrent_gemma": "it keeps its states to itself and returns no cache",
    "reformer": "its attention sorts keys by hashes, and its layers are reversible",
    "rwkv": "it has no attention",
    "zamba": SHARED,
    "zamba2": SHARED,
    "zaya": STATES,
}


def refuse_unsupported(teacher: PreTrainedModel) -> None:
    """Nothing for a model that hybrids can be built from.

    Raises:
        ConversionError: one sentence with the reason, for every other.
    """
    reason = model_reason(teacher)
    if reason is not None:
        raise ConversionError(f"{type(teacher).__name__} cannot be converted: {reason}.")


def config_reason(config: PreTrainedConfig) -> str | None:
    """What a configuration alone tells of `model_reason`."""
    if config.model_type in REASONS:
        return REASONS[config.model_type]
    if getattr(config, "is_encoder_decoder", False):
        return "it is an encoder-decoder model, and memories stand in decoders without cross-attention"
    if config.get_text_config(decoder=True) is not config:
        return "its configuration holds several models; save its language model alone, and convert that"
    if config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return f"AutoModelForCausalLM, which loads hybrids, knows no model type {config.model_type!r}"
    if getattr(config, "num_kv_shared_layers", 0):
        return "some of its layers use the keys and values of others"
    return None


def model_reason(teacher: PreTrainedModel) -> str | None:
    """Why hybrids cannot be built from a model, whose weights may be without values; `None` when they can."""
    reason = config_reason(teacher.config)
    if reason is not None:
        return reason
    try:
        layers = decoder_layers(teacher)
    except ValueError:
        return "it does not keep its decoder layers in one list"
    for layer in layers:
        if sum(type(part).__name__.endswith("Attention") for part in layer.children()) > 1:
            return "its layers have cross-attention besides self-attention"
    attentions = attention_of_layers(teacher)
    if not attentions:
        return "none of its layers has self-attention"
    return next((reason for part in attentions.values() if (reason := _of_attention(part)) is not None), None)


def attention_of_layers(teacher: PreTrainedModel) -> dict[int, nn.Module]:
    """Self-attention modules by layer; layers that mix tokens in another way are left out."""
    found = {}
    for index, layer in enumerate(decoder_layers(teacher)):
        try:
            found[index] = find_attention(layer)[1]
        except ValueError:
            continue
    return found


def _of_attention(attention: nn.Module) -> str | None:
    names = {name for name, _ in attention.named_children()}
    if any(name.startswith("kv_a_proj") for name in names) or "q_a_proj" in names:
        return LATENT
    if "self" in names and "output" in names:
        return "its attention is that of BERT, with a residual connection and a norm inside"
    # Whatever a module calls is among the names of its forward pass, in a wrapped one too.
    forward = type(attention).forward
    while hasattr(forward, "__wrapped__"):
        forward = forward.__wrapped__
    if "ALL_ATTENTION_FUNCTIONS" not in forward.__code__.co_names:
        return "its attention does not go through transformers' attention interface (ALL_ATTENTION_FUNCTIONS)"
    return None


__all__ = ["attention_of_layers", "config_reason", "model_reason", "refuse_unsupported"]
