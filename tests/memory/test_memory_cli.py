"""The commands read, memory info, generate --memory and inspect, in process through typer's runner."""

import json
from pathlib import Path

import pytest
import torch
from small import tensors_of, tiny
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from hf_memory import MemoryCache
from hf_memory.cli import app
from hf_memory.evaluation.memory_plot import break_lines, draw_memory
from hf_memory.evaluation.memory_trace import tokenize_with_labels, trace_memory
from hf_memory.evaluation.properties_generation import byte_tokenizer
from hf_memory.reading import MemoryReaderMixin


TEXT = "".join(f"Line {i} says that {i} and {i} is {2 * i}.\n" for i in range(40))


def run(*arguments: object, text: str | None = None):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], input=text)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    tiny(vocab_size=300, memory_depth=1).save_pretrained(folder)
    byte_tokenizer(300).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def loaded(folder):
    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


@pytest.fixture
def book(tmp_path) -> Path:
    (tmp_path / "book.txt").write_text(TEXT, encoding="utf-8")
    return tmp_path / "book.txt"


def test_read_show_and_ask(folder, loaded, book):
    model, tokenizer = loaded
    file = book.with_name("book.memory")
    result = run("read", folder, book, "-o", file, "--piece", 100, "--device", "cpu")
    assert result.exit_code == 0, result.output
    with open(book, encoding="utf-8") as stream:
        expected = model.read(stream, tokenizer, piece=100)
    memory = MemoryCache.from_pretrained(file, model=model)
    assert all(map(torch.equal, tensors_of(memory), tensors_of(expected)))
    assert sorted(path.name for path in book.parent.iterdir()) == ["book.memory", "book.txt"]

    document = json.loads(run("memory", "info", file, "--json").stdout)
    assert document["tokens"] == expected.info.tokens and document["notes"] == {"source": "book.txt"}
    assert document["file_bytes"] == file.stat().st_size
    table = run("memory", "info", file).stdout
    assert f"{expected.info.tokens:,}" in table and "titans" in table and "book.txt" in table

    result = run("generate", folder, "Line 7", "--memory", file, "--max-new-tokens", 12, "--device", "cpu")
    ids = tokenizer("Line 7", add_special_tokens=False, return_tensors="pt")["input_ids"]
    tokens = model.generate(ids, past_key_values=memory, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
    assert (
        result.exit_code == 0 and result.stdout.strip() == tokenizer.decode(tokens, skip_special_tokens=True).strip()
    )


def test_read_standard_input_behind_a_memory(folder, loaded, book):
    model, tokenizer = loaded
    first, both = book.with_name("first.memory"), book.with_name("both.memory")
    assert run("read", folder, book, "-o", first).exit_code == 0
    assert run("read", folder, "-", "-o", both, "-m", first, text="And so on.").exit_code == 0
    memory = model.read("And so on.", tokenizer, MemoryCache.from_pretrained(first, model=model))
    again = MemoryCache.from_pretrained(both, model=model)
    assert all(map(torch.equal, tensors_of(memory), tensors_of(again)))
    assert again.notes["source"] == "book.txt + standard input"


def test_ctrl_c_and_the_same_command_again(folder, book, monkeypatch):
    arguments = ("read", folder, book, "-o", book.with_name("book.memory"), "--piece", 50)
    part, read_pieces = book.with_name("book.memory.part"), MemoryReaderMixin._read_pieces

    def interrupted(self, pieces, memory, length, bar):
        def some():
            for number, piece in enumerate(pieces):
                if number == 3:
                    raise KeyboardInterrupt
                yield piece

        read_pieces(self, some(), memory, length, bar)

    for round_ in range(2):
        monkeypatch.setattr(MemoryReaderMixin, "_read_pieces", interrupted)
        result = run(*arguments)
        assert result.exit_code == 130 and "run the same command again" in result.stderr
        assert part.is_file() and not book.with_name("book.memory").exists()
        assert ("Going on behind the first" in result.stderr) == (round_ == 1)
    monkeypatch.undo()
    book.write_text("Another text. " * 99)
    result = run(*arguments)
    assert result.exit_code == 2 and "is the begun memory of another text" in result.stderr
    book.write_text(TEXT)
    other = run(*arguments, "--memory", part)
    assert other.exit_code == 2 and "was begun with another --memory" in other.stderr and part.is_file()
    assert run(*arguments).exit_code == 0 and not part.exists()
    resumed = book.with_name("book.memory").read_bytes()
    assert run(*arguments).exit_code == 0
    assert book.with_name("book.memory").read_bytes() == resumed


def test_inspect_draws(folder, book):
    file = book.with_name("first.memory")
    assert run("read", folder, book, "-o", file).exit_code == 0
    for number, extra in enumerate(((), ("-m", file, "--characters", 8))):
        picture = book.with_name(f"{number}.png")
        result = run("inspect", folder, "One line,\n\tand ä €.", "-o", picture, *extra)
        assert result.exit_code == 0, result.output
        assert picture.read_bytes()[:4] == b"\x89PNG" and picture.stat().st_size > 10_000


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        ("read MODEL missing.txt -o a.memory", "There is no file 'missing.txt' to read"),
        ("read MODEL MODEL -o a.memory", "is no regular file: pipe the text in"),
        ("read MODEL BINARY -o a.memory", "is not UTF-8 text"),
        ("read MODEL EMPTY -o a.memory", "the source holds no token"),
        ("read MODEL EMPTY -o EMPTY", "would take the place of the text"),
        ("read nowhere BINARY -o EMPTY/a.memory", "No file can be written to 'empty': File exists"),
        ("read nowhere BINARY -o /proc/a.memory", "No file can be written to '/proc': No such file or directory"),
        ("read LLAMA EMPTY -o a.memory", "is a llama without memories"),
        ("inspect LLAMA text", "is a llama without memories"),
        ("inspect MODEL -", "The text is empty"),
        ("generate LLAMA text -m a.memory", "has no memory to load"),
        ("generate MODEL text -m missing.memory", "There is no memory file 'missing.memory'"),
        ("memory info BINARY", "is no safetensors file, or a truncated or altered one"),
        ("memory info missing.memory", "There is no memory file"),
        ("memory info MODEL/model.safetensors", "holds no memory"),
    ],
)
def test_wrong_input_is_one_sentence(arguments, sentence, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("binary").write_bytes(bytes(range(256)))
    Path("empty").touch()
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=300, **sizes)).save_pretrained("llama")
    byte_tokenizer(300).save_pretrained("llama")
    for name, path in (("MODEL", folder), ("BINARY", "binary"), ("EMPTY", "empty"), ("LLAMA", "llama")):
        arguments = arguments.replace(name, str(path))
    before = sorted(Path().iterdir())
    result = run(*arguments.split())
    assert result.exit_code == 2 and sentence in result.stderr and "Traceback" not in result.stderr
    assert sorted(Path().iterdir()) == before


