"""Data: reading, labels, packing, split and cache, with a tiny tokenizer made in memory."""

import gzip
import importlib
import json
import multiprocessing
import os
import sys
import time
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

import linearize
from linearize import data, data_documents, data_packing
from linearize.data import TokenBlocks, epoch_order, load_text_blocks, prepare_data
from linearize.errors import UserError
from linearize.settings import DataConfig

WORDS = [
    "the",
    "river",
    "ran",
    "over",
    "its",
    "bed",
    "of",
    "stones",
    "and",
    "nobody",
    "knew",
    "where",
    "it",
    "would",
    "stop",
    "so",
    "we",
    "followed",
    "it",
    "down",
]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHATML_GENERATION = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] }}<|im_end|>\n{% endgeneration %}{% else %}{{ m['content'] }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Leaves out what assistants said before the last turn, as templates of reasoning models leave out thoughts.
CHATML_FORGETFUL = CHATML.replace("{{ m['content'] }}", "{% if loop.last %}{{ m['content'] }}{% endif %}")


def make_tokenizer(bos: bool = False, text: str = " ".join(WORDS)) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([text], trainer)
    if bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def make_texts(count: int, seed: int = 0, length: int = 30) -> list[str]:
    """Texts that differ from each other."""
    rng = np.random.default_rng(seed)
    return [f"{seed} {i} " + " ".join(rng.choice(WORDS, size=rng.integers(3, length))) for i in range(count)]


def write_jsonl(path: Path, records: list[dict]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def write_texts(path: Path, texts: list[str]) -> str:
    return write_jsonl(path, [{"text": text} for text in texts])


def make_config(tmp_path, dataset, **changes) -> DataConfig:
    return DataConfig(dataset=dataset, **{"sequence_length": 16, "cache_dir": str(tmp_path / "cache"), **changes})


def stream(texts, tokenizer, bos=()) -> list[int]:
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return list(chain.from_iterable([*bos, *document, tokenizer.eos_token_id] for document in ids))


def flat(blocks: TokenBlocks) -> list[int]:
    return np.asarray(blocks.input_ids).reshape(-1).tolist()


def supervised_text(blocks: TokenBlocks, tokenizer) -> str:
    labels = blocks[:]["labels"]
    return tokenizer.decode(labels[labels != -100], skip_special_tokens=False)


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
    facts = data_packing.write_blocks(tmp_path, "train", documents, ranges, 3)
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
    for name in ("data", "data_documents", "data_packing", "data_sources"):
        monkeypatch.setattr(linearize, name, getattr(linearize, name))
        monkeypatch.delitem(sys.modules, f"linearize.{name}")
    for name in ("datasets", "pyarrow", "accelerate"):
        monkeypatch.setitem(sys.modules, name, None)
    fresh = importlib.import_module("linearize.data")
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


def documents_of(lengths: list[int]) -> data_packing.Documents:
    """Documents of different tokens."""
    return data_packing.Documents(np.arange(sum(lengths)), None, np.cumsum(lengths))


def tokens_of(ranges) -> set[int]:
    return set(chain.from_iterable(range(*r) for r in ranges))


def test_split_takes_whole_documents_and_is_disjoint():
    documents = documents_of([7 + i % 5 for i in range(300)])
    train, validation = data_packing.split_documents(documents, 16, 20)
    held_out = {i for i in range(300) if documents.starts[i] in tokens_of(validation)}
    assert len(held_out) == 20
    assert tokens_of(validation) == tokens_of([(documents.starts[i], documents.ends[i]) for i in held_out])
    assert tokens_of(train) == set(range(len(documents.ids))) - tokens_of(validation)
    assert data_packing.split_documents(documents, 16, 20) == (train, validation)


def test_split_takes_at_most_a_tenth_but_one_sequence():
    documents = documents_of([10] * 100)
    assert len(tokens_of(data_packing.split_documents(documents, 16, 200)[1])) == 100
    assert len(tokens_of(data_packing.split_documents(documents, 256, 5)[1])) == 260


@pytest.mark.parametrize("lengths", [[1000], [400, 400, 200], [995, *[1] * 5], [10] * 9])
def test_few_documents_give_their_end(lengths):
    documents = documents_of(lengths)
    total = sum(lengths)
    train, validation = data_packing.split_documents(documents, 16, 200)
    sequences = max(1, total // 16 // 10)
    assert validation == [(total - 16 * sequences, total)]
    assert train == [(0, total - 16 * sequences)]


def test_one_long_text_file(tmp_path, tokenizer):
    (tmp_path / "book.txt").write_text("\n\n".join(make_texts(50)))
    train, validation = prepare_data(make_config(tmp_path, str(tmp_path / "book.txt")), tokenizer)
    whole = stream([(tmp_path / "book.txt").read_text()], tokenizer)
    assert len(validation) == len(whole) // 16 // 10
    assert flat(validation) == whole[-validation.tokens :]
    assert flat(train) == whole[: train.tokens]
    assert 0 <= len(whole) - validation.tokens - train.tokens < 16


def test_split_does_not_depend_on_the_seed_of_the_run(tmp_path, tokenizer):
    path = write_texts(tmp_path / "a.jsonl", make_texts(60))
    first = prepare_data(make_config(tmp_path, path), tokenizer, seed=1)
    second = prepare_data(make_config(tmp_path, path, cache_dir=str(tmp_path / "other")), tokenizer, seed=2)
    for ours, theirs in zip(first, second, strict=True):
        assert flat(ours) == flat(theirs)


def test_documents_equal_to_validation_documents_are_not_trained_on(tmp_path, tokenizer):
    texts = make_texts(30)
    given = write_texts(tmp_path / "val.jsonl", [texts[7], texts[20]])
    config = make_config(
        tmp_path, write_texts(tmp_path / "a.jsonl", [*texts, texts[7]]), validation=given, sequence_length=4
    )
    train, _ = prepare_data(config, tokenizer)
    rest = [text for text in texts if text not in (texts[7], texts[20])]
    assert flat(train) == stream(rest, tokenizer)[: train.tokens]
    # carved off: each document stands twice in the data
    twice = documents_of([5 + i % 3 for i in range(100)])
    documents = data_packing.Documents(
        np.concatenate([twice.ids, twice.ids]), None, np.concatenate([twice.ends, twice.ends + twice.ends[-1]])
    )
    train_ranges, validation_ranges = data_packing.split_documents(documents, 16, 10)
    in_train = {documents.ids[i] for i in tokens_of(train_ranges)}
    assert in_train.isdisjoint({documents.ids[i] for i in tokens_of(validation_ranges)})


# ---- cache


@pytest.fixture
def count_builds(monkeypatch):
    """Tokenisations and packings done so far."""
    counts = {"documents": 0, "blocks": 0}
    for name in counts:
        original = getattr(data_packing, f"write_{name}")

        def counted(*args, original=original, name=name, **kwargs):
            counts[name] += 1
            return original(*args, **kwargs)

        monkeypatch.setattr(data_packing, f"write_{name}", counted)
    return counts


def test_second_run_reads_the_cache(tmp_path, tokenizer, count_builds):
    path = write_texts(tmp_path / "a.jsonl", make_texts(40))
    first = prepare_data(make_config(tmp_path, path), tokenizer)
    tokenizer("a call that cuts", truncation=True, max_length=2)  # leaves its mark in the tokenizer
    moved = str(tmp_path / "moved.jsonl")
    os.replace(path, moved)
    second = prepare_data(make_config(tmp_path, moved), tokenizer)
    assert count_builds == {"documents": 1, "blocks": 2}
    for ours, theirs in zip(first, second, strict=True):
        assert flat(ours) == flat(theirs)


def test_another_length_is_packed_but_not_tokenised_again(tmp_path, tokenizer, count_builds):
    path = write_texts(tmp_path / "a.jsonl", make_texts(40))
    prepare_data(make_config(tmp_path, path), tokenizer)
    train, _ = prepare_data(make_config(tmp_path, path, sequence_length=8), tokenizer)
    assert train.sequence_length == 8
    assert count_builds == {"documents": 1, "blocks": 4}
    without, _ = prepare_data(make_config(tmp_path, path, validation_documents=0), tokenizer)
    assert without.tokens > train.tokens
    assert count_builds == {"documents": 1, "blocks": 6}


@pytest.mark.parametrize(
    "change", ["data", "tokenizer", "token added", "field", "max_tokens", "bos", "completion_only", "schema"]
)
def test_any_change_that_matters_builds_anew(tmp_path, monkeypatch, count_builds, change):
    tokenizer = make_tokenizer()
    texts = make_texts(40)
    records = [{"text": text, "body": text, "instruction": text, "output": text} for text in texts]
    path = write_jsonl(tmp_path / "a.jsonl", records)
    config = make_config(tmp_path, path, format="instruction" if change == "completion_only" else "text")
    prepare_data(config, tokenizer)
    if change == "data":  # same size and time stamp
        before = os.stat(path)
        path = write_jsonl(tmp_path / "a.jsonl", [*records[:-1], {**records[-1], "text": texts[-1][::-1]}])
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        assert os.stat(path).st_size == before.st_size
    elif change == "tokenizer":
        tokenizer = make_tokenizer(text="stones stones stones over over over")
    elif change == "token added":
        tokenizer.add_tokens(["river"])
    elif change == "bos":
        tokenizer = make_tokenizer(bos=True)
    elif change == "field":
        config.text_field = "body"
    elif change == "max_tokens":
        config.max_tokens = 300
    elif change == "completion_only":
        config.completion_only = False
    else:
        monkeypatch.setattr(data_packing, "SCHEMA_VERSION", data_packing.SCHEMA_VERSION + 1)
    train, _ = prepare_data(config, tokenizer)
    assert count_builds == {"documents": 2, "blocks": 4}
    if change == "token added":
        assert np.isin(len(tokenizer) - 1, train.input_ids)


def test_chat_template_is_part_of_the_key(tmp_path, count_builds):
    tokenizer = make_tokenizer()
    messages = [{"role": "user", "content": "a b c d e"}, {"role": "assistant", "content": "b c d e f"}]
    path = write_jsonl(tmp_path / "a.jsonl", [{"messages": messages}] * 20)
    tokenizer.chat_template = CHATML
    prepare_data(make_config(tmp_path, path), tokenizer)
    tokenizer.chat_template = CHATML.replace("\n", " ")
    prepare_data(make_config(tmp_path, path), tokenizer)
    assert count_builds["documents"] == 2


@pytest.mark.parametrize("damage", ["cut", "lost file", "no manifest", "manifest cut"])
def test_damaged_entries_are_built_anew(tmp_path, tokenizer, count_builds, damage):
    config = make_config(tmp_path, write_texts(tmp_path / "a.jsonl", make_texts(40)))
    expected = [flat(blocks) for blocks in prepare_data(config, tokenizer)]
    for entry in (tmp_path / "cache").iterdir():
        file = max(entry.iterdir(), key=lambda path: path.stat().st_size * (path.suffix in (".npy", ".bin")))
        if damage == "cut":
            os.truncate(file, file.stat().st_size - 2)
        elif damage == "lost file":
            file.unlink()
        elif damage == "no manifest":
            (entry / "manifest.json").unlink()
        else:
            os.truncate(entry / "manifest.json", 10)
    assert [flat(blocks) for blocks in prepare_data(config, tokenizer)] == expected
    assert count_builds == {"documents": 2, "blocks": 4}
    assert all(data_packing.read_manifest(entry) for entry in (tmp_path / "cache").iterdir())


@pytest.mark.parametrize("stage", ["write_documents", "write_blocks", "_write_manifest", "_move_into_place"])
def test_killed_build_is_not_taken_for_complete(tmp_path, tokenizer, stage):
    """Kill a build with SIGKILL in each of its phases; the next one starts anew and gives the right result."""
    texts = make_texts(40)
    path = write_texts(tmp_path / "a.jsonl", texts)
    config = make_config(tmp_path, path)
    child = os.fork()
    if child == 0:
        original = getattr(data_packing, stage)

        def killed(*args, **kwargs):
            if stage != "_move_into_place":
                original(*args, **kwargs)
            os.kill(os.getpid(), 9)

        setattr(data_packing, stage, killed)
        prepare_data(config, tokenizer)
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == 9
    leftovers = list((tmp_path / "cache").glob("*.tmp"))
    assert len(leftovers) == 1
    train, validation = prepare_data(config, tokenizer)
    reference = prepare_data(make_config(tmp_path, path, cache_dir=str(tmp_path / "clean")), tokenizer)
    assert [flat(train), flat(validation)] == [flat(blocks) for blocks in reference]
    # What was left goes once it is too old to belong to a running build; other people's folders stay.
    for folder in (leftovers[0], tmp_path / "cache" / "mine.tmp"):
        folder.mkdir(exist_ok=True)
        for file in (*folder.iterdir(), folder):
            os.utime(file, (0, 0))
    prepare_data(make_config(tmp_path, path, sequence_length=4), tokenizer)
    assert [folder.name for folder in (tmp_path / "cache").glob("*.tmp")] == ["mine.tmp"]


def test_failed_build_leaves_nothing(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "a"}, {"text": 5}])
    with pytest.raises(UserError, match="is a int"):
        prepare_data(make_config(tmp_path, path), tokenizer)
    assert list((tmp_path / "cache").iterdir()) == []


def test_cache_that_cannot_be_written(tmp_path, tokenizer):
    (tmp_path / "cache").write_text("a file, not a folder")
    with pytest.raises(UserError, match=r"cannot be written to .*cache_dir"):
        prepare_data(make_config(tmp_path, write_texts(tmp_path / "a.jsonl", make_texts(40))), tokenizer)


def test_only_the_main_process_builds(tmp_path, tokenizer):
    """Two processes, in the same state as two that a launcher starts."""
    config = make_config(tmp_path, write_texts(tmp_path / "a.jsonl", make_texts(40)))

    def work(rank: int) -> None:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", ACCELERATE_USE_CPU="1")
        torch.distributed.init_process_group("gloo", f"file://{tmp_path}/rendezvous", rank=rank, world_size=2)
        write = data_packing.write_documents

        def noted(*args):
            (tmp_path / f"built-by-{rank}").touch()
            time.sleep(0.2)
            return write(*args)

        data_packing.write_documents = noted
        train, _ = prepare_data(config, tokenizer)
        (tmp_path / f"length-{rank}").write_text(str(len(train)))
        config.dataset = str(tmp_path / "none.txt")
        try:
            prepare_data(config, tokenizer)
        except UserError as error:
            (tmp_path / f"error-{rank}").write_text(str(error))

    processes = [multiprocessing.get_context("fork").Process(target=work, args=(rank,)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=30)
        process.kill()
    assert [process.exitcode for process in processes] == [0, 0]
    assert [path.name for path in tmp_path.glob("built-by-*")] == ["built-by-0"]
    assert (tmp_path / "length-0").read_text() == (tmp_path / "length-1").read_text() > "0"
    assert all("does not exist" in (tmp_path / f"error-{rank}").read_text() for rank in range(2))
    assert (tmp_path / "error-1").read_text().startswith("The main process")


# ---- errors


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
        ({}, "neither 'text' nor 'messages' nor instruction and output; its fields are body, title"),
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
    fails([{"from": "human", "value": "hello"}], "lacks role or content")
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
