"""The BERT student: the teacher where it must be it, attention both ways, padding, and no cache."""

import json
import subprocess
import sys

import pytest
import torch
from tiny_models import TINY_BERT, WITHOUT_PACKAGE, make_bert, make_student, perturb
from transformers import (
    AutoModel,
    BertForMaskedLM,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    DynamicCache,
)

from linearize.kernels.cosine import reference as cosine_reference
from linearize.kernels.hybrid_linear import reference
from linearize.modeling import ATTENTIONS, BACKBONES, LinearizedBertConfig, LinearizedBertModel
from linearize.stages.finetuning import gradient_checkpointing

MIXERS = {"linear": {"type": "linear", "window": 4, "sinks": 2}}
LAYOUTS = {
    "all": (MIXERS, None),
    "some": (MIXERS, ["linear", "softmax", "linear"]),
    "pure-linear": ({"linear": {"type": "linear", "window": 0, "sinks": 0, "feature_map": "exp"}}, None),
    "published": (
        {
            "linear": {
                "type": "linear", "window": 3, "sinks": 0, "window_reference": "max", "window_shift": None,
                "window_weight_form": "sigmoid", "window_weight": 0.1, "magnitude": False,
            }
        },
        None,
    ),
    "cosine": ({"cosine": {"type": "cosine", "window": 4, "sinks": 2}}, None),
    "cosine-pure": ({"cosine": {"type": "cosine", "window": 0, "sinks": 0, "scale_side": "key"}}, None),
    "cosine-maps": (
        {"cosine": {"type": "cosine", "window": 0, "sinks": 2, "feature_map": "softmax"}, **MIXERS},
        ["cosine", "softmax", "linear"],
    ),
}  # fmt: skip
HEADS = {
    "base": BertModel,
    "masked": BertForMaskedLM,
    "sequence": BertForSequenceClassification,
    "token": BertForTokenClassification,
    "answer": BertForQuestionAnswering,
}


@pytest.fixture
def ids():
    return torch.randint(3, TINY_BERT["vocab_size"], (2, 23), generator=torch.Generator().manual_seed(3))


@pytest.fixture(params=LAYOUTS)
def student(request):
    model = make_student(make_bert(), *LAYOUTS[request.param])
    perturb(model)
    return model


def mask_of(lengths, side="right", total=23):
    places = torch.arange(total)
    return torch.stack([places < n if side == "right" else places >= total - n for n in lengths]).long()


def close(left, right):
    return (left - right).abs().max() <= 1e-5


@torch.no_grad()
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_teacher_arm_is_stock(head, implementation, ids):
    """Bit for bit in every output, padded left, right and not at all, with and without token types."""
    teacher = make_bert(kind=HEADS[head])
    student = make_student(teacher, MIXERS)
    for model in (teacher, student):
        model.set_attn_implementation(implementation)
    options = {"output_hidden_states": True, "token_type_ids": (ids > 50).long()}
    with student.use_arm("teacher"):
        for mask in (None, mask_of((23, 23)), mask_of((23, 15)), mask_of((19, 12), "left")):
            for more in ({}, options):
                theirs, ours = teacher(ids, attention_mask=mask, **more), student(ids, attention_mask=mask, **more)
                assert theirs.keys() == ours.keys()
                for name in theirs:
                    pair = torch.equal if torch.is_tensor(theirs[name]) else lambda a, b: all(map(torch.equal, a, b))
                    assert pair(theirs[name], ours[name]), name
    new = set(student.state_dict()) - set(teacher.state_dict())
    assert new == set(student.mixer_state_dict()) != set()


@torch.no_grad()
def test_a_softmax_layer_is_stock(ids):
    student = make_student(make_bert(), MIXERS, ["softmax"] * 3)
    mask = mask_of((23, 11))
    expected = make_bert()(ids, attention_mask=mask).last_hidden_state
    assert torch.equal(student(ids, attention_mask=mask).last_hidden_state, expected)
    assert not student.mixer_attentions()


@torch.no_grad()
def test_a_window_over_everything_is_the_teacher(ids):
    teacher = make_bert()
    student = make_student(teacher, {"linear": {"type": "linear", "window": 23, "sinks": 0}})
    mask = mask_of((23, 14))
    ours, theirs = (model(ids, attention_mask=mask).last_hidden_state for model in (student, teacher))
    assert close(ours[mask.bool()], theirs[mask.bool()])


def first_layer(student, ids, mask):
    """What the observer of the first layer is given: the attention, query, key, value, teacher's output, mask."""
    seen = []
    attention = student.mixer_attentions()[0]
    attention.observer = lambda *args: seen.append(args)
    with student.use_arm("teacher"):
        student(ids, attention_mask=mask)
    return seen[0]


