"""The GPT-2 student: learned positions, Conv1D projections, its own scalings; test_students.py has the rest."""

import json

import pytest
import torch
from tiny_models import TINY_GPT2, make_gpt2, make_student, perturb
from torch.nn import functional
from transformers import AutoModelForCausalLM, DynamicCache, GPT2LMHeadModel

import linearize
from linearize.modeling import LinearizedGPT2Config
from linearize.modeling.cache_names import named
from linearize.modeling.decoding import DecodingSession

MIXERS = {"linear": {"type": "linear", "window": 5, "sinks": 2}}
GREEDY = {"max_new_tokens": 8, "do_sample": False}
SHAPES = {
    "stock": {},
    "inverse-layer-scaling": {"scale_attn_by_inverse_layer_idx": True},
    "unscaled": {"scale_attn_weights": False},
    "inner-width": {"n_inner": 40},
    "relu": {"activation_function": "relu"},
    "untied": {"tie_word_embeddings": False},
}


@pytest.fixture(params=[None, ["linear", "softmax", "linear"]], ids=["all", "some"])
def student(request):
    model = make_student(make_gpt2(), MIXERS, request.param)
    perturb(model)
    return model


@pytest.fixture
def ids():
    return torch.randint(3, TINY_GPT2["vocab_size"], (2, 23), generator=torch.Generator().manual_seed(3))


def close(left, right):
    return (left - right).abs().max() <= 1e-5


@torch.no_grad()
@pytest.mark.parametrize("shape", SHAPES)
def test_every_gpt2_shape_converts(shape, ids, tmp_path):
    """Through files: the teacher arm is the teacher bit for bit, and so is a window over everything, nearly."""
    teacher = make_gpt2(**SHAPES[shape])
    teacher.save_pretrained(tmp_path / "teacher")
    student = linearize.convert(tmp_path / "teacher", {"type": "linear", "window": 32})
    expected = teacher(ids).logits
    with student.use_arm("teacher"):
        assert torch.equal(student(ids).logits, expected)
    assert close(student(ids).logits, expected)
    new = set(student.state_dict()) - set(teacher.state_dict())
    assert new == set(student.mixer_state_dict()) != set()
    student = linearize.convert(tmp_path / "teacher", MIXERS["linear"])
    perturb(student)
    student.save_pretrained(tmp_path / "student")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    assert torch.equal(loaded(ids).logits, student(ids).logits)
    assert not close(loaded(ids).logits, expected)
    assert (loaded.lm_head.weight is loaded.transformer.wte.weight) == (shape != "untied")


@torch.no_grad()
def test_the_form_of_the_original_checkpoint_loads(ids, tmp_path):
    """A model with a head, by its config, saved without it: names lack their prefix; with the masks of old ones."""
    teacher = make_gpt2()
    for block in teacher.transformer.h:
        block.attn.register_buffer("bias", torch.ones(1, 1, 256, 256).tril().bool())
        block.attn.register_buffer("masked_bias", torch.tensor(-1e4))
    teacher.transformer.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": ["GPT2LMHeadModel"]}))
    student = linearize.convert(tmp_path, MIXERS["linear"])
    with student.use_arm("teacher"):
        assert torch.equal(student(ids).logits, teacher(ids).logits)


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_teacher_arm_with_padding_and_cache_is_stock(ids, implementation):
    teacher = make_gpt2(scale_attn_by_inverse_layer_idx=True)
    student = make_student(teacher, MIXERS)
    for model in (teacher, student):
        model.set_attn_implementation(implementation)
    mask = torch.ones_like(ids)
    mask[1, :6] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with student.use_arm("teacher"):
        stock = teacher(ids, attention_mask=mask, position_ids=positions).logits
        assert torch.equal(student(ids, attention_mask=mask).logits, stock)
        caches, logits = [DynamicCache(), DynamicCache()], []
        for model, cache in zip((teacher, student), caches, strict=True):
            parts = [
                model(
                    ids[:, cut],
                    attention_mask=mask[:, : cut.stop],
                    position_ids=positions[:, cut],
                    **named(cache),
                ).logits
                for cut in (slice(0, 9), slice(9, 10), slice(10, 23))
            ]
            logits.append(torch.cat(parts, 1))
        assert torch.equal(*logits)
        ours = student.generate(ids, attention_mask=mask, past_key_values=DynamicCache(), **GREEDY)
    assert torch.equal(ours, teacher.generate(ids, attention_mask=mask, **GREEDY))


