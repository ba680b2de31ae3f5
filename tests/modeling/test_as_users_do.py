"""A converted model in users' hands: copied, cast, sharded, resized, placed, adapted and generated with."""

import copy
import io
import logging
import pickle
import subprocess
import sys

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from tiny_models import (
    WITHOUT_PACKAGE,
    make_bert,
    make_gpt2,
    make_gptj,
    make_mistral,
    make_student,
    make_teacher,
    perturb,
)
from tiny_runs import make_tokenizer
from transformers import AutoModelForCausalLM, pipeline

from linearize.modeling import backbone

MAKERS = {"llama": make_teacher, "mistral": make_mistral, "gpt2": make_gpt2, "gptj": make_gptj, "bert": make_bert}
MECHANISMS = {
    "linear": {"type": "linear", "window": 5, "sinks": 2},
    "cosine": {"type": "cosine", "window": 5, "sinks": 2, "feature_map": "projection"},
    "gain_cell": {"type": "gain_cell", "window": 64},
    "landmark": {"type": "landmark", "block_size": 4, "top_k": 2, "include_landmark_in_loss": True},
}
IDS = torch.arange(3, 45).view(2, 21)
peft_warning = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # inside peft 0.21


def make(kind, backbone="llama", **changes):
    model = make_student(MAKERS[backbone](**changes), {kind: MECHANISMS[kind]})
    perturb(model)
    return model


@pytest.fixture(params=MECHANISMS)
def model(request):
    return make(request.param)


@torch.no_grad()
def test_copies_and_pickles(model):
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    model(IDS, labels=IDS)  # landmarks remember the last call for their loss
    copies = (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(stream, weights_only=False))
    assert all(torch.equal(x(IDS).logits, model(IDS).logits) for x in copies)


@torch.no_grad()
def test_shards_and_places(model, tmp_path):
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 5
    for options in ({"device_map": "cpu"}, {"device_map": "auto"}, {"dtype": "auto"}):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path, **options)
        assert torch.equal(loaded(IDS).logits, model(IDS).logits), options


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_cast_model_runs(model, dtype):
    """`model.half()` casts the mechanism too, where `from_pretrained` would not; it runs, with a cache as without."""
    cast = copy.deepcopy(model).to(dtype)
    mask = torch.ones_like(IDS)
    assert cast(IDS).logits.dtype == dtype and cast(IDS, labels=IDS).loss.isfinite()
    assert cast.generate(IDS, attention_mask=mask, max_new_tokens=6, do_sample=False).shape[1] > 21
    if dtype == torch.float64:
        assert (cast(IDS).logits - model(IDS).logits).abs().max() < 1e-4


@pytest.mark.parametrize("size", [104, 50])
@pytest.mark.parametrize("tied", [True, False])
def test_resized_vocabularies(model, size, tied, tmp_path):
    kind = model.config.mixer_types[0]
    model = make(kind, tie_word_embeddings=tied)
    before = model(IDS % 50).logits.detach()
    model.resize_token_embeddings(size)
    common = min(size, 97)
    torch.testing.assert_close(model(IDS % 50).logits[..., :common], before[..., :common])
    model(IDS % 50, labels=IDS % 50).loss.backward()
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.vocab_size == size and torch.equal(loaded(IDS % 50).logits, model(IDS % 50).logits)


@torch.no_grad()
def test_several_sequences_and_batches(model, tmp_path):
    options = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(IDS)}
    greedy = model.generate(IDS, **options)
    several = model.generate(IDS, num_beams=3, num_return_sequences=3, **options)
    assert several.shape[0] == 6 and torch.equal(several[:, :21], IDS.repeat_interleave(3, 0))
    sampled = model.generate(IDS, **{**options, "do_sample": True, "top_k": 1}, num_return_sequences=2)
    assert torch.equal(sampled, greedy.repeat_interleave(2, 0))
    tokenizer = make_tokenizer()
    make(model.config.mixer_types[0], vocab_size=len(tokenizer)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    generator = pipeline("text-generation", str(tmp_path))
    texts = ["the river ran past a house", "nobody spoke"]
    both = [x[0]["generated_text"] for x in generator(texts, batch_size=2, max_new_tokens=5, do_sample=False)]
    assert both == [generator(x, max_new_tokens=5, do_sample=False)[0]["generated_text"] for x in texts]


@torch.no_grad()
def test_what_needs_a_cache_of_keys_is_refused(model):
    options = {"max_new_tokens": 6, "do_sample": False}
    for wanted in ({"prompt_lookup_num_tokens": 3}, {"assistant_model": make_teacher()}):
        with pytest.raises(ValueError, match="assisted generation is not supported with stateful models"):
            model.generate(IDS[:1], **wanted, **options)
    with pytest.raises(RuntimeError, match="cannot be rolled back"):
        make_teacher(seed=1).generate(IDS[:1], assistant_model=model, **options)
    with pytest.raises(ValueError, match="only supported for models with only full attention layers"):
        model.generate(IDS[:1], cache_implementation="quantized", **options)


def test_published_labels_take_no_shifted_ones():
    with pytest.raises(ValueError, match="need labels, not shift_labels"):
        make("landmark")(IDS, labels=IDS, shift_labels=IDS)


def test_a_call_leaves_no_graph_behind():
    model = make("landmark")
    output = model(IDS)
    assert model.model.mixer.call is None
    with pytest.raises(ValueError, match="within the model's call: give it the labels"):
        model.loss_function(output.logits, IDS, vocab_size=97)


# --- peft and dropout


@peft_warning
@pytest.mark.parametrize("kind", [LoraConfig, IA3Config])
@pytest.mark.parametrize("backbone", MAKERS)
def test_adapters_take_what_they_take_of_the_stock_model(backbone, kind):
    """Without target_modules: the same layers, and no parameter of a mechanism."""
    stock = trained_names(MAKERS[backbone](), kind())
    student = trained_names(make("linear", backbone), kind())
    assert stock == student and stock


def trained_names(model, config):
    adapted = get_peft_model(model, config)
    return {name for name, x in adapted.named_parameters() if x.requires_grad}


TARGETS = (
    WITHOUT_PACKAGE
    + """
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
assert "peft" not in sys.modules
from peft import LoraConfig, get_peft_model
model = get_peft_model(model, LoraConfig())
print(sum("lora_A" in name for name, _ in model.named_parameters()))
"""
)


@pytest.mark.slow
def test_adapters_of_a_repository_without_the_package(tmp_path):
    """peft imported after the model, too."""
    make("linear").save_pretrained(tmp_path)
    done = subprocess.run([sys.executable, "-c", TARGETS, str(tmp_path)], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["6"]


@pytest.mark.parametrize(
    "name, key", [("llama", "attention_dropout"), ("gpt2", "attn_pdrop"), ("bert", "attention_probs_dropout_prob")]
)
def test_attention_dropout_is_the_teachers_alone_and_said_so(name, key, caplog):
    """Once, and in training only; the mechanism itself has no dropout, the teacher arm has the stock model's."""
    model = make("linear", name, **{key: 0.5})
    backbone._say_no_dropout.cache_clear()
    with caplog.at_level(logging.WARNING):
        model.eval()(IDS)
        assert not caplog.records
        first, second = (model.train()(IDS)[0] for _ in range(2))
    assert torch.equal(first, second)
    assert [x.getMessage().count("without the attention dropout of 0.5") for x in caplog.records] == [1]
    with model.use_arm("teacher"):
        assert not torch.equal(model(IDS)[0], model(IDS)[0])
