"""Memory files: bit for bit there and back, refused by other models, written whole or not at all."""

import json
import resource
import shutil
import signal
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from properties.tiny import hybrid, tiny_configs
from safetensors import safe_open
from safetensors.torch import save_file
from small import logits_behind, tensors_of, tiny
from transformers import AutoModel, AutoModelForSequenceClassification

from hf_memory import MemoryCache, memory_file
from hf_memory.cache import StaticMemoryCache
from hf_memory.evaluation.properties_tiny import random_model
from hf_memory.memory_file import MemoryMismatchError, read_info
from hf_memory.memory_identity import ModelIdentity, functional_fields
from hf_memory.models import ARCHITECTURES
from hf_memory.models.hybrid.configuration_hybrid import MemoryHybridConfig


IDS = torch.arange(61)[None] * 7 % 50


@pytest.fixture(scope="module", params=["lmm", "mag"])
def model(request):
    torch.manual_seed(0)
    return tiny(variant=request.param)


@pytest.fixture
def file(model, tmp_path) -> Path:
    return model.read(IDS).save_pretrained(tmp_path / "book.memory")


CONFIGS = {model_type: tiny_configs(model_type) for model_type in (*ARCHITECTURES, MemoryHybridConfig.model_type)}
MODELS = [(model_type, name) for model_type, configs in CONFIGS.items() for name in configs]
FAST = [(model_type, next(iter(configs))) for model_type, configs in CONFIGS.items()]
FAST += [("titans", "mag-depth1-chunk4-zero"), ("memory_hybrid", "mistral-retrofit")]


@pytest.mark.parametrize("model_type, name", FAST)
def test_round_trip(model_type, name, tmp_path):
    check_round_trip(CONFIGS[model_type][name], tmp_path)


