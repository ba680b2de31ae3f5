"""What a student owes on every backbone: the teacher where it must be it, and one result by every way of feeding."""

import copy
import functools

import pytest
import torch
from tiny_models import TINY, make_gpt2, make_gptj, make_mistral, make_student, make_teacher, perturb
from transformers import DynamicCache, GenerationConfig

TEACHERS = {"llama": make_teacher, "gpt2": make_gpt2, "gptj": make_gptj, "mistral": make_mistral}
SMALL_CELL = {"tile": 4, "leak": 0.01, "score_saturation": 4.0, "output_saturation": 4.0}
MODELS = {
    "hybrid": ({"linear": {"type": "linear", "window": 5, "sinks": 2}}, None),
    "published": (
        {
            "linear": {
                "type": "linear",
                "window": 5,
                "sinks": 0,
                "window_reference": "max",
                "window_shift": None,
                "window_weight_form": "sigmoid",
                "window_weight": 0.1,
                "magnitude": False,
            }
        },
        None,
    ),
    "salient": (
        {"salient": {"type": "salient", "window": 4, "sinks": 2, "kept_tokens": 3, "age_penalty": 30.0}},
        ["salient", "softmax", "salient"],
    ),
    "pure-linear": ({"linear": {"type": "linear", "window": 0, "sinks": 0, "feature_map": "exp"}}, None),
    "sinks-only": ({"linear": {"type": "linear", "window": 0, "sinks": 3, "feature_map": "elu"}}, None),
    "shared-key-map": (
        {"linear": {"type": "linear", "window": 5, "share_key_map": True, "feature_map": "relu"}},
        None,
    ),
    "softmax-layer-between": (
        {"linear": {"type": "linear", "window": 5, "sinks": 2}},
        ["linear", "softmax", "linear"],
    ),
    "softmax-layers-around": ({"linear": {"type": "linear", "window": 5}}, ["softmax", "linear", "softmax"]),
    "projections": ({"linear": {"type": "linear", "window": 5, "sinks": 2, "map_input": "projections"}}, None),
    "gates": (
        {
            "head": {"type": "linear", "window": 0, "sinks": 0, "gate": "head", "gate_bias": 1.0},
            "token": {"type": "linear", "window": 5, "map_input": "projections", "gate": "token", "gate_bias": 0.5},
            "key": {"type": "linear", "window": 3, "share_key_map": True, "gate": "key", "gate_bias": 1.0},
        },
        ["head", "token", "key"],
    ),
    "two-windows": (
        {"near": {"type": "linear", "window": 3}, "far": {"type": "linear", "window": 9, "bias": True}},
        ["near", "far", "near"],
    ),
    "gain-cell": ({"gain_cell": {"type": "gain_cell", "window": 12, "cell": SMALL_CELL}}, None),
    "gain-cell-mixed": (
        {
            "gain_cell": {"type": "gain_cell", "window": 8, "cell": SMALL_CELL},
            "linear": {"type": "linear", "window": 5, "sinks": 2},
        },
        ["gain_cell", "softmax", "linear"],
    ),
    "cosine": ({"cosine": {"type": "cosine", "window": 5, "sinks": 2}}, None),
    "cosine-pure": ({"cosine": {"type": "cosine", "window": 0, "sinks": 0}}, None),
    "cosine-published": (
        {"cosine": {"type": "cosine", "window": 0, "sinks": 0, "scale_side": "key", "gain": False}},
        None,
    ),
    "cosine-maps": (
        {
            "near": {"type": "cosine", "window": 5, "sinks": 0, "feature_map": "softmax", "feature_dim": 8},
            "far": {"type": "cosine", "window": 0, "sinks": 3, "feature_map": "projection", "bias": True},
            "key": {"type": "cosine", "window": 4, "sinks": 1, "feature_map": "elu", "scale_side": "key"},
        },
        ["near", "far", "key"],
    ),
    "cosine-gates": (
        {
            "head": {"type": "cosine", "window": 0, "sinks": 0, "gate": "head", "gate_bias": 1.0},
            "token": {"type": "cosine", "window": 5, "directions": "projections", "gate": "token", "gate_bias": 0.5},
            "key": {"type": "cosine", "window": 3, "scale_side": "key", "gate": "key", "gate_bias": 1.0},
        },
        ["head", "token", "key"],
    ),
    "cosine-between": (
        {"cosine": {"type": "cosine", "window": 5, "sinks": 2}, "linear": {"type": "linear", "window": 3}},
        ["linear", "softmax", "cosine"],
    ),
    "landmark": ({"landmark": {"type": "landmark", "block_size": 4, "top_k": 2}}, None),
    "landmark-few-blocks": (
        {
            "near": {"type": "landmark", "block_size": 3, "top_k": 2, "max_blocks": 4, "offload": True},
            "far": {"type": "landmark", "block_size": 3, "top_k": 20},
        },
        ["near", "far", "near"],
    ),
}


@functools.cache
def build(backbone, name):
    student = make_student(TEACHERS[backbone](), *MODELS[name])
    perturb(student)
    return student.double() if "gain-cell" in name else student  # levels turn rounding into whole steps


@pytest.fixture(params=TEACHERS)
def backbone(request):
    return request.param


@pytest.fixture
def teacher(backbone):
    return TEACHERS[backbone]()


@pytest.fixture(params=MODELS)
def model(request, backbone):
    return copy.deepcopy(build(backbone, request.param))


@pytest.fixture
def ids():
    return torch.randint(3, TINY["vocab_size"], (2, 23), generator=torch.Generator().manual_seed(3))


def close(left, right):
    return (left - right).abs().max() <= 1e-5