@torch.no_grad()
def test_embeddings_and_token_types(ids):
    teacher = make_gpt2()
    student = make_student(teacher, MIXERS)
    types = ids.flip(1)
    with student.use_arm("teacher"):
        stock = teacher(ids, token_type_ids=types).logits
        assert torch.equal(student(ids, token_type_ids=types).logits, stock)
        embedded = student(inputs_embeds=teacher.transformer.wte(ids), token_type_ids=types)
        assert torch.equal(embedded.logits, stock)
    with pytest.raises(ValueError, match="exactly one of"):
        student()


@torch.no_grad()
def test_the_scaling_of_a_layer_reaches_both_attentions(ids):
    teacher = make_gpt2(scale_attn_by_inverse_layer_idx=True)
    student = make_student(teacher, MIXERS)
    seen = []
    for layer, attention in enumerate(student.mixer_attentions()):
        assert attention.scaling == attention.mixer.scaling == pytest.approx(16**-0.5 / (layer + 1))
        attention.observer = lambda *args, **context: seen.append(args)
    with student.use_arm("teacher"):
        student.transformer(ids, use_cache=False)
    attention, query, key, value, output, padding_mask = seen[2]
    assert query.shape == key.shape == value.shape == output.shape == (2, 4, 23, 16) and padding_mask is None
    expected = functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=attention.scaling)
    assert attention.layer_idx == 2 and close(output, expected)


@torch.no_grad()
def test_dropout_is_stock():
    """All three in the teacher arm; the mixers know none of attention's."""
    ids = torch.randint(3, 97, (2, 12))
    for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop"):
        teacher = make_gpt2(**{name: 0.5}).train()
        student = make_student(teacher, MIXERS).train()
        torch.manual_seed(0)
        expected = teacher(ids).logits
        torch.manual_seed(0)
        with student.use_arm("teacher"):
            assert torch.equal(student(ids).logits, expected)
        assert close(student(ids).logits, student(ids).logits) == (name == "attn_pdrop")


TOO_LONG = "this model has 24 learned positions and was given {} tokens: shorten the text"


@torch.no_grad()
@pytest.mark.parametrize("arm", ["mixed", "teacher"])
def test_text_past_the_last_position_gives_a_sentence(arm):
    student = make_student(make_gpt2(n_positions=24), MIXERS)
    ids = torch.randint(3, 97, (2, 30))
    options = {"do_sample": False, "eos_token_id": None}
    with student.use_arm(arm):
        student(ids[:, :24])
        with pytest.raises(ValueError, match=TOO_LONG.format(30)):
            student(ids)
        for use_cache in (True, False):
            cache = {"past_key_values": DynamicCache()} if arm == "teacher" and use_cache else {}
            student.generate(ids[:, :20], max_new_tokens=5, use_cache=use_cache, **options, **cache)
            cache = {"past_key_values": DynamicCache()} if cache else {}
            with pytest.raises(ValueError, match=TOO_LONG.format(25)):
                student.generate(ids[:, :20], max_new_tokens=9, use_cache=use_cache, **options, **cache)


