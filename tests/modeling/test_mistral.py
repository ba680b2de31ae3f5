"""The Mistral student: every shape of a Mistral, and its sliding window; test_students.py has the rest."""

import copy
import json
import pickle

import pytest
import torch
from tiny_models import TINY, make_mistral, make_student, make_teacher, perturb
from torch.nn import functional
from transformers import AutoModelForCausalLM, DynamicCache, MistralForCausalLM

import linearize
from linearize.modeling import LinearizedMistralConfig, backbone, decoding
from linearize.modeling.cache_layers import softmax_layer
from linearize.modeling.cache_names import CACHE, named

WINDOW = 7
LINEAR = {"type": "linear", "window": 5, "sinks": 2}
MIXERS = {"linear": LINEAR}
SHAPES = {
    "gqa": {},
    "mha": {"num_key_value_heads": 4},
    "mqa": {"num_key_value_heads": 1},
    "wide-heads": {"head_dim": 24},
    "stock-head-dim": {"head_dim": None},
    "tied": {"tie_word_embeddings": True},
    "another-theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    "yarn-rope": {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    },
}


@pytest.fixture
def ids():
    return torch.randint(3, TINY["vocab_size"], (2, 23), generator=torch.Generator().manual_seed(3))


def close(left, right):
    return (left - right).abs().max() <= 1e-5


def window_mask(tokens, window=WINDOW):
    """True where a query (row) sees a key: the last `window` tokens, itself among them."""
    distance = torch.arange(tokens)[:, None] - torch.arange(tokens)
    return (distance >= 0) & (distance < window)


@torch.no_grad()
@pytest.mark.parametrize("window", [WINDOW, None], ids=["window", "no-window"])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_mistral_shape_converts(shape, window, ids, tmp_path):
    """Through files: the teacher arm is the stock model bit for bit, and the student loads as it was saved."""
    teacher = make_mistral(**SHAPES[shape], sliding_window=window)
    teacher.save_pretrained(tmp_path / "teacher")
    student = linearize.convert(tmp_path / "teacher", LINEAR, softmax_layers=[1])
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "teacher")
    assert type(stock) is MistralForCausalLM
    expected = stock(ids).logits
    with student.use_arm("teacher"):
        assert torch.equal(student(ids).logits, expected)
    new = set(student.state_dict()) - set(teacher.state_dict())
    assert new == set(student.mixer_state_dict()) != set()
    perturb(student)
    student.save_pretrained(tmp_path / "student")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    assert type(loaded) is type(student) and loaded.config.sliding_window == window
    assert json.loads((tmp_path / "student" / "config.json").read_text())["sliding_window"] == window
    assert torch.equal(loaded(ids).logits, student(ids).logits)
    assert not close(loaded(ids).logits, expected)
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == (shape == "tied")


@torch.no_grad()
@pytest.mark.parametrize("window", [WINDOW, None], ids=["window", "no-window"])
def test_the_mechanism_s_own_window_can_be_the_sliding_window(window, ids):
    """Two ways to one result: stock attention with a mask, and the softmax branch alone over as many tokens."""
    teacher = make_mistral(sliding_window=window)
    student = make_student(teacher, {"linear": {"type": "linear", "window": window or 32, "sinks": 0}})
    with student.use_arm("softmax"):
        assert close(student(ids).logits, teacher(ids).logits)


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("layers", [None, ["linear", "softmax", "linear"]], ids=["all", "some"])
def test_teacher_arm_with_padding_and_cache_is_stock(ids, implementation, layers):
    """The cache that the model makes holds what the stock one holds, piece by piece and bit for bit."""
    teacher = make_mistral()
    student = make_student(teacher, MIXERS, layers)
    for model in (teacher, student):
        model.set_attn_implementation(implementation)
    mask = torch.ones_like(ids)
    mask[1, :9] = 0  # more than the window
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    student.set_arm("teacher")
    stock = teacher(ids, attention_mask=mask, position_ids=positions).logits
    assert torch.equal(student(ids, attention_mask=mask).logits, stock)
    caches, logits = [None, None], [[], []]
    for cut in (slice(0, 4), slice(4, 12), slice(12, 13), slice(13, 23)):
        for i, model in enumerate((teacher, student)):
            options = {"position_ids": positions[:, cut], "use_cache": True, **named(caches[i])}
            output = model(ids[:, cut], attention_mask=mask[:, : cut.stop], **options)
            caches[i] = output[CACHE]
            logits[i].append(output.logits)
        for ours, theirs in zip(caches[1].layers, caches[0].layers, strict=True):
            assert torch.equal(ours.keys, theirs.keys) and ours.keys.shape[2] <= WINDOW - 1
            assert torch.equal(ours.values, theirs.values) and ours.get_seq_length() == theirs.get_seq_length()
    assert torch.equal(torch.cat(logits[0], 1), torch.cat(logits[1], 1))
    real = mask.bool()
    assert close(torch.cat(logits[1], 1)[real], stock[real])


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_layers_that_all_stay_softmax_are_stock_mistral(ids, options):
    """The hybrid's own cache layers, as `generate` makes them, against the stock sliding ones."""
    teacher = make_mistral()
    student = make_student(teacher, {}, ["softmax"] * 3)
    mask = torch.ones_like(ids)
    mask[1, :9] = 0
    options = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False, **options}
    assert torch.equal(student.generate(ids, **options), teacher.generate(ids, **options))
    cache = DynamicCache(config=student.config)
    student(ids, past_key_values=cache, use_cache=True)
    stock = DynamicCache(config=teacher.config)
    teacher(ids, use_cache=True, **named(stock))
    assert [layer.is_sliding for layer in cache.layers] == [True] * 3
    assert torch.equal(cache.layers[2].keys, stock.layers[2].keys) and stock.layers[2].keys.shape[2] == WINDOW - 1