def test_round_trip_far_behind_the_window_of_a_kept_layer(tmp_path):
    check_round_trip(hybrid("mistral", [1], sliding_window=8), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("model_type, name", MODELS)
def test_round_trip_of_every_architecture(model_type, name, tmp_path):
    check_round_trip(CONFIGS[model_type][name], tmp_path)


def check_round_trip(config, folder: Path) -> None:
    model = random_model(config)
    more = torch.arange(11)[None] % 50
    for tokens in (1, 5, 61):  # within the first chunk, within a later one, far behind the window
        memory = model.read(IDS[:, :tokens], allow_growth=True)
        with torch.no_grad():
            model(IDS[:, :1], past_key_values=memory)
        back = MemoryCache.from_pretrained(memory.save_pretrained(folder / "a.memory"), model=model)
        assert type(back) is type(memory) and int(back.seen_tokens) == tokens + 1
        assert all(map(torch.equal, tensors_of(memory), tensors_of(back)))
        logits = logits_behind(model, back, more)
        assert torch.equal(logits, logits_behind(model, memory, more))
        with torch.no_grad():
            whole = model(torch.cat((IDS[:, :tokens], IDS[:, :1], more), 1)).logits[:, tokens + 1 :]
        torch.testing.assert_close(logits, whole, atol=1e-5 * float(whole.abs().max()), rtol=1e-5)


def test_what_goes_on_is_the_same_to_the_bit(model, file):
    memory, back = model.read(IDS), MemoryCache.from_pretrained(file, model=model)
    greedy = {"max_new_tokens": 20, "do_sample": False, "output_scores": True, "return_dict_in_generate": True}
    question = torch.tensor([[5, 6, 7]])
    a, b = (model.generate(question, past_key_values=cache, **greedy) for cache in (memory, back))
    assert torch.equal(a.sequences, b.sequences) and all(map(torch.equal, a.scores, b.scores))
    assert all(map(torch.equal, tensors_of(memory), tensors_of(back)))
    again = MemoryCache.from_pretrained(back.save_pretrained(file), model=model)
    assert all(map(torch.equal, tensors_of(again), tensors_of(back)))
    assert int(again.seen_tokens) == 61 + 3 + 19


def test_rows_and_row_operations_survive(model, tmp_path):
    memory = model.read(torch.randint(50, (3, 23)))
    memory.reorder_cache(torch.tensor([2, 0, 0]))
    back = MemoryCache.from_pretrained(memory.save_pretrained(tmp_path / "a.memory"), model=model)
    more = torch.randint(50, (3, 5))
    assert back.info.rows == 3
    assert torch.equal(logits_behind(model, back, more), logits_behind(model, memory, more))


def test_info_without_the_model(model, file):
    memory = model.read(IDS)
    memory.notes["title"] = "Numbers"
    info = read_info(memory.save_pretrained(file))
    assert info == memory.info
    assert (info.tokens, info.rows, info.notes, info.model.model_type) == (61, 1, {"title": "Numbers"}, "titans")
    window = 0 if model.config.variant == "lmm" else 2 * (2 * 4 * 7 * 32 + 8 * 7)
    assert info.parts.get("keys and values", 0) == window
    assert file.stat().st_size < info.nbytes + 8192
    assert MemoryCache.from_pretrained(file, model=model).notes == {"title": "Numbers"}


def test_paths(model, tmp_path):
    memory = model.read(IDS)
    assert memory.save_pretrained(tmp_path / "new" / "folder") == tmp_path / "new" / "folder" / "memory.safetensors"
    assert memory.save_pretrained(str(tmp_path / "a.memory")) == tmp_path / "a.memory"
    (tmp_path / "v1.0").mkdir()
    assert memory.save_pretrained(tmp_path / "v1.0").parent.name == "v1.0"
    for source, filename in (("new/folder", None), ("a.memory", None), ("v1.0", None), ("", "a.memory")):
        assert MemoryCache.from_pretrained(tmp_path / source, model=model, filename=filename).info.tokens == 61
    for source in ("missing.memory", "missing", "new"):
        with pytest.raises(FileNotFoundError, match="There is no memory file"):
            MemoryCache.from_pretrained(tmp_path / source, model=model)
    with pytest.raises(FileNotFoundError, match="the Hub cannot be reached"):
        MemoryCache.from_pretrained("nobody/nothing", model=model)


def test_other_weights_are_refused(model, file):
    torch.manual_seed(1)
    other = tiny(variant=model.config.variant)
    with pytest.raises(MemoryMismatchError, match=r"book\.memory: .* other weights"):
        MemoryCache.from_pretrained(file, model=other)
    forced = MemoryCache.from_pretrained(file, model=other, check_weights=False)
    other.read([1, 2], memory=forced)
    other.load_state_dict(model.state_dict())
    MemoryCache.from_pretrained(file, model=other)
    with torch.no_grad():  # the smallest step of a single weight
        weight = other.model.layers[0].mixer
        weight = (weight if model.config.variant == "lmm" else weight.memory).k_proj.weight
        weight[3, 4] = weight[3, 4].nextafter(torch.tensor(9.0))
    with pytest.raises(MemoryMismatchError, match="other weights"):
        MemoryCache.from_pretrained(file, model=other)


def test_other_configurations_are_refused_by_name(model, file):
    for field, value in (("chunk_size", 8), ("theta_max", 0.07), ("rms_norm_eps", 1e-5)):
        other = tiny(**{"variant": model.config.variant, field: value})
        other.load_state_dict(model.state_dict())
        with pytest.raises(MemoryMismatchError, match=rf"another configuration: {field} was .*, here it is {value}"):
            MemoryCache.from_pretrained(file, model=other, check_weights=False)
    with pytest.raises(MemoryMismatchError, match="made by a titans model, this one is a llama"):
        llama = random_model(
            MemoryHybridConfig(
                base_model_type="llama",
                hidden_size=32,
                intermediate_size=32,
                num_hidden_layers=1,
                num_attention_heads=2,
                vocab_size=50,
                memory_layers=[0],
            )
        )
        llama.config.model_type = "llama"
        MemoryCache.from_pretrained(file, model=llama)


def test_what_does_not_change_the_function_does_not_matter(model, file, tmp_path):
    model.save_pretrained(tmp_path)
    fields = {"pad_token_id": 3, "use_cache": False, "max_position_embeddings": 77, "initializer_range": 0.5}
    for auto_class in (AutoModel, AutoModelForSequenceClassification):
        other = auto_class.from_pretrained(tmp_path, attn_implementation="eager", **fields)
        assert MemoryCache.from_pretrained(file, model=other).info.tokens == 61
    scaled = {"rope_type": "yarn", "factor": 2.0, "rope_theta": 10000.0, "original_max_position_embeddings": 64}
    assert "max_position_embeddings" not in functional_fields(model.config)
    if model.config.variant == "mag":
        config = type(model.config)(**{**model.config.to_dict(), "rope_parameters": scaled})
        assert "max_position_embeddings" in functional_fields(config)


def test_a_field_of_another_version_matters_where_it_is_no_default(model):
    identity = ModelIdentity.of(model)
    older = {name: value for name, value in identity.config.items() if name not in ("theta_act", "chunk_size")}
    old = ModelIdentity(identity.model_type, None, {**older, "chunk_size": 4}, identity.weights)
    old.refuse_other(identity, model.config)
    with pytest.raises(ValueError, match="chunk_size was not known, here it is 4"):
        ModelIdentity(identity.model_type, None, older, identity.weights).refuse_other(identity, model.config)
    newer = ModelIdentity(identity.model_type, None, identity.config | {"twist": 2}, identity.weights)
    with pytest.raises(ValueError, match="twist was 2, here it is not known"):
        newer.refuse_other(identity, model.config)


def test_casts_go_on_up_to_rounding(model, file, tmp_path, caplog):
    model.save_pretrained(tmp_path)
    low = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16)
    memory = MemoryCache.from_pretrained(file, model=low)
    logits = logits_behind(low, memory, IDS[:, :9])
    assert logits.dtype == torch.bfloat16 and logits.isfinite().all()
    exact = logits_behind(model, model.read(IDS), IDS[:, :9])
    assert (logits - exact).norm() < 0.1 * exact.norm()
    # and back, into the model that the cast one becomes again: another one, as bits are gone
    low_file = low.read(IDS).save_pretrained(tmp_path / "low.memory")
    MemoryCache.from_pretrained(low_file, model=model)
    MemoryCache.from_pretrained(low_file, model=low.float())
    with pytest.raises(MemoryMismatchError, match="other weights .float32 .*here float16"):
        MemoryCache.from_pretrained(file, model=type(model).from_pretrained(tmp_path, dtype=torch.float16))


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_adapters_and_resizing_make_another_model(model, file, tmp_path):
    model.save_pretrained(tmp_path)

    def copy():
        return type(model).from_pretrained(tmp_path)

    resized = copy()
    resized.resize_token_embeddings(270, mean_resizing=False)
    adapted = get_peft_model(copy(), LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False))
    merged = get_peft_model(copy(), LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False)).merge_and_unload()
    for other in (resized, adapted.get_base_model(), merged):
        with pytest.raises(MemoryMismatchError, match="other weights"):
            MemoryCache.from_pretrained(file, model=other)
    MemoryCache.from_pretrained(file, model=resized, check_weights=False)
    own = adapted.read(IDS).save_pretrained(tmp_path / "adapted.memory")
    MemoryCache.from_pretrained(own, model=adapted)
    with adapted.disable_adapter(), pytest.raises(MemoryMismatchError, match="other weights"):
        MemoryCache.from_pretrained(own, model=adapted)
    MemoryCache.from_pretrained(merged.read(IDS).save_pretrained(own), model=merged)


