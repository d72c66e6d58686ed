"""Tiny Llamas with one fault each: what the property suite must find."""

import torch
from torch import nn
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache


def tiny_llama_config() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        max_position_embeddings=4096,
    )


class IgnoresPadding(LlamaForCausalLM):
    def forward(self, input_ids=None, attention_mask=None, **kwargs):
        return super().forward(input_ids, attention_mask=None, **kwargs)


class IgnoresPaddingOfOneToken(LlamaForCausalLM):
    def forward(self, input_ids=None, attention_mask=None, **kwargs):
        if attention_mask is not None and input_ids is not None and input_ids.shape[1] == 1:
            attention_mask = torch.cat([attention_mask[:, :-1], torch.ones_like(attention_mask[:, -1:])], dim=1)
        return super().forward(input_ids, attention_mask=attention_mask, **kwargs)


class IgnoresPositions(LlamaForCausalLM):
    def forward(self, input_ids=None, position_ids=None, **kwargs):
        return super().forward(input_ids, **kwargs)


class RefusesPacking(LlamaForCausalLM):
    def forward(self, input_ids=None, position_ids=None, attention_mask=None, past_key_values=None, **kwargs):
        if position_ids is not None and attention_mask is None and (position_ids.diff() != 1).any():
            raise ValueError("packed sequences are not supported by this model")
        inputs = {"position_ids": position_ids, "attention_mask": attention_mask, "past_key_values": past_key_values}
        return super().forward(input_ids, **inputs, **kwargs)


class ChangesEmbeddings(LlamaForCausalLM):
    def change(self, embeds):
        raise NotImplementedError

    def forward(self, input_ids=None, inputs_embeds=None, **kwargs):
        embeds = self.get_input_embeddings()(input_ids) if inputs_embeds is None else inputs_embeds
        return super().forward(inputs_embeds=self.change(embeds), **kwargs)


class LeaksTheFuture(ChangesEmbeddings):
    def change(self, embeds):
        return embeds + 0.2 * torch.cat([embeds[:, 1:], embeds[:, -1:]], dim=1)


class MixesRows(ChangesEmbeddings):
    def change(self, embeds):
        return embeds + 0.2 * embeds.mean(dim=0, keepdim=True)


class DividesByZero(ChangesEmbeddings):
    def change(self, embeds):
        return embeds / embeds.norm(dim=-1, keepdim=True)


class KeepsStateInItself(ChangesEmbeddings):
    calls = 0

    def change(self, embeds):
        self.calls += 1
        return embeds * (1.5 if self.calls % 5 == 0 else 1.0)


class IgnoresContext(LlamaForCausalLM):
    def __init__(self, config):
        super().__init__(config)
        for layer in self.model.layers:
            nn.init.zeros_(layer.self_attn.o_proj.weight)


class DropsCache(LlamaForCausalLM):
    def forward(self, input_ids=None, attention_mask=None, past_key_values=None, **kwargs):
        length = kwargs["inputs_embeds"].shape[1] if input_ids is None else input_ids.shape[1]
        mask = None if attention_mask is None else attention_mask[:, -length:]
        return super().forward(input_ids, attention_mask=mask, **kwargs)


class FailsWithStaticCache(LlamaForCausalLM):
    def forward(self, input_ids=None, past_key_values=None, **kwargs):
        outputs = super().forward(input_ids, past_key_values=past_key_values, **kwargs)
        if isinstance(past_key_values, StaticCache):
            past_key_values.layers[0].keys.mul_(1.1)
        return outputs


class DoesNotReorder(DynamicCache):
    def reorder_cache(self, beam_idx): ...


class RepeatsInTheWrongOrder(DynamicCache):
    def batch_repeat_interleave(self, repeats):
        for layer in self.layers:
            layer.keys, layer.values = layer.keys.repeat(repeats, 1, 1, 1), layer.values.repeat(repeats, 1, 1, 1)


class SelectsTheFirst(DynamicCache):
    def batch_select_indices(self, indices):
        super().batch_select_indices(torch.arange(len(indices)))


class DoesNotReset(DynamicCache):
    def reset(self): ...


class SharesCopies(DynamicCache):
    def __deepcopy__(self, memo):
        return self


class DoesNotCrop(DynamicCache):
    def crop(self, tokens_to_remove): ...


def with_cache(cache_class: type[DynamicCache]) -> type[LlamaForCausalLM]:
    """A Llama whose cache is of the given class, in `generate()` too."""

    class OwnCache(LlamaForCausalLM):
        def forward(self, input_ids=None, past_key_values=None, use_cache=None, **kwargs):
            if use_cache and past_key_values is None:
                past_key_values = cache_class(config=self.config)
            return super().forward(input_ids, past_key_values=past_key_values, use_cache=use_cache, **kwargs)

        def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs):
            super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
            if type(model_kwargs.get("past_key_values")) is DynamicCache:
                model_kwargs["past_key_values"] = cache_class(config=self.config)

    return OwnCache


class LosesBuffer(LlamaForCausalLM):
    def __init__(self, config):
        super().__init__(config)
        self.register_buffer("table", torch.arange(8.0), persistent=False)
        self.post_init()


class InitialisesLoadedWeights(LosesBuffer):
    def _init_weights(self, module):
        super()._init_weights(module)
        if module is self:
            # The buffer has to be made again on loading; the head has been read from the file.
            torch.arange(8.0, out=self.table)
            self.lm_head.weight.data.normal_(std=0.3)


class ForgetsToInitialise(LlamaForCausalLM):
    def __init__(self, config):
        super().__init__(config)
        self.start = nn.Parameter(torch.zeros(8))
        self.scale = nn.Parameter(torch.empty(8))
        self.post_init()


class IgnoresCheckpointing(LlamaForCausalLM):
    def _set_gradient_checkpointing(self, enable=True, **kwargs): ...


class RecomputesSomethingElse(LlamaForCausalLM):
    """The first layer's MLP changes with every call, so that recomputation differs from the forward pass."""

    def __init__(self, config):
        super().__init__(config)
        self.calls = 0
        self.model.layers[0].mlp.down_proj.register_forward_hook(self.drift)

    def drift(self, module, inputs, output):
        self.calls += 1
        return output * (1 + 0.1 * self.calls)
