import itertools
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

SCRIPTS = Path(__file__).parents[2] / "scripts"
LENGTH, COUNT = 1100, 6


class Words:
    """A tokenizer of one token a character, with words of five letters besides."""

    def __init__(self, words: int = 1200):
        letters = itertools.islice(itertools.product("abcdefghij", repeat=5), words)
        self.vocabulary = {f"Ġ{''.join(word)}": 200 + i for i, word in enumerate(letters)}

    def get_vocab(self):
        return self.vocabulary

    def __call__(self, text, add_special_tokens):
        assert not add_special_tokens
        return SimpleNamespace(input_ids=[ord(letter) for letter in text])


@pytest.fixture
def recall(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    import recall_tasks

    yield recall_tasks
    del sys.modules["recall_tasks"]


@pytest.fixture
def items(recall):
    text = np.full(5000, 150, np.uint16)
    return recall.tasks(Words(), text, LENGTH, COUNT, seed=3)


def test_items_are_whole_and_paired(recall, items):
    text = np.full(5000, 150, np.uint16)
    again, other = (recall.tasks(Words(), text, LENGTH, COUNT, seed=seed) for seed in (3, 4))
    assert tuple(items) == recall.NAMES
    for name, (ids, answers) in items.items():
        assert ids.shape == answers.shape == (COUNT, LENGTH)
        assert ids.dtype == torch.int64 and answers.dtype == torch.bool
        assert torch.equal(ids, again[name][0]) and not torch.equal(ids, other[name][0])


def test_answers_of_association_were_said_far_before(recall, items):
    ids, answers = items["association"]
    assert (answers.sum(1) == 8).all()
    for row, asked in zip(ids.tolist(), answers, strict=True):
        for place in asked.nonzero()[:, 0].tolist():
            pair = row[place - 2 : place + 1]  # key, colon, value
            said = [i for i in range(place - 2) if row[i : i + 3] == pair]
            assert len(said) == 1 and place - said[0] >= recall.FAR
            assert row.count(pair[2]) == 2  # no other word tells it


def test_answers_of_copying_were_said_far_before(recall, items):
    ids, answers = items["copying"]
    assert (answers.sum(1) == recall.SPAN - recall.CUE).all()
    for row, asked in zip(ids.tolist(), answers, strict=True):
        for place in asked.nonzero()[:, 0].tolist():
            earlier = row.index(row[place])
            assert place - earlier >= recall.FAR and row[earlier - 1] == row[place - 1]


def test_passkeys_lie_at_every_depth(recall, items):
    ids, answers = items["passkey"]
    assert (answers.sum(1) == 5).all()
    places = []
    for row, asked in zip(ids.tolist(), answers, strict=True):
        key = [row[i] for i in asked.nonzero()[:, 0].tolist()]
        assert all(48 <= digit < 58 for digit in key)
        said = [i for i in range(LENGTH - 5) if row[i : i + 5] == key]
        assert len(said) == 2 and LENGTH - 5 - said[1] >= recall.FAR
        places.append(said[0])
    assert places[0] == places[5] and len(set(places)) == recall.DEPTHS and places[:5] == sorted(places[:5])


def test_accuracy_counts_answers_alone(recall, items):
    ids, answers = items["association"]
    right = ids.roll(-1, 1)
    assert recall.accuracy(right, ids, answers).tolist() == [1.0] * COUNT
    wrong = right.clone()
    wrong[:, -2] = 0  # foretells the last token, an answer
    wrong[:, 0] = 0
    assert recall.accuracy(wrong, ids, answers).tolist() == [0.875] * COUNT
    logits = torch.nn.functional.one_hot(wrong, 1400).float()
    assert recall.accuracy(logits, ids, answers).tolist() == [0.875] * COUNT


@pytest.mark.parametrize(
    "words, tokens, length, told", [(1200, 900, 1024, "900"), (1200, 900, 512, "512"), (20, 2000, 1024, "20 words")]
)
def test_what_cannot_be_made_is_refused(recall, words, tokens, length, told):
    with pytest.raises(ValueError, match=told):
        recall.tasks(Words(words), np.zeros(tokens), length, 1)