@pytest.mark.filterwarnings("ignore")
def test_quantised_weights_make_another_model(model, file):
    quantised = torch.ao.quantization.quantize_dynamic(tiny(variant=model.config.variant), {torch.nn.Linear})
    with pytest.raises(MemoryMismatchError, match="cannot be told.*check_weights=False"):
        MemoryCache.from_pretrained(file, model=quantised)
    MemoryCache.from_pretrained(file, model=quantised, check_weights=False)


def test_what_cannot_be_saved_gets_a_sentence(model, tmp_path):
    noted = model.read([1, 2, 3])
    noted.notes = {"page": 5}
    with pytest.raises(ValueError, match="texts by texts, got {'page': 5}"):
        noted.save_pretrained(tmp_path / "noted.memory")
    with torch.no_grad():
        plain = model(IDS, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="does not know which model filled it"):
        plain.save_pretrained(tmp_path / "a.memory")
    plain.save_pretrained(tmp_path / "a.memory", model=model)
    with pytest.raises(ValueError, match="The memory is empty"):
        MemoryCache(model.config).save_pretrained(tmp_path / "b.memory", model=model)
    static = StaticMemoryCache(model.config, 80)
    with torch.no_grad():
        model(IDS, past_key_values=static)
    with pytest.raises(ValueError, match="static cache"):
        static.save_pretrained(tmp_path / "b.memory")
    plain.layers[0].states["conv"] = plain.layers[0].states["conv"] * float("nan")
    with pytest.raises(ValueError, match=r"has diverged: layers\.0\.conv holds NaN"):
        plain.save_pretrained(tmp_path / "b.memory")
    assert not (tmp_path / "b.memory").exists()


