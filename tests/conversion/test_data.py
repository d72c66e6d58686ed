"""Text becomes the same blocks in the same order every time."""

import errno
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_conversion import tiny_recipe

from hf_memory.conversion import data
from hf_memory.conversion.data import Batches, bytes_per_token, load_corpus, split
from hf_memory.conversion.recipe import ConversionError
from hf_memory.evaluation.properties_generation import byte_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    made = byte_tokenizer(270)
    made.add_special_tokens({"eos_token": "<end>"})
    return made


def corpus_of(tokenizer, tmp_path, source, **flags):
    return load_corpus(tiny_recipe(tmp_path, source, tmp_path / "out", **flags), tokenizer)


def everything(corpus) -> np.ndarray:
    # The last token of the first part is the first of the other.
    return np.concatenate([corpus.train, corpus.held_out[1:]])


def test_documents_are_joined_by_the_end_of_text_token(tokenizer, tmp_path):
    folder = tmp_path / "texts"
    (folder / "b").mkdir(parents=True)
    (folder / "b" / "two.py").write_text("second text, a little longer\n", encoding="utf-8")
    (folder / "a.txt").write_text("first text\n", encoding="utf-8")
    (folder / ".hidden").write_text("not this", encoding="utf-8")
    (folder / "picture.bin").write_bytes(b"\0\1\2")
    (folder / "empty.txt").write_text("", encoding="utf-8")
    corpus = corpus_of(tokenizer, tmp_path, folder, context=4)
    text = tokenizer.decode(everything(corpus))
    assert text.startswith("first text\n<end>second text, a little")
    assert "not this" not in text


def test_invalid_bytes_are_read_with_the_replacement_character(tokenizer, tmp_path):
    file = tmp_path / "latin.txt"
    file.write_bytes("caf\xe9 ".encode("latin-1") * 20)
    assert "caf� caf�" in tokenizer.decode(corpus_of(tokenizer, tmp_path, file, context=4).train)


def test_the_last_blocks_are_held_out():
    train, held_out = split(np.arange(101), 10, 0.2)
    assert (train.tolist(), held_out.tolist()) == (list(range(81)), list(range(80, 101)))
    assert len(split(np.arange(21), 10, 0.001)[1]) == 11


def test_held_out_text_may_have_a_file_of_its_own(tokenizer, tmp_path):
    (tmp_path / "train.txt").write_text("train " * 20, encoding="utf-8")
    (tmp_path / "held.txt").write_text("other " * 20, encoding="utf-8")
    flags = {"context": 4, "held_out": str(tmp_path / "held.txt")}
    corpus = corpus_of(tokenizer, tmp_path, tmp_path / "train.txt", **flags)
    assert tokenizer.decode(corpus.train) == "train " * 20 + "<end>"
    assert tokenizer.decode(corpus.held_out) == "other " * 20 + "<end>"


def test_long_documents_are_cut_at_lines_and_lose_nothing(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "PIECE", 50)
    text = "".join(f"line {n}\n" for n in range(40)) + "x" * 120
    assert "".join(data.cut(text)) == text
    assert all(len(piece) <= 50 for piece in data.cut(text))
    (tmp_path / "long.txt").write_text(text, encoding="utf-8")
    corpus = corpus_of(tokenizer, tmp_path, tmp_path / "long.txt", context=4, held_out=str(tmp_path / "long.txt"))
    assert tokenizer.decode(corpus.train) == text + "<end>"


def test_batches_are_fixed_by_their_seeds_and_use_every_block_once():
    tokens = np.arange(61, dtype=np.uint16)
    first, again = Batches(tokens, 6, 5, (3, 1)), Batches(tokens, 6, 5, (3, 1))
    assert torch.equal(again[3], first[3])  # out of order too
    assert not torch.equal(Batches(tokens, 6, 5, (3, 2))[0], first[0])
    epoch = torch.cat([first[0], first[1]])
    assert epoch.dtype == torch.int64 and epoch.shape == (10, 7)
    assert sorted(epoch[:, 0].tolist()) == list(range(0, 60, 6))
    assert torch.equal(epoch[:, 1:] - epoch[:, :-1], torch.ones(10, 6, dtype=torch.int64))
    assert not torch.equal(torch.cat([first[2], first[3]]), epoch)


def test_a_batch_may_reach_over_the_end_of_the_text():
    batch = Batches(np.arange(13), 6, 5, (0, 0))[0]
    assert batch.shape == (5, 7)


def test_held_out_blocks_are_spread_evenly(tokenizer, tmp_path):
    corpus = data.Corpus(np.arange(11), np.arange(101))
    assert corpus.held_out_blocks(10, 100)[:, 0].tolist() == list(range(0, 100, 10))
    assert corpus.held_out_blocks(10, 3)[:, 0].tolist() == [0, 40, 90]


