"""The GPT-J student: interleaved, partial rotary embedding, one norm, no end; test_students.py has the rest."""

import pytest
import torch
from tiny_models import TINY_GPTJ, make_gptj, make_student, perturb
from torch.nn import functional
from transformers import AutoModelForCausalLM, DynamicCache, GPTJForCausalLM
from transformers.models.gptj.modeling_gptj import GPTJAttention

import linearize
from linearize.modeling import LinearizedGPTJConfig
from linearize.modeling.attention_landmark import rotated
from linearize.modeling.cache_names import CACHE, named

LINEAR = {"type": "linear", "window": 5, "sinks": 2}
MIXERS = {"linear": LINEAR}
SOME = ["linear", "softmax", "linear"]
GREEDY = {"max_new_tokens": 8, "do_sample": False}
SHAPES = {
    "partial": {},
    "whole-head": {"rotary_dim": 16},
    "one-pair": {"rotary_dim": 2},
    "stock-inner-width": {"n_inner": None},
    "relu": {"activation_function": "relu"},
    "tied": {"tie_word_embeddings": True},
}


@pytest.fixture
def ids():
    return torch.randint(3, TINY_GPTJ["vocab_size"], (2, 23), generator=torch.Generator().manual_seed(3))


def close(left, right):
    return (left - right).abs().max() <= 1e-5


@torch.no_grad()
@pytest.mark.parametrize("shape", SHAPES)
def test_every_gptj_shape_converts(shape, ids, tmp_path):
    """Through files: the teacher arm is the stock model bit for bit, and so is a window over everything, nearly."""
    teacher = make_gptj(**SHAPES[shape])
    teacher.save_pretrained(tmp_path / "teacher")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "teacher")
    assert type(stock) is GPTJForCausalLM
    expected = stock(ids).logits
    student = linearize.convert(tmp_path / "teacher", {"type": "linear", "window": 32})
    with student.use_arm("teacher"):
        assert torch.equal(student(ids).logits, expected)
    assert close(student(ids).logits, expected)
    new = set(student.state_dict()) - set(teacher.state_dict())
    assert new == set(student.mixer_state_dict()) != set()
    student = linearize.convert(tmp_path / "teacher", LINEAR, softmax_layers=[1])
    perturb(student)
    student.save_pretrained(tmp_path / "student")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    assert type(loaded) is type(student)
    assert torch.equal(loaded(ids).logits, student(ids).logits)
    assert not close(loaded(ids).logits, expected)
    assert (loaded.lm_head.weight is loaded.transformer.wte.weight) == (shape == "tied")
    assert loaded.lm_head.bias.abs().sum() > 0


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layers", [None, SOME], ids=["all", "some"])
def test_teacher_arm_with_padding_and_cache_is_stock(ids, layers, dtype, tmp_path):
    make_gptj().save_pretrained(tmp_path)
    teacher = GPTJForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    student = linearize.convert(tmp_path, mixers=MIXERS, mixer_types=layers or ["linear"] * 3, dtype=dtype)
    mask = torch.ones_like(ids)
    mask[1, :6] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with student.use_arm("teacher"):
        stock = teacher(ids, attention_mask=mask, position_ids=positions).logits
        assert torch.equal(student(ids, attention_mask=mask).logits, stock)
        caches, logits = [DynamicCache(), None], []
        for i, model in enumerate((teacher, student)):
            parts = []
            for cut in (slice(0, 9), slice(9, 10), slice(10, 23)):
                options = {"position_ids": positions[:, cut], "use_cache": True, **named(caches[i])}
                output = model(ids[:, cut], attention_mask=mask[:, : cut.stop], **options)
                caches[i] = output[CACHE]
                parts.append(output.logits)
            logits.append(torch.cat(parts, 1))
        assert torch.equal(*logits)
        ours = student.generate(ids, attention_mask=mask, past_key_values=DynamicCache(), **GREEDY)
    assert torch.equal(ours, teacher.generate(ids, attention_mask=mask, **GREEDY))