def test_offloaded_memories_are_saved_as_any_other(model, tmp_path):
    memory = model.read(IDS)
    for layer in memory.layers:
        layer.offload()
    back = MemoryCache.from_pretrained(memory.save_pretrained(tmp_path / "a.memory"), model=model)
    assert all(map(torch.equal, tensors_of(back), tensors_of(model.read(IDS))))
    assert not any(layer.is_offloaded for layer in back.layers)


def test_disk_full_leaves_the_older_file(model, file):
    kept, size = file.read_bytes(), file.stat().st_size
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, limits[1]))
    try:
        with pytest.raises(OSError, match="could not be written .*Nothing of it is left"):
            model.read(IDS[:, :9]).save_pretrained(file)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert file.read_bytes() == kept and list(file.parent.iterdir()) == [file]


def test_a_kill_in_the_middle_of_writing_leaves_the_older_file(model, file, monkeypatch):
    kept = file.read_bytes()

    def half(tensors, beside, metadata):
        Path(beside).write_bytes(kept[:100])
        raise KeyboardInterrupt

    monkeypatch.setattr(memory_file, "save_file", half)
    with pytest.raises(KeyboardInterrupt):
        model.read(IDS[:, :9]).save_pretrained(file)
    assert file.read_bytes() == kept and list(file.parent.iterdir()) == [file]


def test_a_folder_that_cannot_be_written_gets_a_sentence(model, tmp_path):
    (tmp_path / "a.txt").write_text("a file")
    with pytest.raises(OSError, match="could not be written to"):
        model.read(IDS).save_pretrained(tmp_path / "a.txt" / "b.memory")


def forge(file: Path, tensors: dict | None = None, **fields) -> Path:
    """A file that was altered by somebody who knows how to make its hash right."""
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
        kept = {name: opened.get_tensor(name) for name in opened.keys()}
    document = json.loads(metadata["hf_memory"]) | fields
    del document["sha256"]
    tensors = {name: x for name, x in (kept | (tensors or {})).items() if x is not None}
    document["sha256"] = memory_file.content_digest(document, tensors)
    save_file(tensors, file, {"hf_memory": json.dumps(document)})
    return file