@torch.no_grad()
def test_the_mechanism_sees_both_ways(ids):
    """Its output is the op's definition with `causal=False`, and the last token changes the first one's state."""
    student = make_student(make_bert(), MIXERS).double()
    perturb(student)
    mask = mask_of((23, 15))
    attention, query, key, value, output, padding_mask = first_layer(student, ids, mask)
    assert query.shape == key.shape == value.shape == output.shape == (2, 4, 23, 16)
    assert torch.equal(padding_mask, mask.bool())
    mixed = attention.mix(query, key, value, padding_mask)
    features, options = attention.mixer._call_options("mixed", query)
    expected, _ = reference(query, key, value, *features, **options, causal=False, attention_mask=padding_mask)
    assert close(mixed, expected)
    assert not close(mixed, attention.mixer(query, key, value, padding_mask))
    changed = ids.clone()
    changed[:, -1] = 5
    first, second = (student(x).last_hidden_state[:, 0] for x in (ids, changed))
    assert not close(first, second)


@torch.no_grad()
@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_does_not_matter(student, ids, side):
    """Every row gives what it gives alone; positions are given, for the stock model counts padding."""
    lengths = (23, 14)
    mask = mask_of(lengths, side)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    together = student(ids, attention_mask=mask, position_ids=positions).last_hidden_state
    for row, length in enumerate(lengths):
        real = mask[row].bool()
        alone = student(ids[row : row + 1, real]).last_hidden_state[0]
        assert len(alone) == length and close(together[row, real], alone)
    junk = torch.where(mask.bool(), ids, 7)
    assert close(student(junk, attention_mask=mask, position_ids=positions)[0][mask.bool()], together[mask.bool()])


@torch.no_grad()
def test_arms_and_backends(ids):
    student = make_student(make_bert(), MIXERS)
    perturb(student)
    mask = mask_of((23, 14))
    outputs = {}
    for arm in student.arms():
        with student.use_arm(arm):
            outputs[arm] = student(ids, attention_mask=mask).last_hidden_state[mask.bool()]
    assert set(outputs) == {"mixed", "teacher", "softmax", "linear"}
    assert all(not close(outputs["mixed"], outputs[arm]) for arm in outputs if arm != "mixed")
    student.set_op_backend("reference")
    assert close(student(ids, attention_mask=mask).last_hidden_state[mask.bool()], outputs["mixed"])


@torch.no_grad()
def test_dropout_is_stock(ids):
    for name in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
        teacher = make_bert(**{name: 0.5}).train()
        student = make_student(teacher, MIXERS).train()
        torch.manual_seed(0)
        expected = teacher(ids).last_hidden_state
        torch.manual_seed(0)
        with student.use_arm("teacher"):
            assert torch.equal(student(ids).last_hidden_state, expected)


def test_gradient_checkpointing_gives_equal_gradients(ids):
    student = make_student(make_bert(kind=BertForMaskedLM), MIXERS).train()
    perturb(student)
    gradients = []
    for checkpointing in (False, True):
        student.zero_grad()
        with gradient_checkpointing(student, checkpointing):
            student(ids, attention_mask=mask_of((23, 9)), labels=ids).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() and any(".mixer." in name for name in gradients[0])
    for name, gradient in gradients[0].items():
        assert torch.allclose(gradient, gradients[1][name], atol=1e-6), name


@torch.no_grad()
def test_embeddings_in_place_of_ids(ids):
    student = make_student(make_bert(), MIXERS)
    embedded = student(inputs_embeds=student.embeddings.word_embeddings(ids)).last_hidden_state
    assert torch.equal(embedded, student(ids).last_hidden_state)
    with pytest.raises(ValueError, match="exactly one of"):
        student()


@pytest.mark.parametrize(
    "asked",
    [{"use_cache": True}, {"past_key_values": DynamicCache()}, {"encoder_hidden_states": torch.zeros(2, 3, 64)}],
    ids=["use_cache", "past_key_values", "encoder_hidden_states"],
)
@pytest.mark.parametrize("head", ["base", "masked"])
def test_a_cache_asked_of_an_encoder_gives_a_sentence(ids, asked, head):
    student = make_student(make_bert(kind=HEADS[head]), MIXERS)
    student(ids, use_cache=False)
    for arm in ("mixed", "teacher"):
        with student.use_arm(arm), pytest.raises(ValueError, match="is an encoder, which has no cache"):
            student(ids, **asked)
    with pytest.raises(ValueError, match="is an encoder, which has no cache"), student.captured_decoding():
        pass


@pytest.mark.parametrize("field", ["is_decoder", "add_cross_attention"])
def test_a_decoder_is_refused(field):
    with pytest.raises(ValueError, match=f"is an encoder: convert a checkpoint whose .*{field}"):
        LinearizedBertConfig(**{field: True})


@pytest.mark.parametrize("name", [name for name, entry in ATTENTIONS.items() if not entry.bidirectional])
def test_mechanisms_that_look_one_way_are_refused(name):
    with pytest.raises(ValueError, match=f"{name} attention sees only the tokens before it.*choose one of linear"):
        LinearizedBertConfig(mixers={name: {"type": name}})