@torch.no_grad()
def test_padding_takes_no_position():
    """30 places with 20 real tokens fit 24 positions, and give what 20 tokens give."""
    student = make_student(make_gpt2(n_positions=24), MIXERS)
    ids = torch.randint(3, 97, (1, 20))
    padded, mask = torch.zeros(1, 30, dtype=torch.long), torch.zeros(1, 30, dtype=torch.long)
    padded[:, 10:], mask[:, 10:] = ids, 1
    assert close(student(padded, attention_mask=mask).logits[:, 10:], student(ids).logits)
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    alone = student.generate(ids, **options)
    assert torch.equal(student.generate(padded, attention_mask=mask, **options)[:, 30:], alone[:, 20:])
    with student.captured_decoding():
        assert torch.equal(student.generate(padded, attention_mask=mask, **options)[:, 30:], alone[:, 20:])
        with pytest.raises(ValueError, match=TOO_LONG.format(25)):
            student.generate(padded, attention_mask=mask, **{**options, "max_new_tokens": 6})


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"num_beams": 4, "num_return_sequences": 2}], ids=["greedy", "beams"])
def test_captured_decoding_gives_the_same_tokens(ids, options):
    student = make_student(make_gpt2(scale_attn_by_inverse_layer_idx=True), MIXERS)
    perturb(student)
    student.double()
    mask = torch.ones_like(ids)
    mask[1, :6] = 0
    ordinary = student.generate(ids, attention_mask=mask, **GREEDY, **options)
    with student.captured_decoding():
        assert torch.equal(student.generate(ids, attention_mask=mask, **GREEDY, **options), ordinary)
        # A step of a session embeds token ids alone.
        cache, types = DynamicCache(config=student.config), ids.flip(1)
        student(ids[:, :22], token_type_ids=types[:, :22], past_key_values=cache, use_cache=True)
        last = student(ids[:, 22:], token_type_ids=types[:, 22:], past_key_values=cache, use_cache=True).logits
    assert (last - student(ids, token_type_ids=types).logits[:, -1:]).abs().max() <= 1e-10


@torch.no_grad()
def test_a_session_ends_with_the_positions(ids):
    student = make_student(make_gpt2(n_positions=24), MIXERS)
    full = student(ids).logits
    session = DecodingSession(student, 2)
    for i in range(23):
        assert close(session.step(ids[:, i]), full[:, i])
    session.step(ids[:, 0])
    with pytest.raises(ValueError, match=TOO_LONG.format(25)):
        session.step(ids[:, 0])
    session.seek(torch.tensor([3, 20]))
    assert [session.step(ids[:, i]).isfinite().all().item() for i in range(4)] == [True] * 4
    with pytest.raises(ValueError, match=TOO_LONG.format(25)):
        session.step(ids[:, 0])


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"reorder_and_upcast_attn": True}, "set reorder_and_upcast_attn to false"),
        ({"add_cross_attention": True}, "no cross-attention"),
        ({"mixer_types": ["linear"]}, "names 1 layers, the model has 3"),
        ({"mixers": {"linear": {"type": "linear", "feature_dim": 99}}}, "wider than the head dimension 16"),
    ],
)
def test_what_cannot_be_gives_a_sentence(fields, sentence):
    with pytest.raises(ValueError, match=sentence):
        LinearizedGPT2Config(**{**TINY_GPT2, **fields})


def test_refused_options_of_a_checkpoint_are_a_user_error(tmp_path):
    make_gpt2(reorder_and_upcast_attn=True).save_pretrained(tmp_path)
    with pytest.raises(linearize.UserError, match="^a converted GPT-2 does not reorder"):
        linearize.convert(tmp_path)


def test_config_takes_both_names_of_a_size(tmp_path):
    config = LinearizedGPT2Config(num_hidden_layers=3, hidden_size=64, num_attention_heads=4)
    assert (config.n_layer, config.n_embd, config.n_head) == (3, 64, 4)
    assert config.mixer_types == ["linear"] * 3 and config.mixers["linear"]["feature_dim"] == 16
    config.save_pretrained(tmp_path)
    loaded = LinearizedGPT2Config.from_pretrained(tmp_path)
    assert loaded.to_dict() == config.to_dict() and "layer_types" not in loaded.to_diff_dict()


@torch.no_grad()
def test_a_tied_head_is_stored_once(student, tmp_path):
    student.save_pretrained(tmp_path)
    from safetensors.torch import load_file

    names = set(load_file(tmp_path / "model.safetensors"))
    assert names == set(student.state_dict()) - {"lm_head.weight"}
    stock = GPT2LMHeadModel.from_pretrained(tmp_path)  # names of the base are the stock ones
    assert torch.equal(stock.transformer.h[1].attn.c_attn.weight, student.transformer.h[1].attn.c_attn.weight)


def test_layers_and_attentions_are_found(student):
    assert student.decoder_layers() == list(student.transformer.h) == student.transformer.decoder_layers()
    assert student.attention_modules() == [block.attn for block in student.transformer.h]
