"""The truth on a real BERT checkpoint: all-MiniLM-L6-v2, float32, as sentence-transformers saved it."""

import pytest
import torch
from transformers import BertModel

import linearize

TEXTS = [
    "The capital of France is Paris.",
    "Paris, on the river Seine, is where the French government sits.",
    "A cat slept on the warm roof while rain fell on the other side of the valley, and nobody in the house noticed. "
    * 4,
]


@pytest.fixture(scope="module")
def inputs(minilm):
    return linearize.load_tokenizer(minilm)(TEXTS, padding=True, return_tensors="pt")


def embeddings(model, inputs):
    states, real = model(**inputs).last_hidden_state, inputs["attention_mask"][..., None]
    return torch.nn.functional.normalize((states * real).sum(1) / real.sum(1), dim=-1)


@torch.no_grad()
def test_teacher_arm_is_the_stock_model_bit_for_bit(minilm, inputs):
    stock = BertModel.from_pretrained(minilm).eval()
    student = linearize.convert(minilm, {"type": "linear", "window": 8, "sinks": 1})
    assert inputs["input_ids"].shape[1] > 64
    with student.use_arm("teacher"):
        ours, theirs = student(**inputs), stock(**inputs)
    assert torch.equal(ours.last_hidden_state, theirs.last_hidden_state)
    assert torch.equal(ours.pooler_output, theirs.pooler_output)
    expected, untrained = embeddings(stock, inputs), embeddings(student, inputs)
    assert expected[0] @ expected[1] > 0.5 > expected[0] @ expected[2]
    assert (untrained - expected).abs().max() > 1e-3
    assert ((untrained * expected).sum(-1) > 0.5).all()


@torch.no_grad()
def test_equals_softmax_inside_the_window(minilm, inputs):
    stock = BertModel.from_pretrained(minilm).eval()
    student = linearize.convert(minilm, {"type": "linear", "window": 128, "sinks": 0})
    assert (embeddings(student, inputs) - embeddings(stock, inputs)).abs().max() < 1e-5