@torch.no_grad()
def test_prefill_and_decode_equal_the_full_forward(model, ids):
    full = model(ids).logits
    for cuts in ([7, 1, 12, 1, 2], [1] * 23, [22, 1]):
        cache, outputs, start = DynamicCache(config=model.config), [], 0
        for tokens in cuts:
            outputs.append(model(ids[:, start : start + tokens], past_key_values=cache, use_cache=True).logits)
            start += tokens
        assert close(torch.cat(outputs, 1), full)
        assert cache.get_seq_length() == 23


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_matter(model, ids, side):
    full = model(ids).logits
    gap = torch.zeros(2, 4, dtype=torch.long)
    padded = torch.cat([gap, ids] if side == "left" else [ids, gap], 1)
    mask = torch.cat([gap, torch.ones_like(ids)] if side == "left" else [torch.ones_like(ids), gap], 1)
    real = slice(4, None) if side == "left" else slice(0, -4)
    assert close(model(padded, attention_mask=mask).logits[:, real], full)


@torch.no_grad()
def test_left_padded_batch_token_by_token(model, ids):
    full = model(ids).logits
    lengths = (23, 17)
    mask = torch.stack([torch.arange(23) >= 23 - n for n in lengths]).long()
    pad = [torch.zeros(23 - n, dtype=torch.long) for n in lengths]
    batch = torch.stack([torch.cat([gap, row[:n]]) for gap, row, n in zip(pad, ids, lengths, strict=True)])
    cache = DynamicCache(config=model.config)
    steps = [
        model(batch[:, i : i + 1], attention_mask=mask[:, : i + 1], past_key_values=cache, use_cache=True).logits
        for i in range(23)
    ]
    logits = torch.cat(steps, 1)
    for row, n in enumerate(lengths):
        assert close(logits[row, 23 - n :], full[row, :n])


@torch.no_grad()
def test_reset_and_a_second_prompt_on_the_same_cache(model, ids):
    cache = DynamicCache(config=model.config)
    model(ids.flip(1), past_key_values=cache, use_cache=True)
    cache.reset()
    assert close(model(ids, past_key_values=cache, use_cache=True).logits, model(ids).logits)
    follow = ids[:, :6]
    again = model(follow, past_key_values=cache, use_cache=True).logits
    assert close(again, model(torch.cat([ids, follow], 1)).logits[:, 23:])


@torch.no_grad()
@pytest.mark.parametrize(
    "options",
    [{"num_beams": 3, "num_return_sequences": 2}, {"do_sample": True, "num_return_sequences": 2}],
    ids=["beams", "sampling"],
)
def test_generation_with_and_without_cache(model, ids, options):
    model.double()
    results = []
    for use_cache in (True, False):
        torch.manual_seed(0)
        results.append(model.generate(ids, max_new_tokens=7, use_cache=use_cache, **{"do_sample": False, **options}))
    assert torch.equal(*results)


@torch.no_grad()
def test_left_padded_generation_equals_single(model, ids):
    model.double()
    batch, mask = ids.clone(), torch.ones_like(ids)
    batch[1, :6], mask[1, :6] = 0, 0
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    together = model.generate(batch, attention_mask=mask, **options)
    alone = model.generate(ids[1:, 6:], **options)
    assert torch.equal(together[1, 23:], alone[0, 17:])


@torch.no_grad()
def test_chunked_prefill_in_generate(model, ids):
    plain = model.generate(ids, max_new_tokens=5, do_sample=False)
    config = GenerationConfig(max_new_tokens=5, do_sample=False, prefill_chunk_size=7, eos_token_id=2, pad_token_id=0)
    assert torch.equal(model.generate(ids, generation_config=config), plain)


@torch.no_grad()
def test_later_tokens_do_not_change_earlier_logits(model, ids):
    assert close(model(ids).logits[:, :11], model(ids[:, :11]).logits)


@torch.no_grad()
def test_teacher_arm_generates_like_the_teacher(teacher, student, ids):
    with student.use_arm("teacher"):
        ours = student.generate(ids, max_new_tokens=8, do_sample=False, past_key_values=DynamicCache())
    assert torch.equal(ours, teacher.generate(ids, max_new_tokens=8, do_sample=False))
    assert {attention.arm for attention in student.mixer_attentions()} == {"mixed"}


@torch.no_grad()
def test_mechanism_stays_float32(teacher, tmp_path, ids):
    """From a stock bf16 checkpoint, where every key of the mechanism is missing, and from a saved student."""
    import linearize

    teacher.to(torch.bfloat16).save_pretrained(tmp_path / "teacher")
    student = linearize.convert(tmp_path / "teacher", {"type": "linear", "window": 5})
    perturb(student)
    student.save_pretrained(tmp_path / "student")
    loaded = linearize.load_student(tmp_path / "student", dtype=torch.bfloat16)
    for model in (student, loaded):
        kinds = {(".mixer." in name, parameter.dtype) for name, parameter in model.named_parameters()}
        assert kinds == {(True, torch.float32), (False, torch.bfloat16)}
    assert torch.equal(loaded(ids).logits, student(ids).logits)


def test_gradient_checkpointing_gives_equal_gradients(student, ids):
    from linearize.stages.finetuning import gradient_checkpointing

    gradients = []
    for checkpointing in (False, True):
        student.zero_grad()
        student.train()
        with gradient_checkpointing(student, checkpointing):
            student(ids, labels=ids).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() and any(".mixer." in name for name in gradients[0])
    for name, gradient in gradients[0].items():
        assert torch.allclose(gradient, gradients[1][name], atol=1e-6), name


def test_a_wrong_cache_is_named(student, ids):
    with pytest.raises(ValueError, match="DynamicCache\\(config=model.config\\)"):
        student(ids, past_key_values=DynamicCache(), use_cache=True)