def test_scales_on_the_key_s_side_go_without_a_window():
    with pytest.raises(
        ValueError, match="an encoder can only have with window 0 and sinks 0: set scale_side to query"
    ):
        LinearizedBertConfig(mixers={"cosine": {"type": "cosine", "scale_side": "key", "window": 2}})


@torch.no_grad()
def test_cosine_attention_sees_both_ways(ids):
    """On the queries, keys and values of a layer it is the op's definition with `causal=False`."""
    student = make_student(make_bert(), {"cosine": {"type": "cosine", "window": 0, "sinks": 0}}).double()
    perturb(student)
    attention, query, key, value, _, padding_mask = first_layer(student, ids, mask_of((23, 15)))
    scales = attention.mixer.scales
    expected, _ = cosine_reference(
        query, key, value, exponent=scales.exponent(), gain=scales.gain, causal=False, attention_mask=padding_mask
    )
    assert close(attention.mix(query, key, value, padding_mask), expected)


@torch.no_grad()
def test_text_past_the_last_position_gives_a_sentence(ids):
    student = make_student(make_bert(max_position_embeddings=20), MIXERS)
    student(ids[:, :20])
    sentence = "20 learned positions and was given 23 tokens: shorten the text, or truncate it in the tokenizer"
    with pytest.raises(ValueError, match=sentence):
        student(ids)
    with pytest.raises(ValueError, match=sentence):
        student(ids, position_ids=torch.arange(23)[None])
    with pytest.raises(ValueError, match="2-dimensional attention_mask"):
        student(ids[:, :20], attention_mask=torch.ones(2, 1, 20, 20))


def test_config_round_trip(tmp_path):
    config = LinearizedBertConfig(**TINY_BERT)
    assert config.mixer_types == ["linear"] * 3 and config.mixers["linear"]["feature_dim"] == 16
    assert config.use_cache is False
    config.save_pretrained(tmp_path)
    assert LinearizedBertConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()


def test_layers_and_attentions_are_found(student):
    assert student.decoder_layers() == list(student.encoder.layer)
    assert student.attention_modules() == [layer.attention.self for layer in student.encoder.layer]
    headed = make_student(make_bert(kind=BertForMaskedLM), MIXERS)
    assert headed.decoder_layers() == list(headed.bert.encoder.layer)


@pytest.mark.parametrize("head", HEADS)
def test_every_head_has_its_auto_class(head):
    backbone, name = BACKBONES["bert"], HEADS[head].__name__
    model = backbone.model([name])
    assert model.__name__ == f"Linearized{name}" and backbone.model([model.__name__]) is model
    assert LinearizedBertModel.auto_classes[backbone.auto_class([name]).__name__] == model.__name__
    assert backbone.model(None) is backbone.model(["BertForNextSentencePrediction"]) is LinearizedBertModel
    assert backbone.model(["BertForPreTraining"]).__name__ == "LinearizedBertForMaskedLM"


@torch.no_grad()
def test_a_head_is_left_and_a_base_model_given_one(tmp_path, ids):
    """As with the stock classes: AutoModel reads the base of a checkpoint with a head, and a head starts anew."""
    masked = make_student(make_bert(kind=BertForMaskedLM), MIXERS)
    perturb(masked)
    masked.save_pretrained(tmp_path)
    base = AutoModel.from_pretrained(tmp_path)
    assert torch.equal(base(ids).last_hidden_state, masked.bert(ids).last_hidden_state)
    assert masked.cls.predictions.decoder.weight is masked.bert.embeddings.word_embeddings.weight


LOAD = (
    WITHOUT_PACKAGE
    + """
import json, torch, transformers
folder = sys.argv[1]
found = {}
for name in sys.argv[2:]:
    model = getattr(transformers, name).from_pretrained(folder, trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules."), type(model)
    found[name] = type(model).__name__
    with torch.no_grad():
        torch.save(model.base_model(torch.arange(3, 23)[None])[0], f"{folder}/{name}.pt")
model.save_pretrained(folder + "/again")
print(json.dumps(found))
"""
)


@pytest.mark.slow
@torch.no_grad()
def test_every_head_loads_without_the_package(tmp_path):
    mixers = {**MIXERS, "cosine": {"type": "cosine", "window": 3, "feature_map": "projection"}}
    student = make_student(make_bert(kind=BertForMaskedLM), mixers, ["linear", "softmax", "cosine"])
    perturb(student)
    student.save_pretrained(tmp_path)
    command = [sys.executable, "-c", LOAD, str(tmp_path), *LinearizedBertModel.auto_classes]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == LinearizedBertModel.auto_classes
    expected = student.bert(torch.arange(3, 23)[None]).last_hidden_state
    for name in LinearizedBertModel.auto_classes:
        assert close(torch.load(tmp_path / f"{name}.pt", weights_only=True), expected)
    assert (tmp_path / "again" / "modeling_bert.py").is_file()
