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
"""A pretrained decoder with memories: its own classes, with other modules where attention was in some layers."""

import functools
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.configuration_utils import PreTrainedConfig
from transformers.masking_utils import create_masks_for_generate
from transformers.modeling_utils import PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import AutoModel, AutoModelForCausalLM

from hf_memory.cache import MemoryCache, memory_layer
from hf_memory.configuration import MEMORY
from hf_memory.layers import takes_additive_mask, window_mask
from hf_memory.modeling import MemoryGenerationMixin, find_packing, find_padding, has_read, packed_sequence_ids
from hf_memory.models import ARCHITECTURES
from hf_memory.reading import MemoryReaderMixin

from .configuration_hybrid import MemoryHybridConfig


# Entries of masks made in advance. A teacher with one mask for all layers has it under a name of ours, one with
# several has them under its layer types.
PADDING, WINDOW, TEACHER = "memory_padding", "memory_window", "teacher"
# Layers of transformers that take keyword arguments and do not pass them on to their attention.
KEEPS_KEYWORDS = ("NemotronDecoderLayer", "StableLmDecoderLayer")


class MemoryInputs(NamedTuple):
    """What memories must know about the tokens of a call, beyond the hidden states.

    Attributes:
        padding_mask: `[B, T]` bool, true where a token is valid; `None` when all are.
        window_mask: mask of attention beside a memory; `None` where plain causality says it all.
        cu_seqlens: `[N + 1]` boundaries of sequences packed into one row.
    """

    padding_mask: Tensor | None = None
    window_mask: Tensor | None = None
    cu_seqlens: Tensor | None = None


class WindowedCache:
    """The cache as attention beside a memory sees it: `update` alone, which fills a window of valid tokens."""

    def __init__(self, cache: Cache, padding_mask: Tensor | None) -> None:
        self.cache, self.padding_mask = cache, padding_mask

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args, **kwargs
    ) -> tuple[Tensor, Tensor]:
        """Append keys and values `[B, H, T, D]` and return those of the window followed by the new ones."""
        return self.cache.update(key_states, value_states, layer_idx, padding_mask=self.padding_mask)


class MemorySlotMixin:
    """A memory in the place of attention, called as the teacher's decoder layer calls that.

    It is a model of its own inside the teacher's, so that its architecture initialises it, not the teacher.
    """

    def __init__(self, config: MemoryHybridConfig, layer_idx: int) -> None:
        memory_config = config.make_memory_config()
        super().__init__(memory_config)
        self.memory = mixer_class(memory_config)(memory_config, layer_idx)
        self.known = MemoryInputs()
        self.scale = None
        # CODEPATH: "retrofit" adds the memory to an attention that is still there, and starts by adding nothing.
        if config.memory_mode == "retrofit":
            self.scale = nn.Parameter(torch.zeros(config.hidden_size))
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is self and self.scale is not None:
            init.zeros_(self.scale)

    def forward(
        self,
        hidden_states: Tensor,
        *args,
        memory_inputs: MemoryInputs | None = None,
        past_key_values: Cache | None = None,
        layer_past: Cache | None = None,
        **kwargs,
    ) -> tuple[Tensor, None]:
        """Mix `[B, T, D]`; there are no attention weights to return."""
        known = memory_inputs or self.known
        cache = layer_past if past_key_values is None else past_key_values
        output = self.memory(
            hidden_states, padding_mask=known.padding_mask, cu_seqlens=known.cu_seqlens, past_key_values=cache
        )
        return (output if self.scale is None else self.scale * output), None


class RetrofitAttentionMixin:
    """The teacher's attention, restricted to a window, with a memory beside it as `retrofit`."""

    def forward(
        self, hidden_states: Tensor, *args, memory_inputs: MemoryInputs | None = None, **kwargs
    ) -> tuple[Tensor, Tensor | None]:
        """Attend over the window and add the gated memory, `[B, T, D]`."""
        known = memory_inputs or self.retrofit.known
        caches = {name: kwargs[name] for name in ("past_key_values", "layer_past") if kwargs.get(name) is not None}
        windowed = {name: WindowedCache(cache, known.padding_mask) for name, cache in caches.items()}
        kwargs |= {"attention_mask": known.window_mask, **windowed}
        attended, weights = super().forward(hidden_states, *args, **kwargs)
        remembered, _ = self.retrofit(hidden_states, memory_inputs=known, **caches)
        return attended + remembered, weights


