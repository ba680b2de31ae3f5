"""Data: bad input gets one sentence; text for evaluation; the order of an epoch."""

import gzip

import pytest
import torch
from data_toys import (
    CHATML,
    CHATML_FORGETFUL,
    flat,
    make_config,
    make_texts,
    make_tokenizer,
    stream,
    write_jsonl,
    write_texts,
)

from linearize.data.sequences import epoch_order, load_text_blocks, prepare_data
from linearize.errors import UserError


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def test_bad_files_get_one_sentence(tmp_path, tokenizer):
    def fails(dataset, match, **changes):
        with pytest.raises(UserError, match=match) as caught:
            prepare_data(make_config(tmp_path, str(dataset), **changes), tokenizer)
        assert "\n" not in str(caught.value)

    fails(tmp_path / "none.jsonl", "none.jsonl does not exist")
    fails(tmp_path / "*.jsonl", "No data file matches")
    (tmp_path / "empty.txt").touch()
    fails(tmp_path / "empty.txt", "empty.txt is empty")
    (tmp_path / "blank.txt").write_text(" \n\n")
    fails(tmp_path / "blank.txt", "blank.txt holds no text")
    (tmp_path / "blank.jsonl").write_text("\n\n")
    fails(tmp_path / "blank.jsonl", "blank.jsonl is empty")
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n\n{"text": "b\n')
    fails(tmp_path / "bad.jsonl", r"Line 3 of .*bad.jsonl is not valid JSON")
    (tmp_path / "list.jsonl").write_text('{"text": "a"}\n["b"]\n')
    fails(tmp_path / "list.jsonl", r"Line 2 of .*list.jsonl is not a JSON object")
    (tmp_path / "bad.json").write_text('[{"text": "a"}')
    fails(tmp_path / "bad.json", "bad.json is not valid JSON")
    (tmp_path / "flat.json").write_text('["a", "b"]')
    fails(tmp_path / "flat.json", "list of JSON objects")
    (tmp_path / "bad.parquet").write_bytes(b"not parquet")
    fails(tmp_path / "bad.parquet", "bad.parquet is not a valid Parquet file")
    (tmp_path / "bad.txt.gz").write_bytes(gzip.compress(b"text" * 1000)[:-9])
    fails(tmp_path / "bad.txt.gz", "not a complete gzip file")
    (tmp_path / "latin.txt").write_bytes("Übermut".encode("latin-1"))
    fails(tmp_path / "latin.txt", "not UTF-8")
    (tmp_path / "table.csv").write_text("text\na\n")
    fails(tmp_path / "table.csv", "table.csv is not of a kind")
    write_texts(tmp_path / "short.jsonl", ["a b"])
    fails(tmp_path / "short.jsonl", "The data hold 4 tokens, fewer than the 32")
    good = write_texts(tmp_path / "good.jsonl", make_texts(40))
    fails(good, "validation data .* are the training data", validation=good)
    fails(good, "none.txt does not exist", validation=str(tmp_path / "none.txt"))
    fails(good, "validation data hold 4 tokens", validation=str(tmp_path / "short.jsonl"))
    fails(good, "plain text has no answers", completion_only=True)


def test_missing_fields_are_named(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "a.jsonl", [{"body": "x", "title": "y"}])
    for changes, match in (
        ({}, "neither 'text' nor 'messages' nor instruction and .* completion; its fields are body, title"),
        ({"text_field": "content", "format": "text"}, "no field 'content'; its fields are body, title"),
        ({"format": "chat"}, "no field 'messages'; its fields are body, title"),
        ({"format": "instruction"}, "no field 'instruction'"),
    ):
        with pytest.raises(UserError, match=match):
            prepare_data(make_config(tmp_path, path, **changes), tokenizer)
    path = write_jsonl(tmp_path / "b.jsonl", [{"text": "x"}, {"body": "y"}])
    with pytest.raises(UserError, match="no field 'text' in line 2 of .*b.jsonl; its fields are body"):
        prepare_data(make_config(tmp_path, path), tokenizer)


def test_chat_errors(tmp_path):
    tokenizer = make_tokenizer()
    turns = [{"role": role, "content": f"words {i}"} for i, role in enumerate(["user", "assistant"] * 2)]

    def fails(messages, match, **changes):
        path = write_jsonl(tmp_path / "a.jsonl", [{"messages": messages}])
        with pytest.raises(UserError, match=match):
            prepare_data(make_config(tmp_path, path, **changes), tokenizer)

    fails(turns, "no chat template")
    tokenizer.chat_template = CHATML_FORGETFUL
    fails(turns, "rewrites earlier turns")
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    fails(turns, r"does not take the messages in line 1 of .*roles must alternate")
    tokenizer.chat_template = CHATML
    fails("hello", "must be a list of messages")
    fails([{"from": "human"}], "lacks role or content")
    fails([{"from": "narrator", "value": "hello"}], "is from 'narrator', but ShareGPT's chats are from human, user")
    fails([{"role": "user", "content": [{"type": "image", "url": "x"}]}], "part of type 'image', but only text")
    fails([{"role": "user", "content": 3}], "content of a message .* is a int")
    fails(turns[:1] * 40, "No train sequence .* holds a token of an answer", validation_documents=0)


def test_tokenizer_without_eos(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="no end-of-sequence token"):
        load_text_blocks(write_texts(tmp_path / "a.jsonl", make_texts(4)), tokenizer, 8)


def test_hub_errors(tmp_path, tokenizer, monkeypatch):
    import datasets
    from datasets.exceptions import DatasetNotFoundError

    for error, match in (
        (ConnectionError("Couldn't reach 'me/x' on the Hub"), "could not be reached .* local"),
        (
            DatasetNotFoundError("Dataset 'me/x' doesn't exist on the Hub or cannot be accessed."),
            "No dataset me/x was found",
        ),
        (DatasetNotFoundError("Dataset 'me/x' is a gated dataset on the Hub."), "gated: accept its terms"),
        (ValueError("Unknown split \"tran\". Should be one of ['train']."), "Unknown split"),
    ):

        def load_dataset(*args, error=error, **kwargs):
            raise error

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        with pytest.raises(UserError, match=match):
            prepare_data(make_config(tmp_path, "me/x"), tokenizer)
    with pytest.raises(UserError, match="neither a file nor the id"):
        prepare_data(make_config(tmp_path, "not a/good/id"), tokenizer)


# ---- evaluation text and order


def test_load_text_blocks(tmp_path, tokenizer):
    texts = make_texts(20)
    path = write_texts(tmp_path / "a.jsonl", texts)
    expected = stream(texts, tokenizer)
    blocks = load_text_blocks(path, tokenizer, 16, 100)
    assert flat(blocks) == expected[:96]
    assert torch.equal(blocks[:]["labels"], blocks[:]["input_ids"])
    assert len(load_text_blocks([path, path], tokenizer, len(expected))) == 2
    with pytest.raises(UserError, match=f"holds {len(expected)} tokens, fewer than one sequence of 100000"):
        load_text_blocks(path, tokenizer, 100000)
    with pytest.raises(UserError, match="8 are asked for"):
        load_text_blocks(path, tokenizer, 16, 8)
    with pytest.raises(UserError, match="at least 2 tokens"):
        load_text_blocks(path, tokenizer, 1)
    with pytest.raises(UserError, match="no field 'body'"):
        load_text_blocks(path, tokenizer, 16, text_field="body")


def test_epoch_order():
    first = epoch_order(1000, 0, 0)
    assert first.dtype == torch.int64
    assert torch.equal(first.sort().values, torch.arange(1000))
    assert torch.equal(first, epoch_order(1000, 0, 0))
    others = [epoch_order(1000, *pair) for pair in ((0, 1), (1, 0), (-1, 0), (2**40, 3))]
    assert len({tuple(order.tolist()) for order in [first, *others]}) == 5
    assert epoch_order(0, 0, 0).tolist() == []
