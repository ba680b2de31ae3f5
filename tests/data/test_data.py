"""Data: what is read, tokenised, learnt and packed."""

import gzip
import importlib
import json
import sys

import numpy as np
import pytest
import torch
from data_toys import (
    CHATML,
    CHATML_GENERATION,
    flat,
    make_config,
    make_texts,
    make_tokenizer,
    stream,
    write_jsonl,
    write_texts,
)

from linearize.data import documents as data_documents
from linearize.data import packing as data_packing
from linearize.data import sequences as data
from linearize.data.sequences import TokenBlocks, load_text_blocks, prepare_data
from linearize.errors import UserError


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


# ---- packing


@pytest.mark.parametrize("bos", [False, True])
def test_stream_is_the_documents_between_bos_and_eos(tmp_path, bos):
    tokenizer = make_tokenizer(bos)
    texts = make_texts(40)
    held_out = make_texts(5, seed=1)
    config = make_config(
        tmp_path,
        write_texts(tmp_path / "train.jsonl", texts),
        validation=write_texts(tmp_path / "val.jsonl", held_out),
    )
    train, validation = prepare_data(config, tokenizer)
    for blocks, documents in ((train, texts), (validation, held_out)):
        expected = stream(documents, tokenizer, [0] if bos else [])
        assert flat(blocks) == expected[: len(expected) // 16 * 16]
        assert len(blocks) == len(expected) // 16
        assert blocks.input_ids.shape[1] == 16


def test_exact_last_sequence_is_kept(tmp_path, tokenizer):
    texts = make_texts(30)
    expected = stream(texts, tokenizer)
    config = make_config(
        tmp_path, write_texts(tmp_path / "a.jsonl", texts), validation_documents=0, max_tokens=len(expected) // 16 * 16
    )
    train, validation = prepare_data(config, tokenizer)
    assert train.tokens == config.max_tokens
    assert flat(train) == expected[: config.max_tokens]
    assert len(validation) == 0


def test_packing_matches_a_plain_version_for_any_ranges(tmp_path):
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 1000, size=9000).astype(np.uint16)
    mask = rng.random(9000) < 0.05
    documents = data_packing.Documents(ids, mask, np.array([9000]))
    ranges = [(0, 7), (8, 4000), (4003, 4004), (5000, 9000)]
    picked = np.concatenate([np.arange(*r) for r in ranges])
    rows = picked[: len(picked) // 3 * 3].reshape(-1, 3)  # more rows than one chunk holds
    rows = rows[mask[rows][:, 1:].any(axis=1)]
    layout = data_packing.StreamRows(documents.ends, ranges, 3)
    facts = data_packing.write_blocks(tmp_path, "train", documents, layout)
    np.testing.assert_array_equal(np.load(tmp_path / "train_ids.npy"), ids[rows])
    np.testing.assert_array_equal(
        np.load(tmp_path / "train_labels.npy"), np.where(mask[rows], ids[rows].astype(int), -100)
    )
    assert facts["sequences"] == len(rows)
    assert facts["sequences"] + facts["sequences_without_loss"] == len(picked) // 3


@pytest.mark.parametrize("bos", [False, True])
def test_long_text_in_pieces_has_the_same_ids(bos, monkeypatch):
    tokenizer = make_tokenizer(bos)
    text = "\n".join(make_texts(60)) + "\n\n  indented\n\ttabbed\n\n\nlast line\n"
    pieces = list(data_documents.split_text(text, 100))
    assert len(pieces) > 10
    assert "".join(piece for piece, _, _ in pieces) == text
    assert [first for _, first, _ in pieces] == [True] + [False] * (len(pieces) - 1)
    monkeypatch.setattr(data_documents.split_text, "__defaults__", (100,))
    segments = list(data_documents.tokenize_records([("", {"text": text}), ("", {"text": "more"})], tokenizer, "text"))
    assert sum(segment.ends_document for segment in segments) == 2
    assert np.concatenate([segment.ids for segment in segments]).tolist() == stream(
        [text, "more"], tokenizer, [0] if bos else []
    )


def test_max_tokens_cuts_the_last_document(tmp_path, tokenizer):
    texts = make_texts(50)
    config = make_config(tmp_path, write_texts(tmp_path / "a.jsonl", texts), max_tokens=200, validation_documents=0)
    train, _ = prepare_data(config, tokenizer)
    assert flat(train) == stream(texts, tokenizer)[: 200 // 16 * 16]
    segments = [data_documents.Segment(np.arange(6), None, ends) for ends in (True, False, True)]
    assert data_packing.write_documents(tmp_path, segments, np.dtype(np.uint16), 10)["documents"] == 2
    assert np.load(tmp_path / "ends.npy").tolist() == [6, 10]


def test_items_and_memory_map(tmp_path, tokenizer):
    config = make_config(tmp_path, write_texts(tmp_path / "a.jsonl", make_texts(40)))
    train, _ = prepare_data(config, tokenizer)
    assert isinstance(train.input_ids, np.memmap)
    assert train.input_ids.dtype == np.uint16
    assert not train.input_ids.flags.writeable
    item = train[3]
    assert item["input_ids"].dtype == item["labels"].dtype == torch.int64
    assert item["input_ids"].shape == (16,)
    item["labels"][0] = -100  # an item is a copy
    assert torch.equal(train[3]["labels"], train[3]["input_ids"])
    picked = train[torch.tensor([3, 0])]["input_ids"]
    assert torch.equal(picked, torch.stack([train[3]["input_ids"], train[0]["input_ids"]]))
    batch = next(iter(torch.utils.data.DataLoader(train, batch_size=2)))
    assert torch.equal(batch["input_ids"], train[:2]["input_ids"])
    assert len(list(train)) == len(train)
    with pytest.raises(IndexError):
        train[len(train)]
    made = TokenBlocks(input_ids=torch.arange(8).view(2, 4), labels=torch.full((2, 4), -100))
    assert made[1]["labels"].tolist() == [-100] * 4
    assert data_packing.id_dtype(1 << 16) == np.uint16
    assert data_packing.id_dtype((1 << 16) + 1) == np.uint32


# ---- files


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "json", "json-lines", "parquet", "parquet.gz", "txt", "txt.gz"])
def test_every_kind_of_file_gives_the_same_tokens(tmp_path, tokenizer, kind):
    texts = make_texts(1, length=400) if kind.startswith("txt") else make_texts(20)
    records = [{"text": text, "id": i} for i, text in enumerate(texts)]
    lines = "".join(json.dumps(record) + "\n" for record in records).encode()
    path = tmp_path / f"data.{kind.removesuffix('-lines')}"
    if kind.startswith("parquet"):
        import pyarrow
        from pyarrow import parquet

        sink = pyarrow.BufferOutputStream()
        parquet.write_table(pyarrow.Table.from_pylist(records), sink)
        content = sink.getvalue().to_pybytes()
    else:
        contents = {"txt": texts[0].encode(), "json": json.dumps(records).encode()}
        content = contents.get(kind.removesuffix(".gz"), lines)
    path.write_bytes(gzip.compress(content) if kind.endswith(".gz") else content)
    blocks = load_text_blocks(path, tokenizer, 16)
    expected = stream(texts, tokenizer)
    assert flat(blocks) == expected[: len(expected) // 16 * 16]


def test_lists_patterns_and_folders(tmp_path, tokenizer):
    texts = [f"{text}\n\nA second paragraph of the same document." for text in make_texts(4)]
    for index, text in enumerate(texts):
        (tmp_path / f"{index}.txt").write_text(text)
    (tmp_path / "notes.md").write_text("not data")
    listed = [str(tmp_path / f"{index}.txt") for index in range(4)]
    for dataset in (listed, str(tmp_path / "*.txt"), [listed[0], str(tmp_path / "[1-3].txt")], str(tmp_path)):
        train, _ = prepare_data(make_config(tmp_path, dataset, validation_documents=0), tokenizer)
        assert flat(train) == stream(texts, tokenizer)[: train.tokens]
    reversed_list, _ = prepare_data(make_config(tmp_path, listed[::-1], validation_documents=0), tokenizer)
    assert flat(reversed_list) == stream(texts[::-1], tokenizer)[: reversed_list.tokens]


def test_blank_documents_are_left_out(tmp_path, tokenizer):
    texts = make_texts(6)
    path = write_jsonl(
        tmp_path / "a.jsonl", [{"text": t} for t in ["", *texts[:3], " \n", *texts[3:]]] + [{"text": None}]
    )
    assert (
        flat(load_text_blocks(path, tokenizer, 4))
        == stream(texts, tokenizer)[: len(stream(texts, tokenizer)) // 4 * 4]
    )


def test_hub_dataset(tmp_path, tokenizer, monkeypatch):
    import datasets

    calls = []

    def load_dataset(name, config, *, split, revision):
        calls.append((name, config, split, revision))
        return datasets.Dataset.from_dict({"text": make_texts(30, seed=len(split))})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    config = make_config(tmp_path, "me/texts", dataset_config="en", revision="v1", validation="test")
    train, validation = prepare_data(config, tokenizer)
    assert calls == [("me/texts", "en", "train", "v1"), ("me/texts", "en", "test", "v1")]
    assert flat(train) == stream(make_texts(30, seed=5), tokenizer)[: train.tokens]
    assert flat(validation) == stream(make_texts(30, seed=4), tokenizer)[: validation.tokens]


def test_local_text_needs_neither_datasets_nor_pyarrow(tmp_path, tokenizer, monkeypatch):
    room = sys.modules[data_packing.__package__]
    for name in ("sequences", "documents", "packing", "sources"):
        monkeypatch.setattr(room, name, getattr(room, name))
        monkeypatch.delitem(sys.modules, f"{room.__name__}.{name}")
    for name in ("datasets", "pyarrow", "accelerate"):
        monkeypatch.setitem(sys.modules, name, None)
    fresh = importlib.import_module("linearize.data.sequences")
    path = write_texts(tmp_path / "a.jsonl", make_texts(40))
    train, validation = fresh.prepare_data(make_config(tmp_path, path), tokenizer)
    assert len(train)
    assert len(validation)
    with pytest.raises(UserError, match="needs the package datasets"):
        fresh.prepare_data(make_config(tmp_path, "me/texts"), tokenizer)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match="needs pyarrow"):
        fresh.load_text_blocks(tmp_path / "a.parquet", tokenizer, 16)


# ---- labels


def test_alpaca_prompt_is_read_and_only_the_response_is_learnt(tmp_path):
    tokenizer = make_tokenizer(bos=True)
    records = [
        {"instruction": "Name the river.", "input": "", "output": "The {Ouse}."},
        {"instruction": "Add the numbers.", "input": "1 and 2", "output": "3"},
        {"instruction": "Say it.", "input": None, "output": "It."},
    ]
    path = write_jsonl(tmp_path / "a.jsonl", records)
    train, _ = prepare_data(make_config(tmp_path, path, sequence_length=4, validation_documents=0), tokenizer)
    whole = (
        "<s>Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\nName the river.\n\n### Response:\nThe {Ouse}.</s>"
        "<s>Below is an instruction that describes a task, paired with an input that provides further context. Write "
        "a response that appropriately completes the request.\n\n### Instruction:\nAdd the numbers.\n\n### Input:\n1 "
        "and 2\n\n### Response:\n3</s>"
        "<s>Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\nSay it.\n\n### Response:\nIt.</s>"
    )
    segments = list(
        data_documents.tokenize_records(
            [("", record) for record in records], tokenizer, "instruction", completion_only=True
        )
    )
    ids = np.concatenate([segment.ids for segment in segments])
    learnt = np.concatenate([segment.supervised for segment in segments])
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == whole
    assert tokenizer.decode(ids[learnt]) == "The {Ouse}.</s>3</s>It.</s>"
    # In the sequences: the same labels, without the sequences that hold nothing to learn.
    count = len(ids) // 4
    rows, masks = ids[: count * 4].reshape(count, 4), learnt[: count * 4].reshape(count, 4)
    kept = masks[:, 1:].any(axis=1)
    assert 0 < kept.sum() < count
    np.testing.assert_array_equal(train.input_ids, rows[kept])
    np.testing.assert_array_equal(train.labels, np.where(masks, rows, -100)[kept])
    assert isinstance(train.labels, np.memmap)
    everything, _ = prepare_data(
        make_config(tmp_path, path, sequence_length=4, validation_documents=0, completion_only=False), tokenizer
    )
    assert torch.equal(everything[:]["labels"], everything[:]["input_ids"])
    assert len(everything) == count


@pytest.mark.parametrize("template", [CHATML, CHATML_GENERATION])
def test_chat_loss_is_on_the_assistant(tmp_path, template):
    tokenizer = make_tokenizer(bos=True)
    tokenizer.chat_template = template
    chats = [
        [
            ("system", "Be brief."),
            ("user", "Where to?"),
            ("assistant", "Down."),
            ("user", "Why?"),
            ("assistant", "Water."),
        ],
        [("user", "Hello"), ("assistant", "Hello Ω")],
        [("assistant", "I begin."), ("user", "Fine.")],
    ]
    records = [{"messages": [{"role": role, "content": text} for role, text in chat]} for chat in chats]
    config = make_config(
        tmp_path, write_jsonl(tmp_path / "a.jsonl", records), sequence_length=2, validation_documents=0
    )
    train, _ = prepare_data(config, tokenizer)
    answers = ["Down.<|im_end|>\n", "Water.<|im_end|>\n", "Hello Ω<|im_end|>\n", "I begin.<|im_end|>\n"]
    segments = list(
        data_documents.tokenize_records([("", r) for r in records], tokenizer, "chat", completion_only=True)
    )
    ids = np.concatenate([segment.ids for segment in segments])
    learnt = np.concatenate([segment.supervised for segment in segments])
    rendered = "".join(tokenizer.apply_chat_template(record["messages"], tokenize=False) for record in records)
    assert tokenizer.decode(ids) == rendered
    assert tokenizer.decode(ids[learnt]) == "".join(answers)
    assert (train[:]["labels"][:, 1] != -100).all()
    everything, _ = prepare_data(
        make_config(tmp_path, config.dataset, sequence_length=2, validation_documents=0, completion_only=False),
        tokenizer,
    )
    assert flat(everything) == ids[: everything.tokens].tolist()


def test_both_kinds_of_template_give_the_same_labels():
    tokenizer = make_tokenizer()
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b c"},
        {"role": "user", "content": "d"},
    ]
    masks = []
    for template in (CHATML, CHATML_GENERATION):
        tokenizer.chat_template = template
        (segment,) = data_documents.tokenize_records(
            [("", {"messages": messages})], tokenizer, "chat", completion_only=True
        )
        masks.append(segment.supervised.tolist())
    assert masks[0] == masks[1]
    # Marks are followed where the turns cannot be told apart by rendering some of them.
    last_only = "{% if loop.last %}never{% endif %}{{ m['content'] }}"
    tokenizer.chat_template = CHATML_GENERATION.replace("{{ m['content'] }}", last_only)
    records = [("", {"messages": messages})]
    (segment,) = data_documents.tokenize_records(records, tokenizer, "chat", completion_only=True)
    assert tokenizer.decode(segment.ids[segment.supervised]) == "b c<|im_end|>\n"


@pytest.mark.parametrize(
    ("fields", "format"),
    [
        (["text"], "text"),
        (["messages", "text"], "chat"),
        (["instruction", "input", "output", "text"], "instruction"),
        (["instruction", "text"], "text"),
    ],
)
def test_format_follows_from_the_fields(fields, format):
    source = data.Source("data", "", lambda: iter([("", dict.fromkeys(fields, ""))]))
    assert data_documents.resolve_format(source, "auto", "text", "messages") == format


# ---- split
