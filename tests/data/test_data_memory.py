"""Long texts: read in chunks, cut into pieces, tokenised in calls of bounded size."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from data_toys import WORDS, flat, make_config, make_texts, make_tokenizer, stream

from linearize.data import documents as data_documents
from linearize.data import prepare_data
from linearize.data import sources as data_sources
from linearize.errors import UserError

PEAK = """
import resource, sys
from data_toys import make_config, make_tokenizer
from linearize.data.sequences import prepare_data
from pathlib import Path
import linearize.config.settings, transformers.tokenization_utils_tokenizers, torch
folder = Path(sys.argv[1])
config, tokenizer = make_config(folder, str(folder / "a.txt"), sequence_length=512), make_tokenizer()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
train, _ = prepare_data(config, tokenizer)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024, train.tokens)
"""


@pytest.mark.parametrize("between", ["\n", " "])
def test_a_long_file_takes_little_memory(tmp_path, between):
    paragraph = " ".join(WORDS * 4)
    (tmp_path / "a.txt").write_text((paragraph + between) * (5_000_000 // len(paragraph)))
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parent,
    )
    grown, tokens = map(int, done.stdout.split()[-2:])
    assert tokens > 500_000
    assert grown < 200  # MiB; 5 MB in one call take some 400


def test_a_single_long_line_is_cut_before_single_spaces():
    tokenizer = make_tokenizer()
    text = " ".join(make_texts(60)) + "  two spaces" * 5 + " the end"
    pieces = list(data_documents.split_text(text, 100))
    assert len(pieces) > 10 and max(len(piece.text) for piece in pieces) <= 200
    assert "".join(piece.text for piece in pieces) == text
    ids = [i for piece in pieces for i in tokenizer(piece.text, add_special_tokens=False)["input_ids"]]
    assert ids == tokenizer(text, add_special_tokens=False)["input_ids"]


def test_a_text_without_places_is_cut_all_the_same():
    pieces = list(data_documents.split_text("\u6cb3" * 1000, 100))
    assert [len(piece.text) for piece in pieces] == [200] * 5
    assert [(piece.is_first, piece.is_last) for piece in pieces] == [(i == 0, i == 4) for i in range(5)]


def test_cuts_do_not_depend_on_how_a_file_is_read():
    text = "\n".join(make_texts(80))
    whole = list(data_documents.split_text(text, 100))
    assert list(data_documents.split_text((text[i : i + 7] for i in range(0, len(text), 7)), 100)) == whole


def test_calls_hold_a_bounded_number_of_characters(monkeypatch):
    monkeypatch.setattr(data_documents, "CALL_CHARACTERS", 1000)
    monkeypatch.setattr(data_documents.split_text, "__defaults__", (100,))
    tokenizer, calls = make_tokenizer(), []
    encode = data_documents._encode
    monkeypatch.setattr(data_documents, "_encode", lambda t, texts: calls.append(texts) or encode(t, texts))
    texts = ["\n".join(make_texts(60, seed)) for seed in range(3)]
    segments = list(data_documents.tokenize_records([("", {"text": t}) for t in texts], tokenizer, "text"))
    assert len(calls) > 5 and max(sum(map(len, call)) for call in calls) <= 1000
    assert np.concatenate([segment.ids for segment in segments]).tolist() == stream(texts, tokenizer)


@pytest.mark.parametrize("size", [1, 3, 1 << 20])
def test_a_text_file_is_read_in_chunks(tmp_path, monkeypatch, size):
    monkeypatch.setattr(data_sources, "_CHUNK_BYTES", size)
    content = "\ufeffone\r\ntwo\rthree \U0001f600 Ω\r\n\r\n"
    (tmp_path / "a.txt").write_bytes(content.encode())
    expected = content[1:].replace("\r\n", "\n")
    assert "".join(data_sources.TextFile(tmp_path / "a.txt").pieces()) == expected
    (tmp_path / "a.txt").write_bytes(b"good \xe2\x82\xac text \xff\xfe")
    with pytest.raises(UserError, match=r"a.txt is not UTF-8 text \(byte 14\)"):
        list(data_sources.TextFile(tmp_path / "a.txt").pieces())


def test_a_blank_file_beside_others_is_left_out(tmp_path):
    (tmp_path / "a.txt").write_text(" \n" * 300)
    (tmp_path / "b.txt").write_text("\n" * 300 + "the river " * 40)
    tokenizer = make_tokenizer()
    names = [str(tmp_path / "a.txt"), str(tmp_path / "b.txt")]
    train, _ = prepare_data(make_config(tmp_path, names, sequence_length=8, validation_documents=0), tokenizer)
    assert flat(train) == stream([(tmp_path / "b.txt").read_text()], tokenizer)[: train.tokens]
