"""Caches of transformers for models as they are: `PolarQuantCache` and `SubGenCache`."""

from collections.abc import Callable, Iterator
from typing import Literal

from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer
from transformers.configuration_utils import PreTrainedConfig

from hf_memory.cache import MemoryCacheMixin
from hf_memory.cache_layers import LAYER_CLASSES
from hf_memory.cache_states import MemoryStatesMixin
from hf_memory.compression.layers import CompressedLayer
from hf_memory.compression.polar_quant import GROUP
from hf_memory.compression.polar_quant_layer import PolarQuantLayer
from hf_memory.compression.subgen_attention import SUBGEN
from hf_memory.compression.subgen_layer import KCentreLayer, SamplerLayer, SubGenLayer
from hf_memory.configuration import MemoryConfig


class CompressedCache(MemoryCacheMixin, DynamicCache):
    """A `DynamicCache` whose layers with full attention are compressed; all others stay what transformers makes them.

    Windows of sliding attention, states of linear attention and memories of a hybrid have their bound already.

    Args:
        config: the model's configuration.
        make_layer: makes the layer of an index.

    Raises:
        ValueError: for a model with memories, and for one without any layer to compress.
    """

    # Its layers assign their tensors: decoding must never be compiled behind the user's back.
    is_compileable = False

    def __init__(self, config: PreTrainedConfig, make_layer: Callable[[int], CompressedLayer]) -> None:
        name = type(self).__name__
        if config.is_encoder_decoder:
            raise ValueError(f"A {name} is for decoders, and {config.model_type!r} has an encoder, too.")
        config = config.get_text_config(decoder=True)
        if isinstance(config, MemoryConfig):
            raise ValueError(
                f"A {config.model_type!r} model has a memory of fixed size already, and no keys and values that a "
                f"{name} could compress: leave the cache out."
            )
        super().__init__(config=config)
        if hasattr(config, "memory_layer_types"):
            self._use_own_layers(config, LAYER_CLASSES)
        full = [index for index, layer in enumerate(self.layers) if type(layer) is DynamicLayer]
        if not full:
            kinds = ", ".join(sorted({type(layer).__name__ for layer in self.layers}))
            raise ValueError(
                f"A {config.model_type!r} model has no layer with full attention that a {name} could compress, only "
                f"{kinds}: its own cache serves."
            )
        for index in full:
            self.layers[index] = make_layer(index)

    @property
    def full_nbytes(self) -> int:
        """Size, in bytes, that this cache would have without compression."""
        compressed = [layer for layer in self.layers if isinstance(layer, CompressedLayer)]
        return self.nbytes + sum(layer.full_nbytes - layer.nbytes for layer in compressed)

    def _tensors(self) -> Iterator[Tensor]:
        for layer in self.layers:
            if isinstance(layer, CompressedLayer | MemoryStatesMixin):
                yield from layer.tensors()
            else:
                yield from (value for value in vars(layer).values() if isinstance(value, Tensor))


class PolarQuantCache(CompressedCache):
    """Keeps every token, all but the last `window` in 4 bits per coordinate: a quarter of a 16-bit cache.

    Each call decodes all codes of a layer for its attention: the cache saves memory, not time. Any attention works,
    padding, beams and `crop` do as with a `DynamicCache`.

    Args:
        config: configuration of the model, any decoder of transformers whose heads are a multiple of 16 wide.
        window: recent tokens kept in full precision.
        seed: of the rotation.

    Raises:
        ValueError: for a negative window, or a model that the cache does not fit.

    Example:

    ```python
    >>> cache = PolarQuantCache(model.config)
    >>> model.generate(**inputs, past_key_values=cache)
    >>> cache.nbytes
    ```
    """

    def __init__(self, config: PreTrainedConfig, window: int = 128, seed: int = 0) -> None:
        if window < 0:
            raise ValueError(f"`window` must be 0 or more tokens, got {window}.")
        super().__init__(config, lambda index: PolarQuantLayer(window, seed))
        width = getattr(config.get_text_config(decoder=True), "head_dim", None) or GROUP
        if width % GROUP:
            raise ValueError(
                f"PolarQuant codes groups of {GROUP} coordinates, and the heads of this {config.model_type!r} are "
                f"{width} wide, no multiple of that: use a SubGenCache, which takes any width."
            )


