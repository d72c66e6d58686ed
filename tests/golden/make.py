"""Write golden checkpoints: `python tests/golden/make.py NAME ...`.

To be run only for a new model, or when `format_version` is raised; the old directory stays, so that old checkpoints
keep loading.
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

import hf_memory


HERE = Path(__file__).parent
TINY = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "chunk_size": 4,
    "num_persistent_tokens": 3,
    "sliding_window": 6,
    "eos_token_id": None,
}
OF_TITANS = ("num_persistent_tokens", "sliding_window")
TINY_SLOTS = {name: value for name, value in TINY.items() if name not in OF_TITANS}
TINY_SLOTS |= {"num_slots": 16, "learn_initial_memory": True, "conv_value": True}
CHECKPOINTS = {
    "titans-lmm-v1": (hf_memory.TitansForCausalLM, hf_memory.TitansConfig(**TINY)),
    "titans-mag-v1": (hf_memory.TitansForCausalLM, hf_memory.TitansConfig(variant="mag", memory_depth=1, **TINY)),
    "titans-mac-v1": (
        hf_memory.TitansForCausalLM,
        hf_memory.TitansConfig(variant="mac", segment_size=8, num_memory_tokens=4, **TINY),
    ),
    "titans-mal-v1": (hf_memory.TitansForCausalLM, hf_memory.TitansConfig(variant="mal", **TINY)),
    "trellis-v1": (hf_memory.TrellisForCausalLM, hf_memory.TrellisConfig(**TINY_SLOTS)),
}


def main(names: list[str]) -> None:
    if not names or not set(names) <= set(CHECKPOINTS):
        raise SystemExit(f"Name one or more of {', '.join(CHECKPOINTS)}.")
    for name in names:
        model_class, config = CHECKPOINTS[name]
        torch.manual_seed(0)
        model = model_class(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():  # away from zeros and ones, so that every parameter matters
                parameter.add_(0.05 * torch.randn_like(parameter))
        model.save_pretrained(HERE / name)
        input_ids = torch.randint(40, (2, 23))
        with torch.no_grad():
            logits = model(input_ids).logits
        save_file({"input_ids": input_ids, "logits": logits}, HERE / name / "golden.safetensors")


if __name__ == "__main__":
    main(sys.argv[1:])
