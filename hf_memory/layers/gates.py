"""Token-wise decay, momentum and step size of an inner optimiser."""

import torch
from torch import Tensor, nn

from hf_memory.kernels import Gates
from hf_memory.kernels.precision import without_autocast
from hf_memory.layers.norms import at_least_float32


class GateProjection(nn.Linear):
    """Float32 linear layer that starts at a given bias.

    Args:
        in_features: width of the input.
        out_features: number of gates.
        initial_bias: what initialisation sets every bias to.
    """

    def __init__(self, in_features: int, out_features: int, initial_bias: float) -> None:
        super().__init__(in_features, out_features, dtype=torch.float32)
        self.initial_bias = initial_bias


class MemoryGates(nn.Module):
    """Linear functions of the token that say how much a memory forgets, carries on and learns.

    Loaded in float32 whatever the dtype of the model, and computed there under autocast too: decays multiply over
    thousands of tokens, so that their error grows with the context. Decay and momentum stay in log space.

    Args:
        hidden_size: width D of the input.
        num_heads: memory heads H.
        num_sets: gate sets G per head, one per memory layer or one per channel.
        decay: whether the memory forgets.
        momentum: whether gradients pass through a momentum buffer.
        step_scale: factor of the step size.
        step_act: `"sigmoid"` or `"softplus"`.
        initial_step: logit of the step size at initialisation; -2 is an eighth.
        initial_decay: logit of what is forgotten; -5 is 0.7 % per token.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_sets: int,
        decay: bool = True,
        momentum: bool = True,
        step_scale: float = 1.0,
        step_act: str = "sigmoid",
        initial_step: float = -2.0,
        initial_decay: float = -5.0,
    ) -> None:
        super().__init__()
        self.num_heads, self.num_sets = num_heads, num_sets
        self.step_scale, self.step_act = step_scale, step_act
        size = num_heads * num_sets
        self.step_proj = GateProjection(hidden_size, size, initial_step)
        self.decay_proj = GateProjection(hidden_size, size, initial_decay) if decay else None
        # Momentum starts at a half.
        self.momentum_proj = GateProjection(hidden_size, size, initial_bias=0.0) if momentum else None

    def forward(self, hidden_states: Tensor) -> Gates:
        """Gates `[B, T, H, G]` (float32, or float64 in a float64 model) of hidden states `[B, T, D]`."""
        with without_autocast(hidden_states.device):
            step = self._logits(self.step_proj, hidden_states)
            step = step.sigmoid() if self.step_act == "sigmoid" else nn.functional.softplus(step)
            decay = momentum = None
            if self.decay_proj is not None:
                decay = nn.functional.logsigmoid(-self._logits(self.decay_proj, hidden_states))
            if self.momentum_proj is not None:
                momentum = nn.functional.logsigmoid(self._logits(self.momentum_proj, hidden_states))
        return Gates(self.step_scale * step, decay, momentum)

    def _logits(self, projection: nn.Linear, hidden_states: Tensor) -> Tensor:
        logits = at_least_float32(projection(hidden_states.to(projection.weight.dtype)))
        return logits.unflatten(-1, (self.num_heads, self.num_sets))
