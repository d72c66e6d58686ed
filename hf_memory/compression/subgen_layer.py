"""The cache layers of SubGen: a fixed number of tokens, and in mode "sampler" samples of all others."""

import torch
from torch import Tensor

from hf_memory.compression.layers import CompressedLayer
from hf_memory.compression.subgen import SamplerState, select_centres


class SubGenLayer(CompressedLayer):
    """Keys and values of the first `sinks` and the last `window` valid tokens of each row, and of some between them.

    The tokens kept are in the order in which they were read and end at the right edge, so that empty slots of a row,
    which has read fewer valid tokens than others, lie where its padding was: the mask that transformers makes of the
    2-D mask then fits. That holds for padding in front of a row only.

    Args:
        window: recent tokens kept.
        sinks: first tokens kept.
    """

    tensor_names = ("keys", "values", "padding")

    def __init__(self, window: int, sinks: int) -> None:
        super().__init__()
        self.window = window
        self.sinks = sinks
        self.prompt_padding: Tensor | None = None
        """`[B]` int64, padded tokens in front of each row; `None` if nobody has said."""

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """See `CompressedLayer`.

        Raises:
            ValueError: for rows whose padding nobody has told.
        """
        rows = key_states.shape[0]
        padding = self.prompt_padding
        if padding is None:
            if rows > 1:
                raise ValueError(
                    f"A SubGenCache cannot see which tokens of these {rows} rows are padding, and must not keep them: "
                    'make it with `padding_mask=inputs["attention_mask"]`, all ones where nothing is padded.'
                )
            padding = torch.zeros(1, dtype=torch.long)
        if rows % len(padding):
            raise ValueError(f"`padding_mask` has {len(padding)} rows, the input has {rows}, which is no multiple.")
        super().lazy_initialization(key_states, value_states)
        # Beams and returned sequences: `generate` repeats each row.
        self.padding = padding.repeat_interleave(rows // len(padding)).to(self.device)

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Append keys and values `[B, H, T, P]`.

        Returns:
            Keys and values that were kept before the call, and the new ones, `[B, H, S + T, P]`: the tokens of one
            call see each other exactly. What is too much is dropped behind the call.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.seen_tokens += key_states.shape[2]
        keys, values = torch.cat((self.keys, key_states), dim=2), torch.cat((self.values, value_states), dim=2)
        self.keys, self.values = self._compressed(keys, values)
        return keys, values

    def _compressed(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """What each mode keeps of all that there is, `[B, H, N, P]`."""
        raise NotImplementedError  # abstract: the modes below have their own

    def _between(self, length: int) -> tuple[Tensor, Tensor]:
        """Where the sinks of each row begin `[B, 1]`, and which of `length` slots lie between sinks and window."""
        slots = torch.arange(length, device=self.padding.device)
        first = (length - self._valid_tokens()).clamp(min=0)[:, None]
        return first, (slots >= first + self.sinks) & (slots < length - self.window)

    def _valid_tokens(self) -> Tensor:
        return (self.seen_tokens - self.padding).clamp(min=0)

    def _kept(self, first: Tensor, between: Tensor, length: int) -> Tensor:
        """Slots to keep `[B, H, K]`: sinks, `between` `[B, H, M]`, and window; of a shorter row the last K."""
        batch, heads, count = between.shape
        offsets = torch.arange(self.sinks, device=between.device)
        sinks = (first + offsets).clamp(max=length - 1)[:, None].expand(batch, heads, -1)
        window = torch.arange(length - self.window, length, device=between.device).expand(batch, heads, -1)
        kept = torch.cat((sinks, between, window), dim=2).sort(dim=2).values
        number = self.sinks + count + self.window
        everything = torch.arange(length - number, length, device=between.device)
        return torch.where((self._valid_tokens() <= number)[:, None, None], everything, kept)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the keys that a mask for this layer has: the kept ones end where the new ones begin."""
        slots = self.keys.shape[2] if self.is_initialized else 0
        return slots + query_length, self.seen_tokens - slots

    def crop(self, tokens_to_remove: int) -> None:
        """Accept 0; tokens that were dropped do not come back."""
        if tokens_to_remove != 0:
            raise ValueError(
                "A SubGenCache cannot take back tokens, as others were dropped for them: decode without an assistant, "
                "or keep `cache.clone()` from before the tokens in question and continue from that."
            )

    def activate_past_recording(self) -> None:
        """Refuse the role of a draft model, whose cache is rolled back after each rejected token."""
        self.crop(-1)


class KCentreLayer(SubGenLayer):
    """At most `budget` tokens: sinks, window, and between them tokens whose keys are far from each other.

    Whenever there are more, `budget - slack` of them are chosen anew, so that the search runs once in `slack` tokens.

    Args:
        budget: largest number of tokens kept for each row and head.
        window: recent tokens among them.
        sinks: first tokens among them.
    """

    def __init__(self, budget: int, window: int, sinks: int) -> None:
        super().__init__(window, sinks)
        self.budget = budget
        # A sixteenth of the centres.
        self.slack = (budget - window - sinks) // 16

    def _compressed(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        length = keys.shape[2]
        if length <= self.budget:
            return keys, values
        first, between = self._between(length)
        batch, heads = keys.shape[:2]
        slots = torch.arange(length, device=keys.device)
        sinks = (slots >= first) & (slots < first + self.sinks)
        count = self.budget - self.slack - self.window - self.sinks
        per_head = (mask[:, None].expand(-1, heads, -1).flatten(0, 1) for mask in (between, sinks))
        centres = select_centres(keys.detach().flatten(0, 1), *per_head, count).view(batch, heads, count)
        kept = self._kept(first, centres, length)[..., None]
        return keys.gather(2, kept.expand(-1, -1, -1, keys.shape[3])), values.gather(
            2, kept.expand(-1, -1, -1, values.shape[3])
        )


class SamplerLayer(SubGenLayer):
    """Sinks, window, and a `SamplerState` of all tokens between them.

    Its attention reads both (`hf_memory.compression.subgen_attention`): `update` leaves a `Stream` on the keys that it
    returns.

    Args:
        window: recent tokens kept.
        sinks: first tokens kept.
        clusters: largest number m of clusters.
        samples: keys t kept of each.
        slots: number s of sampled keys and values.
        radius: delta of the paper.
        seed: of the random numbers of this layer.
    """

    tensor_names = (*SubGenLayer.tensor_names, "centres", "samples", "counts", "slot_keys", "slot_values", "mass")

    def __init__(
        self, window: int, sinks: int, clusters: int, samples: int, slots: int, radius: float, seed: int
    ) -> None:
        super().__init__(window, sinks)
        self.sizes = (clusters, samples, slots)
        self.radius = radius
        self.seed = seed
        self.stream: Stream | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """See `SubGenLayer`."""
        super().lazy_initialization(key_states, value_states)
        self._set_state(SamplerState.empty(key_states.flatten(0, 1), value_states.flatten(0, 1), *self.sizes))

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """See `SubGenLayer`.

        Raises:
            ValueError: if the attention of the model has not read what the last call left for it.
        """
        if self.stream is not None and not self.stream.was_read:
            raise ValueError(
                'The attention of this model does not read what SubGen has sampled: `mode="sampler"` needs '
                '`model.set_attn_implementation("subgen")` and a model that uses that interface; `mode="kcenter"` '
                "works with any."
            )
        before = self.state() if self.is_initialized else None
        keys, values = super().update(key_states, value_states)
        self.stream = keys.subgen = Stream(before)
        return keys, values

    def state(self) -> SamplerState:
        """What was sampled, rows and heads flattened."""
        names = self.tensor_names[3:]
        return SamplerState(**{name: getattr(self, name).flatten(0, 1) for name in names})

    def _set_state(self, state: SamplerState) -> None:
        for name, tensor in vars(state).items():
            setattr(self, name, tensor.unflatten(0, (len(self.padding), -1)))

    def _compressed(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        length = keys.shape[2]
        kept_number = self.sinks + self.window
        if length <= kept_number:
            return keys, values
        first, between = self._between(length)
        batch, heads = keys.shape[:2]
        # Slots that lie between sinks and window in no row need no look.
        leaving = slice(min(int(first.min()) + self.sinks, length - self.window), length - self.window)
        valid = between[:, None, leaving].expand(-1, heads, -1).flatten(0, 1)
        # The number of tokens is all the state that the random numbers have.
        generator = torch.Generator().manual_seed(hash((self.seed, self.seen_tokens)) % 2**63)
        absorbed = (x[:, :, leaving].detach().flatten(0, 1) for x in (keys, values))
        self._set_state(self.state().absorb(*absorbed, valid, self.radius, generator))
        nothing = torch.empty(batch, heads, 0, dtype=torch.long, device=keys.device)
        kept = self._kept(first, nothing, length)[..., None]
        return keys.gather(2, kept.expand(-1, -1, -1, keys.shape[3])), values.gather(
            2, kept.expand(-1, -1, -1, values.shape[3])
        )

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.stream = None


class Stream:
    """What a `SamplerLayer` hands to its attention together with the keys at hand.

    Attributes:
        state: of the tokens before the call; `None` before the first call.
        was_read: whether the attention has asked for it.
    """

    def __init__(self, state: SamplerState | None) -> None:
        self.state = state
        self.was_read = False

    def read(self) -> SamplerState | None:
        """The state, once: it is not kept alive beside the one that comes after it."""
        state, self.state, self.was_read = self.state, None, True
        return state