@torch.no_grad()
def test_what_a_stock_forward_gives_besides_logits(ids):
    teacher, student = make_gptj(), make_student(make_gptj(), MIXERS, SOME)
    for model in (teacher, student):
        model.set_attn_implementation("eager")  # which has weights, and is not the default in transformers 5.24
    types = ids.flip(1)
    options = {"token_type_ids": types, "output_hidden_states": True, "output_attentions": True, "labels": ids}
    with student.use_arm("teacher"):
        theirs, ours = teacher(ids, **options), student(ids, **options)
        assert torch.equal(ours.loss, theirs.loss)
        assert len(ours.hidden_states) == len(theirs.hidden_states) == 4
        assert all(torch.equal(*pair) for pair in zip(ours.hidden_states, theirs.hidden_states, strict=True))
        assert ours.attentions[0] is ours.attentions[2] is None
        assert torch.equal(ours.attentions[1], theirs.attentions[1])
        embedded = student(inputs_embeds=teacher.transformer.wte(ids), token_type_ids=types, logits_to_keep=1)
        assert embedded.logits.shape[1] == 1 and close(embedded.logits, theirs.logits[:, -1:])
        loss, logits, *_ = student(ids, labels=ids, return_dict=False)
        assert torch.equal(logits, teacher(ids).logits) and loss.isfinite()
    with pytest.raises(ValueError, match="exactly one of"):
        student()


@torch.no_grad()
def test_the_form_of_the_original_checkpoint_loads(ids, tmp_path):
    """With the masks that old checkpoints hold."""
    teacher = make_gptj()
    for block in teacher.transformer.h:
        block.attn.register_buffer("bias", torch.ones(1, 1, 256, 256).tril().bool())
        block.attn.register_buffer("masked_bias", torch.tensor(-1e9))
    teacher.save_pretrained(tmp_path)
    student = linearize.convert(tmp_path, LINEAR)
    with student.use_arm("teacher"):
        assert torch.equal(student(ids).logits, teacher(ids).logits)


def turned(x, place, rotary_dim):
    """The rotary embedding of one vector, pair by pair, as rotations of the plane."""
    x = x.clone()
    for i in range(0, rotary_dim, 2):
        angle = torch.tensor(place * 10_000 ** (-i / rotary_dim), dtype=x.dtype)
        first, second = x[i].clone(), x[i + 1].clone()
        x[i] = first * angle.cos() - second * angle.sin()
        x[i + 1] = first * angle.sin() + second * angle.cos()
    return x


@torch.no_grad()
@pytest.mark.parametrize("rotary_dim", [10, 16])
def test_the_mechanism_gets_rotated_queries_and_keys(ids, rotary_dim):
    student = make_student(make_gptj(rotary_dim=rotary_dim), MIXERS).double()
    seen, inputs = [], []
    attention = student.mixer_attentions()[1]
    attention.observer = lambda *args, **context: seen.append(args)
    attention.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    with student.use_arm("teacher"):
        student(ids)
    _, query, key, value, output, padding_mask = seen[0]
    assert query.shape == key.shape == value.shape == output.shape == (2, 4, 23, 16) and padding_mask is None
    plain = attention.q_proj(inputs[0]).view(2, 23, 4, 16)
    for place in (0, 1, 17):
        expected = turned(plain[1, place, 2], place, rotary_dim)
        assert (query[1, 2, place] - expected).abs().max() < 1e-5  # angles are float32, as the stock model's
    causal = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
    assert close(output, causal) and attention.scaling == attention.mixer.scaling == 0.25


