"""The cache layer of PolarQuant: recent tokens as they are, all older ones as codes."""

import torch
from torch import Tensor

from hf_memory.compression.layers import CompressedLayer, as_own
from hf_memory.compression.polar_quant import GROUP, GROUP_BYTES, decode, encode, rotation


# Tokens coded at a time, which bounds the working memory of a long prompt.
_TOKENS_AT_ONCE = 4096


class PolarQuantLayer(CompressedLayer):
    """Keys and values of the last `window` tokens in full precision, and codes of all tokens before them.

    Tokens are coded once, when they leave the window, and never again; which tokens are coded depends on their number
    only, not on how they were split into calls. Codes are `[B, H, n, 6 P/16]` uint8 and `[B, H, n, P/16]` float16.

    Args:
        window: tokens kept in full precision.
        seed: of the rotation, the same for keys and values of all layers.
    """

    tensor_names = ("key_codes", "key_radii", "value_codes", "value_radii", "keys", "values")

    def __init__(self, window: int = 128, seed: int = 0) -> None:
        super().__init__()
        self.window = window
        self.seed = seed

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """See `CompressedLayer`.

        Raises:
            ValueError: for heads whose width is no multiple of 16.
        """
        for what, states in (("keys", key_states), ("values", value_states)):
            if states.shape[-1] % GROUP:
                raise ValueError(
                    f"PolarQuant codes groups of {GROUP} coordinates, and the {what} of this model are "
                    f"{states.shape[-1]} wide, no multiple of that: use a SubGenCache, which takes any width."
                )
        super().lazy_initialization(key_states, value_states)
        self.key_codes, self.key_radii = _no_codes(key_states)
        self.value_codes, self.value_radii = _no_codes(value_states)

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Append keys and values `[B, H, T, P]`.

        Returns:
            Keys and values of all tokens `[B, H, n + T, P]` in the dtype of the new ones: decoded where they were
            codes before the call, as they are where they were not. So a prompt read in one call is read exactly.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.seen_tokens += key_states.shape[2]
        keys = torch.cat((self._decoded(self.key_codes, self.key_radii), self.keys, key_states), dim=2)
        values = torch.cat((self._decoded(self.value_codes, self.value_radii), self.values, value_states), dim=2)
        self._append(keys, values)
        return keys, values

    def _append(self, keys: Tensor, values: Tensor) -> None:
        """Code what has left the window, of all keys and values `[B, H, n, P]`."""
        # After `crop` more tokens are codes than the window leaves out.
        start = self.key_codes.shape[2]
        end = max(start, keys.shape[2] - self.window)
        if end > start:
            self.key_codes, self.key_radii = self._with_codes(self.key_codes, self.key_radii, keys[:, :, start:end])
            self.value_codes, self.value_radii = self._with_codes(
                self.value_codes, self.value_radii, values[:, :, start:end]
            )
        self.keys, self.values = as_own(keys[:, :, end:]), as_own(values[:, :, end:])

    def _with_codes(self, codes: Tensor, radii: Tensor, states: Tensor) -> tuple[Tensor, Tensor]:
        turned = rotation(states.shape[-1], self.seed, states.device)
        coded = [(codes, radii), *(encode(part, turned) for part in states.detach().split(_TOKENS_AT_ONCE, dim=2))]
        return tuple(torch.cat(parts, dim=2) for parts in zip(*coded))

    def _decoded(self, codes: Tensor, radii: Tensor) -> Tensor:
        width = radii.shape[-1] * GROUP
        return decode(codes, radii, rotation(width, self.seed, codes.device)).to(self.dtype)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the keys that a mask for this layer has: all that were seen."""
        return self.seen_tokens + query_length, 0

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` tokens.

        Tokens before them that are codes already stay codes, so that the window is smaller until it has filled again.

        Raises:
            ValueError: for a positive number, as everywhere in transformers.
        """
        if tokens_to_remove > 0:
            raise ValueError(
                f"`crop` takes the number of tokens to remove as a negative number, got {tokens_to_remove}."
            )
        if tokens_to_remove == 0 or not self.is_initialized:
            return
        self.seen_tokens = max(self.seen_tokens + tokens_to_remove, 0)
        coded = min(self.key_codes.shape[2], self.seen_tokens)
        for name in self.tensor_names:
            kept = self.seen_tokens - coded if name in ("keys", "values") else coded
            setattr(self, name, as_own(getattr(self, name)[:, :, :kept]))


def _no_codes(states: Tensor) -> tuple[Tensor, Tensor]:
    batch, heads, _, width = states.shape
    groups = width // GROUP
    codes = torch.empty(batch, heads, 0, groups * GROUP_BYTES, dtype=torch.uint8, device=states.device)
    return codes, torch.empty(batch, heads, 0, groups, dtype=torch.float16, device=states.device)