def test_forged_files_are_refused(model, file):
    original = file.with_name("original")
    shutil.copy(file, original)
    phase = next(name for name in read_tensors(file) if name.endswith("phase"))
    with safe_open(file, "pt") as opened:
        described = json.loads(opened.metadata()["hf_memory"])["model"]
    conv = read_tensors(file)["layers.0.conv"]
    forgeries = [
        ({"format_version": 2}, {}, "has format version 2, the installed hf-memory reads up to 1: upgrade"),
        ({"format_version": 0}, {}, "no memory file does"),
        ({"tokens": -1}, {}, "no memory file does"),
        ({"tokens": True}, {}, "no memory file does"),
        ({"rows": 2}, {}, "without 2 rows"),
        ({"notes": {"a": 1}}, {}, "notes that are no text"),
        ({"model": {}}, {}, "no memory file does"),
        ({"model": described | {"name": "user/model\\nlicense: mit"}}, {}, "no memory file does"),
        ({"model": described | {"name": 5}}, {}, "no memory file does"),
        ({}, {"layers.0.conv": None}, "'layers.0.conv' is missing"),
        ({}, {"layers.0.conv": conv[:, :1].contiguous()}, r"'layers.0.conv' is \[1, 1, 96\]"),
        ({}, {"layers.0.conv": conv.long()}, "torch.int64, expected"),
        ({}, {"layers.0.conv": conv * float("nan")}, "holds NaN"),
        ({}, {"layers.9.conv": conv}, "has no place in this model"),
        ({}, {"../../etc/passwd": conv}, "has no place in this model"),
        ({}, {phase: torch.tensor([4])}, "leaves 0 to 3"),
        ({}, {phase: torch.tensor([-1])}, "leaves 0 to 3"),
    ]
    if model.config.variant == "mag":
        keys = read_tensors(file)["layers.0.window.keys"]
        positions = read_tensors(file)["layers.0.window.positions"]
        forgeries += [
            ({"tokens": 5}, {}, r"layers.\d.window.\w+' is "),
            ({}, {"layers.0.window.keys": keys[:, :, 1:].contiguous()}, "expected"),
            ({}, {"layers.0.window.positions": positions + 1000}, "leaves -1 to 61"),
        ]
    fit = memory_file.ModelFit(model)
    for fields, tensors, sentence in forgeries:
        shutil.copy(original, file)
        with pytest.raises(ValueError, match=sentence):
            memory_file.read_memory(forge(file, tensors, **fields), fit)


def read_tensors(file: Path) -> dict[str, torch.Tensor]:
    with safe_open(file, "pt") as opened:
        return {name: opened.get_tensor(name) for name in opened.keys()}


def test_other_files_are_refused(model, tmp_path):
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is a safetensors file, but holds no memory"):
        MemoryCache.from_pretrained(tmp_path / "model.safetensors", model=model)
    for name, content in (("empty.memory", b""), ("text.memory", b"once upon a time"), ("zeros.memory", bytes(999))):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name} is no safetensors file, or a truncated or altered one"):
            MemoryCache.from_pretrained(tmp_path / name, model=model)


def test_local_paths_do_not_get_into_a_file(model, tmp_path):
    model.save_pretrained(tmp_path / "my" / "model")
    loaded = type(model).from_pretrained(tmp_path / "my" / "model")
    file = loaded.read(IDS).save_pretrained(tmp_path / "a.memory")
    assert str(tmp_path).encode() not in file.read_bytes() and read_info(file).model.name is None
    loaded.config._name_or_path = "user/model"
    assert loaded.read(IDS).info.model.name == "user/model"


def test_a_layer_that_does_not_say_all_it_keeps_is_refused(model, tmp_path):
    memory = model.read(IDS)
    extra, tensors = torch.zeros(1), type(memory.layers[0]).tensors
    kind = type("Hoarder", (type(memory.layers[0]),), {"tensors": lambda self: iter([*tensors(self), extra])})
    memory.layers[0].__class__ = kind
    with pytest.raises(ValueError, match="A Hoarder cannot be saved"):
        memory.save_pretrained(tmp_path / "a.memory")


def test_a_file_that_is_replaced_while_it_is_read(model, file, monkeypatch):
    newer = model.read([1, 2, 3])
    content_digest = memory_file.content_digest
    rounds = []

    def replaced(fields, tensors):
        rounds.append(fields["tokens"])
        if len(rounds) == 1:
            monkeypatch.setattr(memory_file, "content_digest", content_digest)
            newer.save_pretrained(file)
            return "that of a mixture"
        return content_digest(fields, tensors)

    monkeypatch.setattr(memory_file, "content_digest", replaced)
    assert read_info(file).tokens == 3 and len(rounds) == 1
