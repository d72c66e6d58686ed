# Copyright 2026 the hf-memory authors
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""The decoder that all architectures share.

An architecture adds a configuration, its mixers, and declarations:

```python
class XPreTrainedModel(MemoryPreTrainedModel):
    config: XConfig


class XModel(MemoryDecoderMixin, XPreTrainedModel):
    mixer_classes = {MEMORY: XMixer}


class XForCausalLM(MemoryForCausalLMMixin, XPreTrainedModel, MemoryGenerationMixin):
    decoder_class = XModel


class XForSequenceClassification(MemoryForSequenceClassificationMixin, XPreTrainedModel):
    decoder_class = XModel
```

A mixer is built as `mixer(config, layer_idx)` and called as `mixer(hidden_states, position_embeddings=,
attention_mask=, padding_mask=, cu_seqlens=, past_key_values=, **kwargs)`. It maps `[B, T, D]` to `[B, T, D]` and keeps
what it must remember in its layer of the cache.
"""

from typing import ClassVar

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache, StaticCache
from transformers.generation import GenerationConfig, GenerationMixin, GenerationMode
from transformers.masking_utils import find_packed_sequence_indices
from transformers.modeling_layers import GenericForSequenceClassification, GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, auto_docstring, can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.import_utils import is_tracing
from transformers.utils.output_capturing import capture_outputs

from hf_memory.cache import MemoryCache, StaticMemoryCache, memory_layer
from hf_memory.cache_layers import MemorySlidingCacheLayer, window_positions
from hf_memory.configuration import MEMORY, MEMORY_SLIDING, SLIDING, MemoryConfig
from hf_memory.layers import (
    GateProjection,
    InitialMemory,
    MemoryRMSNorm,
    MemoryRotaryEmbedding,
    PersistentTokens,
    ShortConvolution,
    SlidingWindowAttention,
    create_window_mask,
)
from hf_memory.reading import MemoryReaderMixin, behind_memory, match_rows


Masks = dict[str, Tensor | None]


class MemoryMLP(nn.Module):
    """Gated feed-forward block (SwiGLU with the default `hidden_act`)."""

    def __init__(self, config: MemoryConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))


class MemoryDecoderLayer(GradientCheckpointingLayer):
    """Pre-norm block: mixer, then feed-forward, each with a residual."""

    def __init__(self, config: MemoryConfig, mixer: nn.Module) -> None:
        super().__init__()
        self.input_layernorm = MemoryRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mixer = mixer
        self.post_mixer_layernorm = MemoryRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MemoryMLP(config)

    def forward(self, hidden_states: Tensor, **kwargs: Unpack[TransformersKwargs]) -> Tensor:
        hidden_states = hidden_states + self.mixer(self.input_layernorm(hidden_states), **kwargs)
        return hidden_states + self.mlp(self.post_mixer_layernorm(hidden_states))


class MemoryPreTrainedModel(MemoryReaderMixin, PreTrainedModel):
    """What holds for the models of every architecture."""

    config: MemoryConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["MemoryDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    # Prefix keys and windows of valid tokens need a mask of our own, which flash attention does not take.
    _supports_flash_attn = False
    _supports_sdpa = True
    _supports_flex_attn = False
    _can_compile_fullgraph = True
    # Decoding with an assistant takes back tokens, a recurrent memory cannot.
    _is_stateful = True
    _keep_in_fp32_modules_strict = ["gates", "initial_memory"]
    _can_record_outputs = {"hidden_states": MemoryDecoderLayer, "attentions": SlidingWindowAttention}
    _cache_class: ClassVar[type[MemoryCache]] = MemoryCache

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        # transformers finds out by reading the source file of the class, and attention lives in another one here.
        return True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, InitialMemory):
            for i, weight in enumerate(module.weights):
                init.normal_(weight, std=module.init_std(i, std))
            if module.norm is not None:
                init.ones_(module.norm_weight)
                init.zeros_(module.norm_bias)
        elif isinstance(module, GateProjection):
            init.constant_(module.bias, module.initial_bias)
        elif isinstance(module, ShortConvolution):
            bound = module.kernel_size**-0.5
            init.uniform_(module.weight, -bound, bound)
        elif isinstance(module, PersistentTokens):
            init.normal_(module.tokens, std=std)


class MemoryDecoderMixin:
    """Embedding, blocks and final norm; the body of an `XModel`."""

    mixer_classes: ClassVar[dict[str, type[nn.Module]]]

    def __init__(self, config: MemoryConfig) -> None:
        super().__init__(config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(
            MemoryDecoderLayer(config, self.mixer_classes[layer_type](config, layer_idx))
            for layer_idx, layer_type in enumerate(config.layer_types)
        )
        self.norm = MemoryRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = MemoryRotaryEmbedding(config) if config.has_window else None
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    @auto_docstring
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: Tensor | Masks | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPast:
        if (input_ids is None) ^ (inputs_embeds is not None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)

        if inputs_embeds.shape[1] == 0:
            raise ValueError("The input is empty: give at least one token.")
        is_continued = past_key_values is not None and has_read(past_key_values)
        if is_continued and self.gradient_checkpointing and self.training:
            raise ValueError(
                "Gradient checkpointing cannot continue from a cache: call `model.gradient_checkpointing_disable()`, "
                "or pass the whole text without `past_key_values`."
            )
        padding_mask = find_padding(attention_mask, inputs_embeds, is_continued)
        cu_seqlens = find_packing(kwargs.get("cu_seq_lens_q"), position_ids, inputs_embeds, padding_mask)
        if cu_seqlens is not None:
            if past_key_values is not None:
                raise ValueError(
                    "A cache continues one sequence per row, but this row packs several: pass them without "
                    "`past_key_values`, or one row each."
                )
        elif past_key_values is not None:
            memory_layer(past_key_values, 0).check_rows(inputs_embeds.shape[0])
        elif use_cache:
            past_key_values = self._cache_class(config=self.config)
        masks = attention_mask
        if not isinstance(masks, dict):
            masks = create_memory_masks(self.config, inputs_embeds, padding_mask, past_key_values, cu_seqlens)

        position_embeddings = None
        if self.rotary_emb is not None:
            if position_ids is None:
                position_ids = find_positions(self.config, inputs_embeds, padding_mask, past_key_values, cu_seqlens)
            position_embeddings = self.rotary_emb(inputs_embeds, position_ids)

        hidden_states = inputs_embeds
        for i, decoder_layer in enumerate(self.layers[: self.config.num_hidden_layers]):
            hidden_states = decoder_layer(
                hidden_states,
                position_embeddings=position_embeddings,
                attention_mask=masks.get(self.config.layer_types[i]),
                padding_mask=padding_mask,
                cu_seqlens=cu_seqlens,
                past_key_values=past_key_values,
                position_ids=position_ids,
                use_cache=use_cache,
                **kwargs,
            )
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values)


def has_read(past_key_values: Cache) -> bool:
    """Whether a cache holds anything."""
    # A teacher's own linear-attention layers know nothing of the kind; memory layers beside them do.
    return any(
        getattr(layer, "is_initialized", False) and getattr(layer, "has_states", True)
        for layer in past_key_values.layers
    )


def find_padding(
    attention_mask: Tensor | Masks | None, inputs_embeds: Tensor, is_continued: bool = False
) -> Tensor | None:
    """Which of the T new tokens are valid, `[B, T]` bool; `None` when all of them are.

    Args:
        attention_mask: `[B, T]`, behind a cache `[B, >= T]`, whose last T columns belong to the new tokens, or masks
            made in advance.
        inputs_embeds: `[B, T, D]`.
        is_continued: whether a cache holds earlier tokens.

    Raises:
        ValueError: for a mask of another shape.
    """
    if attention_mask is None:
        return None
    batch, length = inputs_embeds.shape[:2]
    if isinstance(attention_mask, dict):
        if MEMORY not in attention_mask:
            raise ValueError(f"Masks made in advance need an entry {MEMORY!r}, got {list(attention_mask)}.")
        return attention_mask[MEMORY]
    shape = tuple(attention_mask.shape)
    if len(shape) != 2 or shape[0] != batch or shape[1] < length or (shape[1] > length and not is_continued):
        raise ValueError(
            "`attention_mask` must be [batch, tokens] with a column for each token, cached ones included (a memory "
            f"has no use for a mask between pairs of tokens), got shape {shape} for {batch} rows of {length} new "
            f"tokens {'behind a' if is_continued else 'without a'} cache."
        )
    mask = attention_mask[:, -length:].bool().contiguous()
    # Reading the mask waits for a GPU. That is worth it before a long call, which the check may spare the work of
    # moving tokens around, but not before one token.
    is_cheap = mask.device.type == "cpu" or length > 1
    return None if is_cheap and not is_tracing(mask) and bool(mask.all()) else mask


def find_packing(
    cu_seq_lens: Tensor | None, position_ids: Tensor | None, inputs_embeds: Tensor, padding_mask: Tensor | None
) -> Tensor | None:
    """Boundaries `[N + 1]` of sequences packed into the row, from the caller or from positions that start anew.

    Raises:
        ValueError: for packed sequences in a batch of several rows, or with padding.
    """
    batch, length = inputs_embeds.shape[:2]
    if cu_seq_lens is None:
        # Positions of padded tokens repeat, which looks like a new start.
        if position_ids is None or length == 1 or padding_mask is not None or is_tracing(position_ids):
            return None
        sequences = find_packed_sequence_indices(position_ids)
        if sequences is None:
            return None
        first = torch.diff(sequences[0], prepend=sequences.new_full((1,), -1)).nonzero().flatten()
        cu_seq_lens = torch.cat((first, first.new_full((1,), length)))
    if batch != 1 or padding_mask is not None:
        raise ValueError(
            "Packed sequences (`cu_seq_lens_q`, or `position_ids` that start anew inside a row) must be given as one "
            f"row without padding, got {batch} rows{' with padding' if padding_mask is not None else ''}."
        )
    return cu_seq_lens


def packed_sequence_ids(cu_seqlens: Tensor, length: int) -> Tensor:
    """Which of the packed sequences each of `length` tokens belongs to, `[T]`."""
    ends = cu_seqlens[1:].long()
    return torch.searchsorted(ends, torch.arange(length, device=ends.device), right=True)


def find_window(config: MemoryConfig, past_key_values: Cache | None) -> MemorySlidingCacheLayer | None:
    """First cache layer with a window; all of them have read the same tokens."""
    first = next(i for i, layer_type in enumerate(config.layer_types) if layer_type in (MEMORY_SLIDING, SLIDING))
    return memory_layer(past_key_values, first, MemorySlidingCacheLayer)


def find_positions(
    config: MemoryConfig,
    inputs_embeds: Tensor,
    padding_mask: Tensor | None,
    past_key_values: Cache | None,
    cu_seqlens: Tensor | None,
) -> Tensor:
    """Positions `[B or 1, T]` of the new tokens among the valid ones of their sequence."""
    length, device = inputs_embeds.shape[1], inputs_embeds.device
    if cu_seqlens is None:
        return window_positions(find_window(config, past_key_values), length, padding_mask, device)[0]
    starts = cu_seqlens[packed_sequence_ids(cu_seqlens, length)].to(device)
    return (torch.arange(length, device=device) - starts)[None]


def create_memory_masks(
    config: MemoryConfig,
    inputs_embeds: Tensor,
    padding_mask: Tensor | None,
    past_key_values: Cache | None,
    cu_seqlens: Tensor | None = None,
) -> Masks:
    """Masks by layer type: the padding mask of memory layers, and that of attention over a window."""
    masks = {MEMORY: padding_mask}
    if config.has_window:
        sequence_ids = None
        if cu_seqlens is not None:
            sequence_ids = packed_sequence_ids(cu_seqlens, inputs_embeds.shape[1])
        layer = find_window(config, past_key_values)
        mask = create_window_mask(config, inputs_embeds, layer, padding_mask, sequence_ids)
        masks |= {MEMORY_SLIDING: mask, SLIDING: mask}
    return masks


class MemoryGenerationMixin(GenerationMixin):
    """`generate()` with memory caches."""

    @torch.no_grad()
    def generate(
        self, inputs: Tensor | None = None, generation_config: GenerationConfig | None = None, *args, **kwargs
    ):
        """`GenerationMixin.generate`, which behind a memory that was read or loaded takes the new tokens only.

        Such a memory stands for a text whose ids nobody has. It goes on with the new tokens and those generated, with
        as many rows as that takes; fork it first to keep it as it is.
        """
        memory = kwargs.get("past_key_values")
        if getattr(memory, "takes_new_tokens_only", False):
            given = (kwargs.get("inputs_embeds"), kwargs.get("input_ids"), inputs)
            tokens = next((x for x in given if x is not None), None)
            if tokens is None or tokens.shape[1] == 0:
                raise ValueError("A memory needs at least one new token to go on from.")
            names = ("prefill_chunk_size", "num_beams", "num_return_sequences")
            settings = generation_config or self.generation_config
            chunk, *copies = (kwargs.get(name, getattr(settings, name, None)) for name in names)
            with_positions = chunk is None and kwargs.get("position_ids") is None
            match_rows(memory, tokens.shape[0], max(number or 1 for number in copies))
            kwargs |= behind_memory(memory, tokens, kwargs.get("attention_mask"), with_positions)
        return super().generate(inputs, generation_config, *args, **kwargs)

    def _prepare_cache_for_generation(
        self,
        generation_config: GenerationConfig,
        model_kwargs: dict,
        generation_mode: GenerationMode,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        super()._prepare_cache_for_generation(
            generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
        )
        # transformers has decided which kind of cache it is, how long and where; only its class is not ours.
        stock = model_kwargs.get("past_key_values")
        if getattr(stock, "_is_user_defined", False):
            return
        if type(stock) is DynamicCache:
            model_kwargs["past_key_values"] = self._cache_class(self.config, offloading=stock.offloading)
        elif type(stock) is StaticCache:
            # The longest so far, so that a shorter prompt does not compile again.
            longest = max(max_cache_length, getattr(self, "_previous_max_cache_length", 0))
            model_kwargs["past_key_values"] = StaticMemoryCache(self.config, longest, stock.offloading)
        if generation_config.is_assistant:
            model_kwargs["past_key_values"].activate_past_recording()  # which a memory refuses

    @staticmethod
    def create_masks_for_generate(
        config: MemoryConfig,
        inputs_embeds: Tensor,
        attention_mask: Tensor | None,
        past_key_values: Cache | None,
        **kwargs,
    ) -> Masks:
        """Masks for a compiled forward pass, made outside of it."""
        padding_mask = find_padding(attention_mask, inputs_embeds, has_read(past_key_values))
        return create_memory_masks(config, inputs_embeds, padding_mask, past_key_values)


class MemoryForCausalLMMixin:
    """Language-model head; the body of an `XForCausalLM`."""

    decoder_class: ClassVar[type[PreTrainedModel]]
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: MemoryConfig) -> None:
        super().__init__(config)
        self.model = self.decoder_class(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    @auto_docstring
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: Tensor | Masks | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CausalLMOutputWithPast:
        outputs: BaseModelOutputWithPast = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept, :])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class MemoryForSequenceClassificationMixin(GenericForSequenceClassification):
    """Head of transformers for sequence classification; the body of an `XForSequenceClassification`."""

    decoder_class: ClassVar[type[PreTrainedModel]]

    def __init__(self, config: MemoryConfig) -> None:
        # Past the constructor of transformers, which asks `AutoModel` for the decoder. That knows configurations by
        # their exact class, and code from a model folder is imported twice: for the configuration and for the model.
        super(GenericForSequenceClassification, self).__init__(config)
        self.num_labels = config.num_labels
        self.model = self.decoder_class(config)
        self.score = nn.Linear(config.hidden_size, self.num_labels, bias=False)
        self.post_init()