class SubGenCache(CompressedCache):
    """Keeps at most `budget` tokens for each head, whatever the length of the text.

    The first `sinks` and the last `window` tokens are always among them. In between, mode "kcenter" keeps tokens whose
    keys are far from each other; tokens that it drops are forgotten. Mode "sampler" (experimental) keeps samples that
    estimate the attention to all tokens without bias, in as many bytes, counted in the model's dtype; its states are
    float32.

    A prompt read in one call is read exactly, and compressed behind the call. Reading it in pieces, or token by token,
    compresses in between and gives other results. `crop`, and with it assisted decoding, is refused.

    Transformers shows a cache no mask, and a padded token must not be kept: for more than one row, `padding_mask` says
    which tokens of the first call are padding, all of it in front. Without one a single row is taken to have none.

    Args:
        config: configuration of the model, any decoder of transformers.
        budget: largest number of tokens kept in each layer with full attention, for each row and head.
        window: recent tokens among them; half of the budget by default.
        mode: "kcenter" (any attention), or "sampler", which needs `model.set_attn_implementation("subgen")` before.
        sinks: first tokens among them.
        padding_mask: `[B, T]`, the `attention_mask` of the prompt, 0 for padded tokens.
        seed: of the sampler; the other mode has nothing random.
        samples: keys that the sampler keeps of each cluster.
        radius: largest distance of a key from the centre of its cluster, as long as the sampler may open more.

    Raises:
        ValueError: for a budget without room, an unknown mode, padding elsewhere, or a model that the cache does not
            fit.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        budget: int = 1024,
        window: int | None = None,
        mode: Literal["kcenter", "sampler"] = "kcenter",
        sinks: int = 4,
        padding_mask: Tensor | None = None,
        seed: int = 0,
        samples: int = 3,
        radius: float = 8.0,
    ) -> None:
        window = budget // 2 if window is None else window
        room = budget - window - sinks
        if window < 1 or sinks < 0 or samples < 1:
            raise ValueError(
                "`window` and `samples` must be 1 or more and `sinks` 0 or more, "
                f"got window={window}, samples={samples} and sinks={sinks}."
            )
        if room < 1:
            raise ValueError(
                f"A budget of {budget} tokens leaves none beside a window of {window} and {sinks} sinks: it must be "
                f"{window + sinks + 1} or more, or the window smaller."
            )

        def make_layer(index: int) -> SubGenLayer:
            if mode == "kcenter":
                return KCentreLayer(budget, window, sinks)
            # A key and a value are two vectors: half of them are slots, half clusters with a centre and samples each.
            clusters, slots = max(room // (1 + samples), 1), max(room // 2, 1)
            return SamplerLayer(window, sinks, clusters, samples, slots, radius, hash((seed, index)))

        if mode not in ("kcenter", "sampler"):
            raise ValueError(f'`mode` must be "kcenter" or "sampler", got {mode!r}.')
        super().__init__(config, make_layer)
        attention = config.get_text_config(decoder=True)._attn_implementation
        if mode == "sampler" and attention != SUBGEN:
            raise ValueError(
                f'SubGen\'s mode "sampler" has an attention of its own, and this model uses {attention!r}: call '
                f"`model.set_attn_implementation({SUBGEN!r})` first."
            )
        if padding_mask is not None:
            self.set_padding(padding_mask)

    def set_padding(self, padding_mask: Tensor) -> None:
        """Say which tokens of the first call will be padding; a `reset` forgets it.

        Args:
            padding_mask: `[B, T]`, 0 for padded tokens. The cache may have a multiple of B rows, each row repeated, as
                beams are.

        Raises:
            ValueError: unless all padding is in front, or after the first call.
        """
        valid = padding_mask.bool()
        if valid.dim() != 2 or not valid.shape[1] or (valid[:, :-1] & ~valid[:, 1:]).any():
            raise ValueError(
                "A SubGenCache takes a mask [B, T] with padding in front of a row only, got one of shape "
                f'{tuple(valid.shape)} that is not: let the tokenizer pad with `padding_side="left"`.'
            )
        if self.get_seq_length():
            raise ValueError(
                "The padding of a SubGenCache is set before its first token: `reset` it, or use a new one."
            )
        for layer in self._subgen_layers():
            layer.prompt_padding = (~valid).sum(1).cpu()

    def reset(self) -> None:
        """Forget everything, the padding of the prompt included."""
        super().reset()
        for layer in self._subgen_layers():
            layer.prompt_padding = None

    def _subgen_layers(self) -> Iterator[SubGenLayer]:
        return (layer for layer in self.layers if isinstance(layer, SubGenLayer))
