"""Data: disjoint splits, and a cache that is never stale, half-written or built twice."""

import multiprocessing
import os
import time
from itertools import chain

import numpy as np
import pytest
import torch
from data_toys import CHATML, flat, make_config, make_texts, make_tokenizer, stream, write_jsonl, write_texts

from linearize.data import packing as data_packing
from linearize.data import prepare_data
from linearize.errors import UserError


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


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


@pytest.mark.parametrize("damage", ["cut", "flipped byte", "lost file", "no manifest", "manifest cut"])
def test_damaged_entries_are_built_anew(tmp_path, tokenizer, count_builds, damage):
    config = make_config(tmp_path, write_texts(tmp_path / "a.jsonl", make_texts(40)))
    expected = [flat(blocks) for blocks in prepare_data(config, tokenizer)]
    for entry in (tmp_path / "cache").iterdir():
        file = max(entry.iterdir(), key=lambda path: path.stat().st_size * (path.suffix in (".npy", ".bin")))
        if damage == "cut":
            os.truncate(file, file.stat().st_size - 2)
        elif damage == "flipped byte":
            content = bytearray(file.read_bytes())
            content[len(content) // 2] ^= 1
            file.write_bytes(content)
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