def test_bytes_per_token_counts_the_predicted_text(tokenizer):
    ids = tokenizer("aäöx")["input_ids"]  # 6 bytes, one token each
    assert bytes_per_token(torch.tensor([ids, ids]), tokenizer) == 1.0


@pytest.mark.parametrize(
    ("content", "flags", "sentence"),
    [
        ("", {}, "holds no text, but a block to train on and one to hold out of this context takes 33"),
        ("short", {}, "holds 6 tokens, but"),
        ("x" * 99, {"set": ["align.context=90"]}, "holds 81 tokens beside 20 that are held out, but one block"),
        ("x" * 99, {"held_out": "empty.txt"}, "The data 'empty.txt' holds no text, but one block of this context"),
    ],
)
def test_empty_and_short_data_is_one_sentence(tokenizer, tmp_path, monkeypatch, content, flags, sentence):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(content, encoding="utf-8")
    (tmp_path / "empty.txt").write_text("", encoding="utf-8")
    with pytest.raises(ConversionError, match=sentence):
        corpus_of(tokenizer, tmp_path, tmp_path / "text.txt", **flags)


def test_data_that_is_not_there_or_no_text_is_one_sentence(tokenizer, tmp_path):
    with pytest.raises(ConversionError, match="There is no file or folder"):
        corpus_of(tokenizer, tmp_path, tmp_path / "nothing.txt")
    (tmp_path / "binary").write_bytes(b"\0" * 9)
    with pytest.raises(ConversionError, match="is no text file"):
        corpus_of(tokenizer, tmp_path, tmp_path / "binary")
    (tmp_path / "folder").mkdir()
    with pytest.raises(ConversionError, match="holds no text files"):
        corpus_of(tokenizer, tmp_path, tmp_path / "folder")


def test_datasets_stream_until_there_is_enough(tokenizer, tmp_path, monkeypatch):
    import datasets

    asked = []

    def rows(name, config, split, streaming):
        asked.append((name, config, split, streaming))
        for number in range(10**6):
            assert number < 500, "read on and on"
            yield {"body": f"document {number} ", "id": number}

    monkeypatch.setattr(datasets, "load_dataset", rows)
    flags = {"data_config": "en", "text_column": "body", "tokens": 400}
    corpus = corpus_of(tokenizer, tmp_path, "some/set:validation", **flags)
    assert asked == [("some/set", "en", "validation", True)]
    assert len(everything(corpus)) >= 1000  # two stages and a quarter
    with pytest.raises(ConversionError, match="has no column 'text': set `text_column`, to one of body, id"):
        corpus_of(tokenizer, tmp_path, "some/set")


def test_a_dataset_that_cannot_be_read_is_one_sentence(tokenizer, tmp_path, monkeypatch):
    import datasets

    def fail(*args, **kwargs):
        raise FileNotFoundError("no such\ndataset")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(
        ConversionError, match="no file or folder here, nor a dataset that can be read: no such dataset"
    ):
        corpus_of(tokenizer, tmp_path, "some/set")


def forbid(monkeypatch, folder: Path) -> None:
    """A folder that may not be read, also for root."""
    original = os.scandir

    def scandir(path="."):
        if Path(path) == folder:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return original(path)

    monkeypatch.setattr(os, "scandir", scandir)


def test_a_folder_that_may_not_be_read_is_one_sentence(tokenizer, tmp_path, monkeypatch):
    for name in ("open", "closed", ".git"):
        (tmp_path / "texts" / name).mkdir(parents=True)
        (tmp_path / "texts" / name / "a.txt").write_text("what can be read, once and again\n" * 9, encoding="utf-8")
    with monkeypatch.context() as patch:
        forbid(patch, tmp_path / "texts" / ".git")  # hidden: nobody asks for it
        corpus_of(tokenizer, tmp_path, tmp_path / "texts")
    forbid(monkeypatch, tmp_path / "texts" / "closed")
    with pytest.raises(ConversionError, match=r"The data '.*texts/closed' cannot be read: Permission denied\."):
        corpus_of(tokenizer, tmp_path, tmp_path / "texts")


def test_a_path_that_may_not_be_looked_at_is_one_sentence(tokenizer, tmp_path, monkeypatch):
    def exists(self, **options):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))

    monkeypatch.setattr(Path, "exists", exists)
    with pytest.raises(ConversionError, match=r"The data '.*/text\.txt' cannot be read: Permission denied\."):
        corpus_of(tokenizer, tmp_path, tmp_path / "text.txt")


def test_a_file_that_vanishes_while_others_are_read_is_one_sentence(tmp_path):
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("text\n", encoding="utf-8")
    texts = data.text_files(tmp_path)
    assert next(texts) == "text\n"
    (tmp_path / "b.txt").unlink()
    with pytest.raises(ConversionError, match=r"The data '.*/b\.txt' cannot be read: No such file or directory\."):
        next(texts)
