"""Hybrids of every supported family: what they keep of the teacher, what memories inherit, and how they load."""

import copy
import pickle

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hf_memory.cache import MemoryCache
from hf_memory.cache_layers import MemoryCacheLayer, MemorySlidingCacheLayer
from hf_memory.conversion.projections import read_projections
from hf_memory.conversion.surgery import (
    build_student,
    decoder_layers,
    memory_parameters,
    memory_slots,
)
from hf_memory.evaluation.properties_tiny import random_model, tiny_config
from hf_memory.models.hybrid.configuration_hybrid import MemoryHybridConfig, teacher_windows
from hf_memory.models.hybrid.modeling_hybrid import MemoryHybridForCausalLM, find_attention


FAMILIES = ["llama", "qwen2", "qwen3", "mistral", "gemma3_text", "phi3", "olmo2", "gpt_neox"]
MODES = ["replace", "retrofit"]
WINDOW = 16
OPTIONS = {"memory_expansion": 2, "chunk_size": 4}


def make_teacher(family: str, **fields) -> PreTrainedModel:
    """Tiny teacher with every parameter away from the neutral value that some start at."""
    if family == "gemma3_text":
        fields = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"], **fields}
    model = random_model(tiny_config(family, num_hidden_layers=3, **fields)).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.fixture(scope="module", params=FAMILIES)
def teacher(request) -> PreTrainedModel:
    return make_teacher(request.param)


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return make_teacher("llama")


def convert(teacher: PreTrainedModel, layers: list[int], mode: str = "replace", **kwargs) -> PreTrainedModel:
    window = WINDOW if mode == "retrofit" else None
    return build_student(teacher, layers=layers, mode=mode, memory_options=OPTIONS, window=window, **kwargs)


def ids(length: int, rows: int = 2) -> torch.Tensor:
    return torch.randint(3, 128, (rows, length), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits(model: PreTrainedModel, length: int = 40) -> torch.Tensor:
    return model(ids(length)).logits


@pytest.mark.parametrize("mode", MODES)
def test_no_layer_replaced_is_the_teacher_bit_for_bit(teacher, mode, tmp_path):
    student = convert(teacher, [], mode)
    assert torch.equal(logits(student), logits(teacher))
    student.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(teacher))
    prompt = ids(5)
    assert torch.equal(student.generate(prompt, max_new_tokens=8), teacher.generate(prompt, max_new_tokens=8))


@pytest.mark.parametrize("mode", MODES)
def test_what_is_not_a_memory_keeps_name_and_bits(teacher, mode, tmp_path):
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    student = convert(teacher, [0, 2], mode)
    student.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    own = set(memory_parameters(student))
    name, attention = find_attention(decoder_layers(teacher)[0])
    gone = len(list(attention.parameters())) * 2 if mode == "replace" else 0
    for model in (student, loaded):
        kept = {key: value for key, value in model.state_dict().items() if key not in own}
        assert len(kept) == len(before) - gone
        assert all(torch.equal(value, before[key]) for key, value in kept.items())
    assert all(torch.equal(value, before[key]) for key, value in teacher.state_dict().items())
    assert torch.equal(logits(student), logits(loaded))
    assert own and all(f".{name}." in key for key in own)


def test_a_retrofit_starts_as_the_teacher_inside_the_window(teacher):
    student = convert(teacher, [0, 1, 2], "retrofit")
    assert torch.equal(logits(student, WINDOW), logits(teacher, WINDOW))
    beyond = logits(student, 40) - logits(teacher, 40)
    # Where no layer of the teacher sees more than the window itself, nothing changes beyond it either.
    assert (beyond[:, -1].abs().max() > 1e-3) == (None in teacher_windows(teacher.config))


def test_memories_inherit_the_projections_of_attention(teacher, monkeypatch):
    """What attention makes of one token at position 0, where rotation is the identity."""
    seen = {}

    def capture(module, query, key, value, *args, **kwargs):
        groups = query.shape[1] // key.shape[1]
        parts = {
            "q_proj": query,
            "k_proj": key.repeat_interleave(groups, 1),
            "v_proj": value.repeat_interleave(groups, 1),
        }
        seen.update({name: part.transpose(1, 2).flatten(2) for name, part in parts.items()})
        seen["heads"] = torch.randn(parts["q_proj"].shape).transpose(1, 2)
        return seen["heads"], None

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "sdpa", capture)
    _, attention = find_attention(decoder_layers(teacher)[1])
    x = torch.randn(1, 1, teacher.config.hidden_size)
    rotary = teacher.base_model.rotary_emb
    position = torch.zeros(1, 1, dtype=torch.long)
    extra = ("full_attention",) if teacher.config.model_type == "gemma3_text" else ()
    with torch.no_grad():
        output, _ = attention(x, position_embeddings=rotary(x, position, *extra), attention_mask=None)

    config = convert(teacher, [1]).config
    projections = read_projections(attention, config)
    heads, head_dim = config.attention_heads
    for name, (weight, bias) in projections.items():
        given = seen["heads"].flatten(2) if name == "o_proj" else x
        got = torch.nn.functional.linear(given, weight, bias)
        want = output if name == "o_proj" else seen[name]
        if name in ("q_proj", "k_proj"):  # norms change the length of queries and keys, memories ignore it
            got, want = (
                torch.nn.functional.normalize(t.unflatten(-1, (heads, head_dim)), dim=-1) for t in (got, want)
            )
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