def test_a_trace_shows_what_the_model_computes():
    torch.manual_seed(0)
    model = tiny(variant="mag", vocab_size=300, chunk_size=1)
    ids = torch.randint(300, (1, 20))
    trace = trace_memory(model, ids[0].tolist(), ["x"] * 20)
    with torch.no_grad():
        log_probs = model(ids).logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])[:, 0]
        hidden = model.model.layers[0].input_layernorm(model.model.embed_tokens(ids))
        gates = model.model.layers[0].mixer.memory.gates(hidden)
    assert trace.surprise[0].isnan()
    torch.testing.assert_close(trace.surprise[1:], -log_probs / torch.tensor(2.0).log(), atol=1e-4, rtol=1e-4)
    assert trace.layers == trace.norm_layers == [0, 1] and trace.write.shape == trace.forget.shape == (20, 2, 2)
    torch.testing.assert_close(trace.write[:, 0], gates.step[0].mean(-1))
    torch.testing.assert_close(trace.forget[:, 0], 1 - gates.log_decay[0].exp().mean(-1), atol=1e-6, rtol=1e-4)
    states = model.read(ids).layers[1].states
    squares = sum(states[f"memory.offset_{i}"].square().sum() for i in range(2))
    torch.testing.assert_close(trace.norms[-1, 1], squares.sqrt())


def test_pictures_of_models_without_forgetting_or_gates(tmp_path):
    model = tiny(vocab_size=300, memory_decay=False, num_hidden_layers=1)
    trace = trace_memory(model, [1, 2, 3], ["a", "b", "c" * 150])
    assert (trace.forget == 0).all()
    trace.layers, trace.write = list(range(24)), trace.write.repeat(1, 24, 1)
    trace.forget, trace.norm_layers, trace.norms = trace.write, trace.layers, trace.norms.repeat(1, 24)
    assert draw_memory(trace, tmp_path / "many.png").stat().st_size > 5000
    trace.layers, trace.write = [], trace.write[:, :0]
    assert draw_memory(trace, tmp_path / "new" / "a.png").stat().st_size > 5000
    with pytest.raises(ValueError, match="nothing to look at"):
        trace_memory(model, [], [])


def test_text_is_laid_out_whole():
    tokenizer = byte_tokenizer(300)
    ids, labels = tokenize_with_labels(tokenizer, TEXT + "ä€ end")
    assert len(ids) == len(labels)
    lines = break_lines(["word"] * 60 + ["x" * 250, "y"])
    assert [(line.start, line.stop) for line in lines] == [(0, 25), (25, 50), (50, 60), (60, 61), (61, 62)]
    assert all(line.edges[-1] <= 100 and len(line.edges) == line.stop - line.start + 1 for line in lines)


def test_notes_of_a_file_do_not_reach_the_terminal_as_commands(loaded, tmp_path):
    memory = loaded[0].read([1, 2, 3])
    memory.notes = {"a\x1b[2J": "ä [bold]\x1b]0;title\x07"}
    memory.save_pretrained(tmp_path / "a.memory")
    result = run("memory", "info", tmp_path / "a.memory")
    assert result.exit_code == 0 and "\x1b" not in result.output and "\x07" not in result.output
    assert "ä [bold]" in result.output