class TeacherDispatchMixin(MemoryReaderMixin):
    """Makes the class that belongs to a configuration: a subclass of the teacher's."""

    config_class = MemoryHybridConfig
    auto_class: type

    def __new__(cls, config: MemoryHybridConfig | None = None, *args, **kwargs):
        # Without a configuration when copied: the class is known then.
        return super().__new__(cls if config is None else cls.for_config(config))

    @classmethod
    def for_config(cls, config: MemoryHybridConfig) -> type:
        """This class itself, or the subclass for the teacher of `config`."""
        if issubclass(cls, PreTrainedModel):
            return cls
        base = cls.auto_class._model_mapping[CONFIG_MAPPING[config.base_model_type]]
        return hybrid_class(cls, base[0] if isinstance(base, (tuple, list)) else base)

    @classmethod
    def register_for_auto_class(cls, auto_class: type | str = "AutoModel") -> None:
        """Called by transformers where the code came with a model: `save_pretrained` then copies that too."""
        cls._auto_class = auto_class if isinstance(auto_class, str) else auto_class.__name__

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, config=None, **kwargs) -> PreTrainedModel:
        """As for any model; a hybrid of any teacher is loaded by the same class."""
        if issubclass(cls, PreTrainedModel):
            return super().from_pretrained(pretrained_model_name_or_path, *args, config=config, **kwargs)
        if not isinstance(config, PreTrainedConfig):
            hub = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
            config = MemoryHybridConfig.from_pretrained(
                config or pretrained_model_name_or_path, **{name: kwargs[name] for name in hub if name in kwargs}
            )
        return cls.for_config(config).from_pretrained(pretrained_model_name_or_path, *args, config=config, **kwargs)

    @classmethod
    def _from_config(cls, config: MemoryHybridConfig, **kwargs) -> PreTrainedModel:
        if issubclass(cls, PreTrainedModel):
            return super()._from_config(config, **kwargs)
        return cls.for_config(config)._from_config(config, **kwargs)