@torch.no_grad()
def test_softmax_layers_of_a_hybrid_see_the_window_and_no_more(ids):
    layers = ["linear", "softmax", "linear"]
    student, lifted = (make_student(make_mistral(sliding_window=window), MIXERS, layers) for window in (WINDOW, None))
    inside, outside = student(ids).logits, lifted(ids).logits
    assert close(inside[:, :WINDOW], outside[:, :WINDOW]) and not close(inside[:, WINDOW], outside[:, WINDOW])
    assert student.config.layer_types[1] == "linearize_softmax_window_7_1"
    assert lifted.config.layer_types[1] == "linearize_softmax_1"
    hidden = torch.randn(1, 12, 32, generator=torch.Generator().manual_seed(0))
    mask, _ = backbone.layer_masks(student.model, hidden, None, None, None)
    assert torch.equal(mask[0, 0], window_mask(12))


@torch.no_grad()
def test_attention_transfer_is_given_the_window_s_output(ids):
    student = make_student(make_mistral(), MIXERS)
    seen = []
    for attention in student.mixer_attentions():
        attention.observer = lambda *args, **context: seen.append(args)
    with student.use_arm("teacher"):
        student.model(ids, use_cache=False)
    attention, query, key, value, output, padding_mask = seen[2]
    assert query.shape == output.shape == (2, 4, 23, 16) and key.shape == value.shape == (2, 2, 23, 16)
    assert attention.layer_idx == 2 and padding_mask is None
    mask = window_mask(23)
    expected = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)
    assert close(output, expected)


@torch.no_grad()
def test_the_window_can_be_lifted(ids, tmp_path):
    make_mistral().save_pretrained(tmp_path / "teacher")
    free = make_mistral(sliding_window=None)
    student = linearize.convert(tmp_path / "teacher", LINEAR, softmax_layers=[0], sliding_window="lift")
    assert student.config.sliding_window is None
    with student.use_arm("teacher"):
        assert torch.equal(student(ids).logits, free(ids).logits)
    student.save_pretrained(tmp_path / "student")
    assert linearize.load_student(tmp_path / "student").config.sliding_window is None
    kept = linearize.convert(tmp_path / "teacher", LINEAR, softmax_layers=[0])
    assert kept.config.sliding_window == WINDOW and not close(kept(ids).logits, student(ids).logits)


@pytest.mark.parametrize(("make", "fields"), [(make_teacher, {}), (make_mistral, {"sliding_window": None})])
def test_nothing_to_lift_is_nothing_wrong(make, fields, tmp_path):
    make(**fields).save_pretrained(tmp_path)
    student = linearize.convert(tmp_path, LINEAR, sliding_window="lift")
    assert getattr(student.config, "sliding_window", None) is None and student.config.softmax_window is None


@torch.no_grad()
def test_a_llama_with_a_window_in_its_config_has_none(ids, tmp_path):
    """The stock model does not look at the field."""
    teacher = make_teacher()
    teacher.config.sliding_window = WINDOW
    teacher.save_pretrained(tmp_path)
    student = linearize.convert(tmp_path, LINEAR)
    with student.use_arm("teacher"):
        assert torch.equal(student(ids).logits, teacher(ids).logits)


@pytest.mark.parametrize("value", ["wide", 1024, None])
def test_a_bad_choice_gives_a_sentence(value, tmp_path):
    make_mistral().save_pretrained(tmp_path)
    with pytest.raises(linearize.UserError, match=f"^sliding_window is {value!r}, but it must be one of keep, lift$"):
        linearize.convert(tmp_path, sliding_window=value)


@pytest.mark.parametrize(
    ("window", "sentence"), [(0, "sliding_window is 0"), (1, "at least 2"), ("wide", "sliding_window.*wide")]
)
def test_a_bad_window_gives_a_sentence(window, sentence, tmp_path):
    make_mistral().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "sliding_window": window}))
    with pytest.raises(linearize.UserError, match=sentence):
        linearize.convert(tmp_path)
    with pytest.raises(Exception, match=sentence):
        LinearizedMistralConfig(**{**TINY, "sliding_window": window})