@torch.no_grad()
@pytest.mark.parametrize("rotary_dim", [2, 10, 16])
def test_landmarks_rotate_by_halves_to_the_same_scores(rotary_dim):
    """The landmark mechanism rotates by itself, halves of all dimensions: another order gives what the model gives."""
    from linearize.modeling.modeling_gptj import by_halves

    model = make_student(make_gptj(rotary_dim=rotary_dim), {"landmark": {"type": "landmark", "block_size": 4}})
    base, attention = model.transformer, model.mixer_attentions()[0]
    query, key = torch.randn(2, 1, 9, 4, 16, generator=torch.Generator().manual_seed(0))
    place = torch.tensor([[0, 1, 2, 3, 50, 51, 7, 7, 200]])
    expected = [attention.rotate(x, base.rotary(place)).transpose(1, 2) for x in (query, key)]
    tables = base.rotary_tables(201)
    found = [rotated(by_halves(x, rotary_dim).transpose(1, 2), tables, place) for x in (query, key)]
    torch.testing.assert_close(found[0] @ found[1].mT, expected[0] @ expected[1].mT, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_one_block_of_landmark_attention_is_the_teacher(ids):
    """A text without a complete block has no landmark in it: softmax over everything, rotated by the mechanism."""
    teacher = make_gptj()
    student = make_student(teacher, {"landmark": {"type": "landmark", "block_size": 64}})
    assert close(student(ids).logits, teacher(ids).logits)
    cache = DynamicCache(config=student.config)
    parts = [student(ids[:, i : i + 1], past_key_values=cache, use_cache=True).logits for i in range(23)]
    assert close(torch.cat(parts, 1), teacher(ids).logits)


@torch.no_grad()
@pytest.mark.parametrize("layers", [None, SOME], ids=["all", "some"])
def test_a_text_may_be_longer_than_the_stock_table(layers):
    """The same weights beside a table that is long enough give the same, but for sinks, which follow past its end; the
    stock model alone ends."""
    ids = torch.randint(3, 97, (1, 40), generator=torch.Generator().manual_seed(5))
    mixers = {"linear": {**LINEAR, "sinks": 0}}
    student, long = (make_student(make_gptj(n_positions=n), mixers, layers) for n in (24, 64))
    assert torch.equal(student(ids).logits, long(ids).logits)
    with student.use_arm("teacher"):
        assert torch.equal(student(ids).logits, make_gptj(n_positions=64)(ids).logits)
    assert student.generate(ids, max_new_tokens=4, do_sample=False, eos_token_id=None).shape == (1, 44)
    assert student.max_positions is None and student.config.longest_text is None


@torch.no_grad()
def test_dropout_is_stock():
    """All three in the teacher arm; the mixers know none of attention's."""
    ids = torch.randint(3, 97, (2, 12))
    for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop"):
        teacher = make_gptj(**{name: 0.5}).train()
        student = make_student(teacher, MIXERS).train()
        torch.manual_seed(0)
        expected = teacher(ids).logits
        torch.manual_seed(0)
        with student.use_arm("teacher"):
            assert torch.equal(student(ids).logits, expected)
        assert close(student(ids).logits, student(ids).logits) == (name == "attn_pdrop")


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"num_beams": 4, "num_return_sequences": 2}], ids=["greedy", "beams"])
def test_captured_decoding_gives_the_same_tokens(ids, options):
    student = make_student(make_gptj(), MIXERS)
    perturb(student)
    student.double()
    mask = torch.ones_like(ids)
    mask[1, :6] = 0
    ordinary = student.generate(ids, attention_mask=mask, **GREEDY, **options)
    with student.captured_decoding():
        assert torch.equal(student.generate(ids, attention_mask=mask, **GREEDY, **options), ordinary)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"rotary_dim": 7}, "rotary_dim is 7, but it must be even"),
        ({"rotary_dim": 18}, "at most the head dimension 16"),
        ({"rotary_dim": 0}, "above 0"),
        ({"mixer_types": ["linear"]}, "names 1 layers, the model has 3"),
        ({"mixers": {"linear": {"type": "linear", "feature_dim": 99}}}, "wider than the head dimension 16"),
        ({"n_embd": 60, "mixers": {"landmark": {"type": "landmark"}}}, "the head dimension is 15, and landmark"),
    ],
)
def test_what_cannot_be_gives_a_sentence(fields, sentence):
    with pytest.raises(ValueError, match=sentence):
        LinearizedGPTJConfig(**{**TINY_GPTJ, **fields})


def test_refused_options_of_a_checkpoint_are_a_user_error(tmp_path):
    make_gptj(n_embd=60).save_pretrained(tmp_path)
    with pytest.raises(linearize.UserError, match="^the head dimension is 15"):
        linearize.convert(tmp_path, {"type": "landmark"})


def test_config_takes_both_names_of_a_size(tmp_path):
    config = LinearizedGPTJConfig(num_hidden_layers=3, hidden_size=64, num_attention_heads=4, rotary_dim=16)
    assert (config.n_layer, config.n_embd, config.n_head) == (3, 64, 4)
    assert config.mixer_types == ["linear"] * 3 and config.mixers["linear"]["feature_dim"] == 16
    config.save_pretrained(tmp_path)
    loaded = LinearizedGPTJConfig.from_pretrained(tmp_path)
    assert loaded.to_dict() == config.to_dict() and "layer_types" not in loaded.to_diff_dict()


def test_layers_and_attentions_are_found():
    student = make_student(make_gptj(), MIXERS, SOME)
    assert student.decoder_layers() == list(student.transformer.h) == student.transformer.decoder_layers()
    assert student.attention_modules() == [block.attn for block in student.transformer.h]
    assert all(isinstance(attention, GPTJAttention) for attention in student.attention_modules())
    assert not list(student.buffers())