def test_inherited_weights_arrive(llama):
    memory = memory_slots(convert(llama, [1]))[1].memory
    attention = llama.model.layers[1].self_attn
    assert torch.equal(memory.q_proj.weight, attention.q_proj.weight)
    width = attention.head_dim
    for head in range(4):  # two query heads share a key head
        rows, shared = slice(head * width, (head + 1) * width), slice(head // 2 * width, (head // 2 + 1) * width)
        assert torch.equal(memory.k_proj.weight[rows], attention.k_proj.weight[shared])
        assert torch.equal(memory.v_proj.weight[rows], attention.v_proj.weight[shared])
    assert torch.equal(memory.o_proj.weight, attention.o_proj.weight)
    assert not memory.q_proj.bias.any()
    x = torch.randn(1, 5, 3 * 64)
    assert torch.equal(memory.conv(x)[0], x)
    gate = torch.nn.functional.silu(memory.g_proj(torch.randn(2, 3, 64)))
    torch.testing.assert_close(gate, torch.ones_like(gate))


def test_slot_memories_inherit_what_attention_has(llama):
    student = build_student(llama, layers=[1], memory="trellis", memory_options={"num_slots": 16})
    memory, attention = memory_slots(student)[1].memory, llama.model.layers[1].self_attn
    assert memory.output_map.name == "identity"
    for name in ("q_proj", "o_proj"):
        assert torch.equal(getattr(memory, name).weight, getattr(attention, name).weight)
    x = torch.randn(1, 5, 2 * 64)
    assert torch.equal(memory.conv(x)[0], x)
    gate = memory.gate_fn(memory.g_proj(torch.randn(2, 3, 64)))
    torch.testing.assert_close(gate, torch.ones_like(gate))
    assert memory.gates.decay_proj.bias.unique() == -7
    assert memory.target_proj.weight.std() > 0.1


@pytest.mark.parametrize("mode", MODES)
def test_a_memory_carries_what_attention_no_longer_sees(llama, mode):
    student = convert(llama, [0, 1, 2], mode)
    with torch.no_grad():
        for slot in memory_slots(student).values():
            if slot.scale is not None:
                slot.scale.fill_(1.0)
    short, long = ids(200), ids(200)
    long[:, :50] = (long[:, :50] + 7) % 100 + 3
    with torch.no_grad():
        change = (student(short).logits - student(long).logits)[:, -1].abs().max()
    assert change > 1e-3


def test_one_cache_holds_both_kinds_of_layer(llama):
    for mode, kind in (("replace", MemoryCacheLayer), ("retrofit", MemorySlidingCacheLayer)):
        student = convert(llama, [1], mode)
        cache = student(ids(40), use_cache=True).past_key_values
        assert isinstance(cache, MemoryCache) and type(cache.layers[1]) is kind
        assert [layer.get_seq_length() for layer in cache.layers] == [40, 40, 40]
        before = cache.layers[1].nbytes, cache.layers[0].keys.nbytes
        student(ids(10), past_key_values=cache)
        assert cache.layers[1].nbytes == before[0] and cache.layers[0].keys.nbytes > before[1]
        if mode == "retrofit":
            assert cache.layers[1].keys.shape[2] == WINDOW - 1


def test_wrong_caches_and_masks_are_refused(llama):
    from transformers import DynamicCache

    student = convert(llama, [1])
    with pytest.raises(ValueError, match="MemoryCache"):
        student(ids(4), past_key_values=DynamicCache(config=llama.config))
    with pytest.raises(ValueError, match="attention_mask"):
        student(ids(4), attention_mask=torch.ones(2, 1, 4, 4))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": [3]}, r"names \[3\].*has 3 layers"),
        ({"layers": [-1]}, "0 to 2"),
        ({"layers": [1], "memory": "tortoise"}, "'tortoise'.*titans"),
        ({"layers": [1], "memory_options": {"tortoise": 1}}, "no option 'tortoise'"),
        ({"layers": [1], "memory_options": {"head_dim": 8}}, "`head_dim` is 16.*not 8"),
        ({"layers": [1], "memory_options": {"memory_depth": 0}}, "memory_depth"),
        ({"layers": [1], "mode": "prune"}, "'replace', 'retrofit'"),
        ({"layers": [1], "window": 8}, "drop it"),
        ({"layers": [1], "mode": "retrofit", "window": 0}, "at least 1"),
    ],
)
def test_wrong_arguments(llama, changes, message):
    with pytest.raises(ValueError, match=message):
        build_student(llama, **changes)