@torch.no_grad()
def test_a_window_cache_can_be_copied_pickled_and_reordered(ids):
    student = make_student(make_mistral(), MIXERS, ["softmax", "linear", "softmax"])
    cache = DynamicCache(config=student.config)
    student(ids[:, :16], past_key_values=cache, use_cache=True)
    layer = cache.layers[0]
    assert type(layer) is softmax_layer(WINDOW) is not softmax_layer(WINDOW + 1)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert type(twin) is type(layer) and torch.equal(twin.keys, layer.keys) and twin.get_seq_length() == 16
        twin.reset()
        assert twin.get_seq_length() == 0 and twin.get_mask_sizes(3) == (3, 0) and layer.get_seq_length() == 16
    cache.reorder_cache(torch.tensor([1, 1]))
    rest = student(ids[1:, 16:].expand(2, -1), past_key_values=cache, use_cache=True).logits
    assert close(rest, student(ids).logits[1:, 16:].expand(2, -1, -1))


@torch.no_grad()
def test_captured_decoding_gives_the_same_tokens(ids):
    student = make_student(make_mistral(), MIXERS)
    perturb(student)
    student.double()
    mask = torch.ones_like(ids)
    mask[1, :6] = 0
    options = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False}
    ordinary = student.generate(ids, **options)
    with student.captured_decoding():
        assert torch.equal(student.generate(ids, **options), ordinary)


@torch.no_grad()
@pytest.mark.parametrize("make", [make_teacher, make_mistral])
def test_compiled_parts_are_found_in_stock_and_converted_models(make, ids, monkeypatch):
    """Norms, gated units and rotary embedding; each as a plain function here, for what counts is that it is called."""
    called = set()

    def plain(function):
        def call(*args):
            called.add(function.__name__)
            return function(*args)

        return call

    monkeypatch.setattr(decoding, "_compiled", plain)
    stock = make()
    for model in (stock, make_student(stock, MIXERS)):
        expected = model(ids).logits
        called.clear()
        with decoding.compiled_elementwise(model):
            assert close(model(ids).logits, expected)
        assert called == {"_rms_norm", "_gate", "_rotate"}
        called.clear()
        assert torch.equal(model(ids).logits, expected) and not called


def as_mistral(llama, folder, **changes):
    """A Llama checkpoint as a Mistral one: the same weights, linked, under another config."""
    folder.mkdir()
    fields = json.loads((llama / "config.json").read_text())
    for name in ("attention_bias", "mlp_bias", "pretraining_tp", "auto_map"):
        fields.pop(name, None)
    fields |= {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": None, **changes}
    (folder / "config.json").write_text(json.dumps(fields))
    for file in llama.glob("*.safetensors*"):
        (folder / file.name).symlink_to(file.resolve())
    return folder


@pytest.mark.slow
@torch.no_grad()
def test_a_real_checkpoint_as_a_mistral(smollm2, tmp_path):
    """SmolLM2-135M under a Mistral config: the stock Llama's logits, and with a window the stock Mistral's."""
    tokenizer = linearize.load_tokenizer(smollm2)
    ids = tokenizer("The capital of France is" * 6, return_tensors="pt").input_ids
    llama = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    expected = llama(ids).logits
    del llama
    settings = {"type": "linear", "window": 16, "sinks": 4}
    student = linearize.convert(as_mistral(smollm2, tmp_path / "free"), settings, dtype=torch.float32)
    assert student.config.model_type == "linearized_mistral"
    with student.use_arm("teacher"):
        assert torch.equal(student(ids).logits, expected)
        reply = student.generate(ids[:, :5], max_new_tokens=6, do_sample=False, past_key_values=DynamicCache())
    assert "Paris" in tokenizer.decode(reply[0])
    with student.use_arm("teacher"):
        inside = student(ids[:, :16]).logits
    assert (student(ids[:, :16]).logits - inside).abs().max() <= 1e-3 * inside.abs().max()
    del student
    narrow = as_mistral(smollm2, tmp_path / "narrow", sliding_window=12)
    stock = AutoModelForCausalLM.from_pretrained(narrow, dtype=torch.float32)
    windowed, text = stock(ids).logits, stock.generate(ids, max_new_tokens=6, do_sample=False)
    del stock
    student = linearize.convert(narrow, settings, dtype=torch.float32, softmax_layers=[0, -1])
    with student.use_arm("teacher"):
        assert torch.equal(student(ids).logits, windowed) and not close(windowed, expected)
        assert torch.equal(
            student.generate(ids, max_new_tokens=6, do_sample=False, past_key_values=DynamicCache()), text
        )
