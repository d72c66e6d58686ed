"""`model.read`: what it returns is what the model itself would have remembered, whatever the source and its pieces."""

import io

import pytest
import torch
from small import logits_behind, tensors_of, tiny
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, PreTrainedTokenizerFast

from hf_memory.cache import MemoryCache, StaticMemoryCache
from hf_memory.evaluation.properties_generation import byte_tokenizer
from hf_memory.models.hybrid.configuration_hybrid import MemoryHybridConfig
from hf_memory.models.hybrid.modeling_hybrid import MemoryHybridForCausalLM
from hf_memory.reading import ReadingInterruptedError


TEXT = "".join(f"Line {i} of a text,\n  indented\n\n{'and longer ' * (i % 5)}end.\n" for i in range(9))
LONG = TEXT * 6


@pytest.fixture(scope="module", params=["lmm", "mag"])
def model(request):
    torch.manual_seed(0)
    return tiny(variant=request.param)


@pytest.fixture(scope="module")
def bpe() -> PreTrainedTokenizerFast:
    """Merges across words as GPT-2's tokenizer does, and a BOS token that it puts in front."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        [LONG], trainers.BpeTrainer(vocab_size=350, initial_alphabet=alphabet, show_progress=False)
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def hybrid(**fields) -> MemoryHybridForCausalLM:
    sizes = {"vocab_size": 260, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
    teacher = LlamaConfig(**sizes, num_attention_heads=2, eos_token_id=None, initializer_range=0.2)
    memory = {"memory_expansion": 2, "chunk_size": 4}
    return MemoryHybridForCausalLM(MemoryHybridConfig.from_teacher(teacher, memory=memory, **fields)).eval()


def test_a_memory_is_the_cache_that_the_same_calls_fill(model):
    ids, more = torch.randint(260, (2, 103)), torch.randint(260, (2, 9))
    memory = model.read(ids, piece=40)
    with torch.no_grad():
        cache = None
        for part in ids.split(40, dim=1):
            cache = model(part, past_key_values=cache, use_cache=True).past_key_values
    assert all(map(torch.equal, tensors_of(memory), tensors_of(cache)))
    assert int(memory.seen_tokens) == 103
    assert torch.equal(logits_behind(model, memory, more), logits_behind(model, cache, more))


def test_other_pieces_agree_to_rounding(model):
    ids, more = torch.randint(260, (1, 103)), torch.randint(260, (1, 9))
    whole = logits_behind(model, model.read(ids), more)
    for piece in (1, 4, 7, 64):
        torch.testing.assert_close(
            logits_behind(model, model.read(ids, piece=piece), more), whole, atol=1e-5, rtol=1e-5
        )


def test_sources_of_the_same_tokens_give_the_same_memory(model):
    tokenizer = byte_tokenizer(260)
    tokenizer.bos_token = None
    ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    expected = tensors_of(model.read(TEXT, tokenizer, piece=100))
    sources = [
        ids,
        torch.tensor(ids),
        torch.tensor([ids]),
        tokenizer(TEXT, add_special_tokens=False, return_tensors="pt"),
        {"input_ids": [ids]},
        iter(ids),
        (torch.tensor(ids[start : start + 100]) for start in range(0, len(ids), 100)),
    ]
    for source in sources:
        assert all(map(torch.equal, tensors_of(model.read(source, piece=100)), expected))


def test_a_stream_is_tokenized_as_the_whole_text(bpe, monkeypatch):
    model = tiny(vocab_size=400)
    whole = bpe(LONG)["input_ids"]
    seen = []
    monkeypatch.setattr(
        type(model.base_model), "forward", lambda self, input_ids, **kwargs: seen.extend(input_ids[0].tolist())
    )
    for stream in (io.StringIO(LONG), (LONG[i : i + 7] for i in range(0, len(LONG), 7)), [LONG]):
        seen.clear()
        with pytest.raises(ValueError, match="no token"):  # the stand-in for the model fills no cache
            model.read(stream, bpe, piece=20)
        assert seen == whole
    seen.clear()
    with pytest.raises(ValueError, match="no token"):
        model.read("word " * 300 + "x" * 3000, bpe, piece=20)
    assert bpe.decode(seen) == "word " * 300 + "x" * 3000


def test_how_a_stream_comes_does_not_matter(model):
    tokenizer = byte_tokenizer(260)
    by_lines, at_once = model.read(io.StringIO(TEXT), tokenizer, piece=50), model.read([TEXT], tokenizer, piece=50)
    assert all(map(torch.equal, tensors_of(by_lines), tensors_of(at_once)))
    assert int(by_lines.seen_tokens) == len(TEXT)


def test_a_text_starts_with_bos_once_and_never_ends(bpe):
    model = tiny(vocab_size=400)
    bpe.backend_tokenizer.add_special_tokens(["<s>", "</s>"])
    memory = model.read("one text", bpe)
    first = int(memory.seen_tokens)
    assert first == len(bpe("one text", add_special_tokens=False)["input_ids"])
    from tokenizers.processors import TemplateProcessing

    special = [("<s>", bpe.bos_token_id), ("</s>", bpe.eos_token_id)]
    framing = PreTrainedTokenizerFast(tokenizer_object=bpe.backend_tokenizer, bos_token="<s>", eos_token="</s>")
    framing.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=special)
    memory = model.read("one text", framing)
    assert int(memory.seen_tokens) == first + 1
    assert int(model.read("one text", framing, memory=memory).seen_tokens) == 2 * first + 1


def test_reading_goes_on(model):
    ids, more = torch.randint(260, (1, 80)), torch.randint(260, (1, 9))
    memory = model.read(ids[:, :40], piece=20)
    assert model.read(ids[:, 40:], piece=20, memory=memory) is memory
    assert torch.equal(logits_behind(model, memory, more), logits_behind(model, model.read(ids, piece=20), more))


def test_generate_takes_the_question_only(model):
    ids, question = torch.randint(260, (1, 61)), torch.randint(260, (1, 5))
    greedy = {"max_new_tokens": 12, "do_sample": False}
    expected = model.generate(torch.cat((ids, question), 1), **greedy)[:, 61:]
    memory = model.read(ids)
    for extra in ({}, {"attention_mask": torch.ones_like(question)}, {"prefill_chunk_size": 2}):
        assert torch.equal(model.generate(question, past_key_values=memory.clone(), **greedy, **extra), expected)
    assert torch.equal(model.generate(input_ids=question, past_key_values=memory.clone(), **greedy), expected)
    long = torch.randint(260, (1, 90))  # longer than what was read
    whole = model.generate(torch.cat((ids, long), 1), **greedy)[:, 61:]
    assert torch.equal(model.generate(long, past_key_values=memory.clone(), **greedy), whole)
    assert int(memory.seen_tokens) == 61


def test_padded_questions_behind_one_memory(model):
    ids, questions = torch.randint(260, (1, 61)), torch.randint(260, (2, 5))
    greedy = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    single = [model.generate(torch.cat((ids, q[None]), 1), **greedy)[:, -8:] for q in (questions[0], questions[1, 2:])]
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
    memory = model.read(ids)
    both = model.generate(questions, attention_mask=mask, past_key_values=memory, **greedy)[:, -8:]
    assert torch.equal(both, torch.cat(single))
    # A second round: the padding of the first one takes no position.
    again = torch.cat((both[:, -1:], questions), dim=1)
    second = model.generate(again, past_key_values=memory, **greedy)[:, -8:]
    told = [
        torch.cat((ids, q[None], s, questions[i : i + 1]), 1)
        for i, (q, s) in enumerate(zip((questions[0], questions[1, 2:]), single))
    ]
    assert torch.equal(second, torch.cat([model.generate(t, **greedy)[:, -8:] for t in told]))


def test_beams_and_several_answers_behind_one_memory(model):
    ids, questions = torch.randint(260, (1, 31)), torch.randint(260, (2, 5))
    whole, memory = torch.cat((ids.expand(2, -1), questions), 1), model.read(ids)
    beams = {"max_new_tokens": 6, "num_beams": 3, "do_sample": False}
    expected = model.generate(whole, **beams)[:, 31:]
    prepared = memory.clone()
    prepared.batch_repeat_interleave(6)
    for cache in (memory.clone(), prepared):
        assert torch.equal(model.generate(questions, past_key_values=cache, **beams), expected)
    several = {"max_new_tokens": 4, "num_return_sequences": 2, "do_sample": True, "top_k": 5}
    torch.manual_seed(3)
    expected = model.generate(whole, **several)[:, 31:]
    torch.manual_seed(3)
    assert torch.equal(model.generate(questions, past_key_values=memory, **several), expected)
    assert memory.info.rows == 4
    with pytest.raises(ValueError, match="holds 4 rows, the input has 3"):
        model.generate(torch.randint(260, (3, 5)), past_key_values=memory, max_new_tokens=2)


def test_a_question_of_no_tokens_is_refused(model):
    memory = model.read([1, 2, 3])
    with pytest.raises(ValueError, match="at least one new token"):
        model.generate(torch.zeros(1, 0, dtype=torch.long), past_key_values=memory)
    with pytest.raises(ValueError, match="at least one new token"):
        model.generate(past_key_values=memory)


def test_ctrl_c_keeps_whole_pieces(model, monkeypatch):
    ids = torch.randint(260, (1, 50))
    last = model.base_model.layers[-1].mlp
    calls, forward = [], last.forward

    def interrupted(x):
        calls.append(len(calls))
        if len(calls) == 4:  # the lower layers have read the fourth piece already
            raise KeyboardInterrupt
        return forward(x)

    monkeypatch.setattr(last, "forward", interrupted)
    with pytest.raises(ReadingInterruptedError, match="Stopped after 30 tokens") as stop:
        model.read(ids, piece=10)
    monkeypatch.undo()
    assert stop.value.tokens == 30 and stop.value.characters is None
    expected = tensors_of(model.read(ids[:, :30], piece=10))
    assert all(map(torch.equal, tensors_of(stop.value.memory), expected))
    whole = model.read(ids[:, 30:], memory=stop.value.memory, piece=10)
    assert all(map(torch.equal, tensors_of(whole), tensors_of(model.read(ids, piece=10))))


def test_a_stopped_stream_says_how_many_characters(model):
    tokenizer = byte_tokenizer(260)

    def lines():
        for i, line in enumerate(TEXT.splitlines(keepends=True)):
            if i == 25:
                raise KeyboardInterrupt
            yield line

    with pytest.raises(ReadingInterruptedError) as stop:
        model.read(lines(), tokenizer, piece=50)
    done = stop.value.characters
    assert 0 < done == stop.value.tokens < len(TEXT)
    memory = model.read(io.StringIO(TEXT[done:]), tokenizer, memory=stop.value.memory, piece=50)
    assert all(map(torch.equal, tensors_of(memory), tensors_of(model.read([TEXT], tokenizer, piece=50))))


def test_an_error_leaves_a_given_memory_whole(model):
    memory = model.read(list(range(20)))
    before = tensors_of(memory.clone())
    with pytest.raises(ValueError, match="from 0 to 259, got 999"):
        model.read([1, 2, 3, 999], memory=memory, piece=2)
    after = tensors_of(memory)
    assert int(memory.seen_tokens) == 22 and len(before) == len(after)


def test_hybrids_keep_windows_or_are_refused():
    ids, more = torch.randint(260, (1, 40)), torch.randint(260, (1, 6))
    growing = hybrid(memory_layers=[1])
    with pytest.raises(ValueError, match="Layers 0 of this memory_hybrid keep keys and values of every token"):
        growing.read(ids)
    bounded = hybrid(memory_layers=[0, 1], memory_mode="retrofit", memory_window=8)
    for model, kwargs in ((growing, {"allow_growth": True}), (bounded, {}), (hybrid(memory_layers=[0, 1]), {})):
        memory = model.read(ids, piece=16, **kwargs)
        with torch.no_grad():
            whole = model(torch.cat((ids, more), 1)).logits[:, 40:]
        torch.testing.assert_close(logits_behind(model, memory, more), whole, atol=1e-5, rtol=1e-5)
        greedy = {"max_new_tokens": 6, "do_sample": False}
        expected = model.generate(torch.cat((ids, more), 1), **greedy)[:, 40:]
        assert torch.equal(model.generate(more, past_key_values=memory, **greedy), expected)
    sizes = [bounded.read(torch.randint(260, (1, n))).nbytes for n in (20, 200)]
    assert sizes[0] == sizes[1]


def test_reading_leaves_the_mode_of_the_model(model):
    model.train()
    model.base_model.layers[0].eval()
    model.read([1, 2, 3])
    assert model.training and not model.base_model.layers[0].training
    model.eval()


def test_forks_are_independent(model):
    memory = model.read(torch.randint(260, (1, 30)))
    before = tensors_of(memory.clone())
    a, b = memory.fork(2)
    model.read([1, 2, 3], memory=a)
    model.read([4, 5], memory=b)
    assert all(map(torch.equal, tensors_of(memory), before))
    assert [int(x.seen_tokens) for x in (memory, a, b)] == [30, 33, 32] and b.model_identity == memory.model_identity
    with pytest.raises(ValueError, match="one copy or more"):
        memory.fork(0)


@pytest.mark.parametrize(
    "source, sentence",
    [
        ("text", "Text needs its tokenizer"),
        ([], "holds no token"),
        (iter(()), "holds no token"),
        (torch.zeros(3), "must be integers"),
        (torch.zeros(1, 2, 3, dtype=torch.long), "must be integers"),
        ([-1], "from 0 to 259, got -1"),
        (b"bytes", "open a file in text mode"),
        ([b"bytes"], "a bytes that is none; open a file of text in text mode"),
        ([[1, 2], [3]], "rows of one length, got a list"),
        (torch.zeros(0, 5, dtype=torch.long), r"must be integers .*, got \(0, 5\)"),
        ({"ids": [1]}, "holds no `input_ids`, only ids"),
        (7, "must be text, token ids, or a stream"),
        ({"input_ids": [[1, 2]], "attention_mask": [[0, 1]]}, "no padding"),
    ],
)
def test_wrong_sources_get_a_sentence(model, source, sentence):
    with pytest.raises(ValueError, match=sentence):
        model.read(source)


def test_wrong_arguments_get_a_sentence(model):
    with pytest.raises(ValueError, match="at least 1 token"):
        model.read([1], piece=0)
    for other in ({}, StaticMemoryCache(model.config, 8)):
        with pytest.raises(ValueError, match=rf"must be a MemoryCache of .*, got a {type(other).__name__}"):
            model.read([1], memory=other)
    torch.manual_seed(1)
    with pytest.raises(ValueError, match="other weights"):
        model.read([1], memory=tiny(variant=model.config.variant).read([1]))
    own = MemoryCache(model.config)
    assert model.read([1], memory=own) is own and own.model_identity is not None
