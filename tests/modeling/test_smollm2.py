"""The truth on a real Llama checkpoint: SmolLM2-135M-Instruct, float32, grouped heads, tied embeddings."""

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

import linearize

PROMPT = "The capital of France is"


@pytest.fixture(scope="module")
def student(smollm2):
    return linearize.convert(smollm2, {"type": "linear", "window": 16, "sinks": 4}, dtype=torch.float32)


@pytest.fixture(scope="module")
def tokenizer(smollm2):
    return linearize.load_tokenizer(smollm2)


@pytest.mark.slow
@torch.no_grad()
def test_teacher_arm_is_the_stock_model_bit_for_bit(student, smollm2, tokenizer):
    stock = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    ids = tokenizer(PROMPT * 8, return_tensors="pt").input_ids
    with student.use_arm("teacher"):
        assert torch.equal(student(ids).logits, stock(ids).logits)
    reply = stock.generate(ids[:, :5], max_new_tokens=6, do_sample=False)
    with student.use_arm("teacher"):
        ours = student.generate(ids[:, :5], max_new_tokens=6, do_sample=False, past_key_values=DynamicCache())
    assert torch.equal(reply, ours) and "Paris" in tokenizer.decode(ours[0])


@torch.no_grad()
def test_equals_softmax_inside_the_window(student, tokenizer):
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    assert ids.shape[1] <= 16
    with student.use_arm("teacher"):
        expected = student(ids).logits
    assert (student(ids).logits - expected).abs().max() <= 1e-3 * expected.abs().max()


@pytest.mark.slow
@torch.no_grad()
def test_left_padded_decode_equals_the_full_forward(student, tokenizer):
    tokenizer.padding_side = "left"
    texts = [PROMPT * 6, PROMPT * 9]
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    full = student(**batch).logits
    cache, cut = DynamicCache(config=student.config), batch.input_ids.shape[1] - 3
    prefill = student(batch.input_ids[:, :cut], batch.attention_mask[:, :cut], past_key_values=cache, use_cache=True)
    outputs = [prefill.logits]
    for i in range(cut, cut + 3):
        mask = batch.attention_mask[:, : i + 1]
        step = student(batch.input_ids[:, i : i + 1], mask, past_key_values=cache, use_cache=True)
        outputs.append(step.logits)
    real = batch.attention_mask.bool()
    scale = full.abs().max()
    assert (torch.cat(outputs, 1)[real] - full[real]).abs().max() <= 1e-4 * scale
    alone = student(**tokenizer(texts[0], return_tensors="pt")).logits[0]
    assert (full[0, -alone.shape[0] :] - alone).abs().max() <= 1e-4 * scale


@pytest.mark.slow
@torch.no_grad()
def test_a_gguf_file_gives_the_same_student(student, smollm2, tokenizer):
    file = smollm2.with_name(smollm2.name + ".gguf")
    from_file = linearize.convert(file, {"type": "linear", "window": 16, "sinks": 4}, dtype=torch.float32)
    ids = tokenizer(PROMPT * 6, return_tensors="pt").input_ids
    assert torch.equal(from_file(ids).logits, student(ids).logits)
    assert linearize.load_tokenizer(file)(PROMPT).input_ids == tokenizer(PROMPT).input_ids