def test_a_window_wider_than_the_teachers_is_refused():
    mistral = make_teacher("mistral")
    with pytest.raises(ValueError, match="sees 16 tokens only"):
        build_student(mistral, layers=[0], mode="retrofit", window=32)
    assert build_student(mistral, layers=[0], mode="retrofit").config.memory_window == WINDOW


@pytest.mark.parametrize("family", ["bloom", "mamba2"])
def test_other_families_are_refused(family):
    model = random_model(tiny_config(family))
    with pytest.raises(ValueError, match="supported|attention|layers"):
        build_student(model, layers=[0])


def test_configuration_survives_every_way_through(llama, tmp_path):
    config = convert(llama, [2]).config
    config.save_pretrained(tmp_path)
    copies = [
        AutoConfig.from_pretrained(tmp_path),
        MemoryHybridConfig.from_pretrained(tmp_path),
        copy.deepcopy(config),
    ]
    copies += [pickle.loads(pickle.dumps(config)), MemoryHybridConfig.from_dict(config.to_dict())]
    for other in copies:
        assert type(other) is type(config) and isinstance(other, type(llama.config))
        for name in ("memory_layers", "memory", "memory_mode", "hidden_size", "num_key_value_heads", "eos_token_id"):
            assert getattr(other, name) == getattr(config, name)
    with pytest.raises(ValueError, match="tortoise"):
        MemoryHybridConfig(base_model_type="tortoise")
    with pytest.raises(ValueError, match="upgrade"):
        MemoryHybridConfig(format_version=99)


def test_loading(llama, tmp_path):
    student = convert(llama, [1])
    student.save_pretrained(tmp_path)
    for loader in (AutoModelForCausalLM, MemoryHybridForCausalLM):
        loaded = loader.from_pretrained(tmp_path)
        assert isinstance(loaded, MemoryHybridForCausalLM) and isinstance(loaded, LlamaForCausalLM)
        assert type(loaded).__name__ == "MemoryHybridForCausalLM"
        assert torch.equal(logits(loaded), logits(student))
    body = AutoModel.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(body(ids(9)).last_hidden_state, student.model(ids(9)).last_hidden_state)
    assert torch.equal(logits(copy.deepcopy(student)), logits(student))


def test_loading_in_low_precision_keeps_states_exact(llama, tmp_path):
    convert(llama, [1]).save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    exact = {name for name, value in loaded.named_parameters() if value.dtype == torch.float32}
    assert exact and all("gates" in name or "initial_memory" in name for name in exact)
    half = build_student(copy.deepcopy(llama).bfloat16(), layers=[1], memory_options=OPTIONS)
    assert {name for name, value in half.named_parameters() if value.dtype == torch.float32} == exact


def test_generation_config_and_tied_embeddings_travel(tmp_path):
    teacher = make_teacher("llama", tie_word_embeddings=True)
    teacher.generation_config.eos_token_id = [2, 7]
    student = convert(teacher, [1])
    student.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.generation_config.eos_token_id == [2, 7]
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    loaded.resize_token_embeddings(140)
    loaded.save_pretrained(tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).lm_head.weight.shape[0] == 140


def test_gradients_reach_everything(llama):
    for mode in MODES:
        student = convert(llama, [1], mode).train()
        loss = student(ids(24), labels=ids(24)).loss
        loss.backward()
        without = {name for name, value in student.named_parameters() if value.grad is None}
        # The gate of a retrofit is closed: only it has a gradient, the memory behind it has one once it opens.
        assert not without
        own = memory_parameters(student)
        assert any(value.grad.abs().max() > 0 for value in own.values())


def test_attention_implementations_agree(llama):
    for mode in MODES:
        student = convert(llama, [1], mode)
        expected = logits(student)
        student.set_attn_implementation("eager")
        torch.testing.assert_close(logits(student), expected, atol=1e-4, rtol=1e-4)


def test_lora_finds_its_targets(llama):
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(convert(llama, [1]), LoraConfig(task_type="CAUSAL_LM"))
    names = {name for name, value in adapted.named_parameters() if value.requires_grad}
    for part in ("layers.0.self_attn.q_proj", "layers.1.self_attn.memory.q_proj"):
        assert any(part in name for name in names)


def test_a_matrix_memory_starts_by_forgetting_little(llama):
    matrix = build_student(llama, layers=[1], memory_options={"memory_depth": 1, "chunk_size": 1})
    gates = memory_slots(matrix)[1].memory.gates(torch.zeros(1, 1, 64))
    assert (1 - gates.log_decay.exp()).max() < 2e-3
    assert torch.allclose(gates.step, torch.full_like(gates.step, 0.5))