class MemoryHybridModel(TeacherDispatchMixin):
    """Body of a hybrid: embedding, decoder layers, final norm of the teacher, with memories in some layers.

    Instances belong to a subclass of the teacher's body that is made at run time.
    """

    auto_class = AutoModel

    def __init__(self, config: MemoryHybridConfig) -> None:
        super().__init__(config)
        self.install_memories()
        self.post_init()

    def install_memories(self) -> None:
        """Put memories into the layers that shall have them; their weights are new."""
        layers = decoder_layers(self)
        for index in self.config.memory_layers:
            name, attention = find_attention(layers[index])
            slot = slot_class(self.config)(self.config, index)
            # CODEPATH: "replace" leaves nothing of attention, "retrofit" puts a memory beside it.
            if self.config.memory_mode == "replace":
                layers[index].set_submodule(name, slot)
            else:
                # Constructors of attention differ from family to family, so that of the layer becomes the other class.
                attention.__class__ = retrofit_class(type(attention))
                attention.retrofit = slot
            if type(layers[index]).__name__ in KEEPS_KEYWORDS:
                layers[index].register_forward_pre_hook(hand_over, with_kwargs=True)
            self._keep_in_fp32_modules_strict |= set(slot_class(self.config)._keep_in_fp32_modules_strict)

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: Tensor | dict | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        **kwargs,
    ):
        """Arguments and outputs of the teacher's body."""
        tokens = input_ids if inputs_embeds is None else inputs_embeds
        # CODEPATH: a conversion of no layer at all runs the teacher's own code.
        if self.config.memory_layers and tokens is not None:
            use_cache = self.config.use_cache if use_cache is None else use_cache
            cu_seqlens = None
            if isinstance(attention_mask, dict) and PADDING in attention_mask:
                masks = dict(attention_mask)
                known = MemoryInputs(masks.pop(PADDING), masks.pop(WINDOW))
                attention_mask = masks.get(TEACHER, masks)
            else:
                is_continued = past_key_values is not None and has_read(past_key_values)
                padding_mask = find_padding(attention_mask, tokens, is_continued)
                if past_key_values is None:
                    cu_seqlens = find_packing(kwargs.get("cu_seq_lens_q"), position_ids, tokens, padding_mask)
                known = self.memory_inputs(tokens, padding_mask, past_key_values, cu_seqlens)
            if past_key_values is not None:
                memory_layer(past_key_values, self.config.memory_layers[0]).check_rows(tokens.shape[0])
            elif cu_seqlens is not None:
                use_cache = False
            elif use_cache:
                past_key_values = MemoryCache(self.config)
            kwargs["memory_inputs"] = known
        return super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )

    def memory_inputs(
        self,
        tokens: Tensor,
        padding_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> MemoryInputs:
        """What the memories of all layers have to know about new tokens.

        Args:
            tokens: ids `[B, T]` or embeddings `[B, T, D]`, for their shape and device.
            padding_mask: `[B, T]` bool, true where a token is valid.
            past_key_values: cache with the tokens before these.
            cu_seqlens: `[N + 1]` boundaries of sequences packed into the one row.
        """
        return make_memory_inputs(self.config, tokens, self.dtype, padding_mask, past_key_values, cu_seqlens)


def make_memory_inputs(
    config: MemoryHybridConfig,
    tokens: Tensor,
    dtype: torch.dtype,
    padding_mask: Tensor | None,
    past_key_values: Cache | None,
    cu_seqlens: Tensor | None = None,
) -> MemoryInputs:
    """`MemoryHybridModel.memory_inputs` without the model; `dtype` is that of its hidden states."""
    mask = None
    # CODEPATH: "replace" leaves no attention that would need a mask.
    if config.memory_mode == "retrofit" and config.memory_layers:
        shape = torch.empty(*tokens.shape[:2], 0, dtype=dtype, device=tokens.device)
        sequence_ids = None if cu_seqlens is None else packed_sequence_ids(cu_seqlens, tokens.shape[1])
        # All layers have read the same tokens.
        layer = memory_layer(past_key_values, config.memory_layers[0])
        eager = takes_additive_mask(config)
        mask = window_mask(shape, config.memory_window, 0, eager, layer, padding_mask, sequence_ids)
    return MemoryInputs(padding_mask, mask, cu_seqlens)


class MemoryHybridForCausalLM(TeacherDispatchMixin):
    """A pretrained causal language model with memories in some layers.

    Names and values of everything that is not a memory are the teacher's. Instances belong to a subclass of the
    teacher's class that is made at run time.
    """

    auto_class = AutoModelForCausalLM
    _is_stateful = True
    _cache_class = MemoryCache

    def __init__(self, config: MemoryHybridConfig) -> None:
        super().__init__(config)
        # The teacher's constructor names the class of its body, so it is changed afterwards.
        body = self.reader
        body.__class__ = hybrid_class(MemoryHybridModel, type(body))
        body.install_memories()
        self.post_init()

    @staticmethod
    def create_masks_for_generate(
        config: MemoryHybridConfig,
        inputs_embeds: Tensor,
        attention_mask: Tensor | None,
        past_key_values: Cache | None,
        **kwargs,
    ) -> dict:
        """Masks for a compiled forward pass, made outside of it."""
        masks = create_masks_for_generate(config, inputs_embeds, attention_mask, past_key_values, **kwargs)
        # CODEPATH: a conversion of no layer at all runs the teacher's own code.
        if not config.memory_layers:
            return masks
        padding_mask = find_padding(attention_mask, inputs_embeds, has_read(past_key_values))
        known = make_memory_inputs(config, inputs_embeds, inputs_embeds.dtype, padding_mask, past_key_values)
        masks = dict(masks) if isinstance(masks, dict) else {TEACHER: masks}
        return masks | {PADDING: known.padding_mask, WINDOW: known.window_mask}

    @property
    def reader(self) -> PreTrainedModel:
        """The innermost model with all decoder layers: OPT calls its decoder, past the body around that."""
        layers = decoder_layers(self)
        models = [part for part in self.base_model.modules() if isinstance(part, PreTrainedModel)]
        return [model for model in models if any(part is layers for part in model.modules())][-1]

    def memory_inputs(self, *args, **kwargs) -> MemoryInputs:
        """`MemoryHybridModel.memory_inputs`."""
        return self.reader.memory_inputs(*args, **kwargs)


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The decoder layers of a causal language model or of its body.

    Raises:
        ValueError: when the model does not keep them in one list.
    """
    count = model.config.get_text_config(decoder=True).num_hidden_layers
    lists = {
        name: module
        for name, module in model.base_model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count
    }
    # A layer may hold as many experts as there are layers.
    outer = [x for name, x in lists.items() if not any(name.startswith(f"{other}.") for other in lists)]
    if len(outer) != 1:
        raise ValueError(f"{type(model).__name__} does not keep its {count} decoder layers in one list.")
    return outer[0]


def find_attention(layer: nn.Module) -> tuple[str, nn.Module]:
    """Name inside a decoder layer, and module, of its self-attention.

    Raises:
        ValueError: when there is none, or more than one.
    """
    parts = list(layer.named_children())
    inner = [(f"{name}.{n}", child) for name, part in parts for n, child in part.named_children()]
    for candidates in (parts, inner):
        found = [(name, part) for name, part in candidates if type(part).__name__.endswith("Attention")]
        if found:
            break
    if len(found) != 1:
        names = ", ".join(name for name, _ in parts)
        raise ValueError(
            f"A layer of class {type(layer).__name__} has {len(found) or 'no'} self-attention modules among its parts "
            f"({names}); hybrids are built from layers with exactly one."
        )
    return found[0]


def hand_over(layer: nn.Module, args: tuple, kwargs: dict) -> None:
    """Before a layer that keeps keyword arguments to itself: tell its memory what it has to know."""
    for module in layer.modules():
        if isinstance(module, MemorySlotMixin):
            module.known = kwargs.get("memory_inputs") or MemoryInputs()


def mixer_class(memory_config: PreTrainedConfig) -> type[nn.Module]:
    """The mixer of an architecture that keeps states only."""
    return ARCHITECTURES[memory_config.model_type].load("base_model").mixer_classes[MEMORY]


def slot_class(config: MemoryHybridConfig) -> type[MemorySlotMixin]:
    """Class of the modules that stand in for attention."""
    return _slot_class(config.memory["model_type"])


@functools.cache
def _slot_class(model_type: str) -> type[MemorySlotMixin]:
    base = ARCHITECTURES[model_type].load("pretrained_model")
    return type("MemorySlot", (MemorySlotMixin, base), {"__module__": __name__})


@functools.cache
def retrofit_class(attention_class: type[nn.Module]) -> type[nn.Module]:
    """Class of the attention of a layer that gets a memory beside it."""
    return type(
        f"Retrofit{attention_class.__name__}", (RetrofitAttentionMixin, attention_class), {"__module__": __name__}
    )


@functools.cache
def hybrid_class(facade: type, teacher_class: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """Class of hybrids with teachers of a class."""
    bases = (
        (facade, MemoryGenerationMixin, teacher_class)
        if facade is MemoryHybridForCausalLM
        else (facade, teacher_class)
    )
    namespace = {"__module__": __name__, "config_class": MemoryHybridConfig}
    return type(facade.__name__, bases, namespace)


__all__ = ["MemoryHybridForCausalLM", "MemoryHybridModel"]
