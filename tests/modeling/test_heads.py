"""Converted decoders without a head and with a classifier's: every Auto class, with the package and without it."""

import json
import subprocess
import sys

import pytest
import torch
import transformers
from tiny_models import WITHOUT_PACKAGE, make_gpt2, make_gptj, make_mistral, make_student, make_teacher, perturb
from tiny_runs import make_tokenizer
from transformers import AutoModelForSequenceClassification, GPT2Model, GPTJModel, LlamaModel, MistralModel

import linearize
from linearize.cli import main
from linearize.config.settings import FinetuneConfig
from linearize.conversion.students import load_model
from linearize.modeling import BACKBONES

MAKERS = {"llama": make_teacher, "mistral": make_mistral, "gpt2": make_gpt2, "gptj": make_gptj}
LINEAR = {"linear": {"type": "linear", "window": 5, "sinks": 2}}
LANDMARK = {"landmark": {"type": "landmark", "block_size": 4, "top_k": 20}}
CLASSIFIER, TAGGER, READER = (
    f"AutoModelFor{task}" for task in ("SequenceClassification", "TokenClassification", "QuestionAnswering")
)
IDS = torch.arange(3, 45).view(2, 21)


def saved(folder, backbone="llama", mixers=LINEAR, kinds=None, **changes):
    student = make_student(MAKERS[backbone](**changes), mixers, kinds)
    perturb(student)
    student.save_pretrained(folder)
    return student


def load(folder, auto, **options):
    return getattr(transformers, auto).from_pretrained(folder, **options).eval()


@pytest.mark.parametrize("backbone", MAKERS)
@torch.no_grad()
def test_every_auto_class_of_the_stock_model(backbone, tmp_path):
    student = saved(tmp_path, backbone)
    expected = student.base_model(IDS).last_hidden_state
    entry = BACKBONES[backbone]
    names = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    assert set(names) == {"AutoConfig", *entry.default.auto_classes}
    for auto in entry.default.auto_classes:
        model = load(tmp_path, auto)
        assert type(model) is entry.models[getattr(transformers, auto)]
        assert torch.equal(model.base_model(IDS).last_hidden_state, expected), auto
        before = tmp_path / auto
        model.save_pretrained(before)
        again = load(before, auto)
        outputs = [x(IDS, attention_mask=torch.ones_like(IDS)) for x in (model, again)]
        assert torch.equal(outputs[0][0], outputs[1][0]), auto
        assert torch.equal(load(before, "AutoModel")(IDS).last_hidden_state, expected), auto


@pytest.mark.parametrize("backbone", MAKERS)
def test_students_have_the_heads_of_the_stock_model(backbone):
    entry = BACKBONES[backbone]
    stock = next(x for x in entry.config.__mro__ if getattr(x, "model_type", None) == backbone)
    heads = ("AutoModel", CLASSIFIER, TAGGER, READER)
    known = {auto for auto in heads if stock in getattr(transformers, auto)._model_mapping}
    assert set(entry.default.auto_classes) == known | {"AutoModelForCausalLM"} and len(known) >= 3


LOAD = (
    WITHOUT_PACKAGE
    + """
import json, torch, transformers
ids = torch.arange(3, 45).view(2, 21)
for folder in sys.argv[1:]:
    for auto in json.load(open(folder + "/config.json"))["auto_map"]:
        if auto == "AutoConfig":
            continue
        model = getattr(transformers, auto).from_pretrained(folder, trust_remote_code=True)
        assert all(type(x).__module__.startswith("transformers_modules.") for x in (model, model.base_model)), auto
        with torch.no_grad():
            torch.save(model.base_model(ids)[0], f"{folder}/{auto}.pt")
        if auto == "AutoModelForSequenceClassification":
            model.save_pretrained(folder + "/again")
            transformers.AutoModel.from_pretrained(folder + "/again", trust_remote_code=True)
"""
)


@pytest.mark.slow
@torch.no_grad()
def test_every_auto_class_without_the_package(tmp_path):
    expected = {}
    for backbone in MAKERS:
        student = saved(tmp_path / backbone, backbone, kinds=["linear", "softmax", "linear"])
        expected[backbone] = student.base_model(IDS).last_hidden_state
    saved(tmp_path / "landmark", "llama", LANDMARK)
    folders = [str(tmp_path / name) for name in (*expected, "landmark")]
    done = subprocess.run([sys.executable, "-c", LOAD, *folders], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for backbone, states in expected.items():
        for auto in BACKBONES[backbone].default.auto_classes:
            found = torch.load(tmp_path / backbone / f"{auto}.pt", weights_only=True)
            assert (found - states).abs().max() <= 1e-5, (backbone, auto)


@pytest.mark.parametrize("backbone", MAKERS)
@torch.no_grad()
def test_a_stock_classifier_converts_with_its_head(backbone, tmp_path):
    """And in the teacher arm it is the stock classifier, right- and left-padded rows included."""
    kind = AutoModelForSequenceClassification._model_mapping[type(MAKERS[backbone]().config)]
    teacher = kind(MAKERS[backbone](num_labels=3).config).eval()
    teacher.save_pretrained(tmp_path)
    student = linearize.convert(tmp_path)
    assert type(student).__name__ == f"Linearized{kind.__name__}"
    mask = torch.ones_like(IDS)
    mask[0, 17:] = mask[1, :4] = 0
    ids = IDS * mask
    call = {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
    with student.use_arm("teacher"):
        torch.testing.assert_close(student(ids, **call).logits, teacher(ids, **call).logits)
    alone = student(ids[:1, :17]).logits
    torch.testing.assert_close(student(ids, **call).logits[:1], alone, atol=1e-5, rtol=1e-5)
    with pytest.raises(linearize.UserError, match="has no language-modelling head"):
        load_model(tmp_path)
    with pytest.raises(linearize.UserError, match="has no language-modelling head"):
        linearize.finetune(student, [], FinetuneConfig(), output_dir=tmp_path)


@pytest.mark.parametrize("kind", [LlamaModel, MistralModel, GPT2Model, GPTJModel])
def test_a_checkpoint_without_a_head_converts_as_one(kind, tmp_path):
    backbone = kind.config_class.model_type
    teacher = MAKERS[backbone]().base_model
    teacher.save_pretrained(tmp_path)
    student = linearize.convert(tmp_path, {"type": "landmark", "block_size": 4})
    assert type(student).__name__ == f"Linearized{kind.__name__}"
    with student.use_arm("teacher"), torch.no_grad():
        expected = teacher(IDS).last_hidden_state
        torch.testing.assert_close(student(IDS).last_hidden_state, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("published", [False, True])
@torch.no_grad()
def test_heads_see_real_tokens_only(published, tmp_path):
    """One state for each token, its own: where a block ends too, whose landmark a language model reads."""
    mixers = {"landmark": {**LANDMARK["landmark"], "include_landmark_in_loss": published}}
    student = saved(tmp_path, "llama", mixers)
    states = []
    hook = student.model.norm.register_forward_hook(lambda _, args, output: states.append(output))
    student(IDS)
    hook.remove()
    places = torch.arange(21) + torch.arange(21) // 3  # of the tokens among landmarks
    expected = states[0][:, places]
    for auto in ("AutoModel", CLASSIFIER, TAGGER, READER):
        model = load(tmp_path, auto)
        output = model(IDS, output_hidden_states=True)
        assert all(
            torch.allclose(x, expected, atol=1e-5) for x in (output.hidden_states[-1], model.base_model(IDS)[0])
        )
        assert output[0].shape[:2] == ((2, 2) if auto == CLASSIFIER else (2, 21))


@pytest.mark.parametrize("mixers", [LINEAR, LANDMARK], ids=["linear", "landmark"])
@pytest.mark.parametrize("auto", [CLASSIFIER, TAGGER, READER])
def test_heads_train(auto, mixers, tmp_path):
    if mixers is LANDMARK:
        mixers = {"landmark": {**LANDMARK["landmark"], "include_landmark_in_loss": True}}
    saved(tmp_path, "llama", mixers)
    model = load(tmp_path, auto).train()
    labels = {CLASSIFIER: {"labels": torch.tensor([0, 1])}, TAGGER: {"labels": IDS % 2}}
    answer = {"start_positions": torch.tensor([1, 4]), "end_positions": torch.tensor([2, 9])}
    model(IDS, **labels.get(auto, answer)).loss.backward()
    missed = {name for name, x in model.named_parameters() if x.grad is None or not x.grad.any()}
    missed.discard("qa_outputs.bias")  # adds the same to every place's score
    # Weights of retrieval and of the published labels have no part in reading a whole text.
    assert all("mixer." in name for name in missed) and model.base_model.layers[0].self_attn.q_proj.weight.grad.any()
    if "linear" in mixers:
        assert not missed


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing`:FutureWarning")  # TRL sets it
def test_a_reward_model_trains(tmp_path):
    from datasets import Dataset
    from trl import RewardConfig, RewardTrainer

    tokenizer = make_tokenizer()
    saved(tmp_path, vocab_size=len(tokenizer))
    model = load(tmp_path, CLASSIFIER, num_labels=1)
    rows = [{"chosen": "the river ran", "rejected": "two cats slept"}, {"chosen": "river", "rejected": "cats"}]
    arguments = RewardConfig(
        str(tmp_path / "out"), max_steps=8, per_device_train_batch_size=2, learning_rate=1e-2, logging_steps=1,
        report_to=[], disable_tqdm=True, use_cpu=True, bf16=False, save_strategy="no",
    )  # fmt: skip
    trainer = RewardTrainer(model, arguments, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 8 and losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("mixers", [LINEAR, LANDMARK], ids=["linear", "landmark"])
def test_features_and_sentence_embeddings(mixers, tmp_path):
    from sentence_transformers import SentenceTransformer

    tokenizer = make_tokenizer()
    student = saved(tmp_path, "llama", mixers, vocab_size=len(tokenizer))
    tokenizer.save_pretrained(tmp_path)
    texts = ["the river ran past a house", "nobody spoke"]
    features = transformers.pipeline("feature-extraction", str(tmp_path))(texts, return_tensors=True)
    with torch.no_grad():
        expected = [student.model(tokenizer(x, return_tensors="pt").input_ids).last_hidden_state for x in texts]
    assert all(torch.allclose(x, y, atol=1e-5) for x, y in zip(features, expected, strict=True))
    vectors = SentenceTransformer(str(tmp_path), device="cpu").encode(texts, convert_to_tensor=True)
    torch.testing.assert_close(vectors, torch.stack([x[0, -1] for x in expected]))
    classify = transformers.pipeline("text-classification", str(tmp_path))
    assert len(classify(texts, batch_size=2)) == 2


@torch.no_grad()
def test_a_sentence_transformer_that_is_a_decoder_converts_as_one(tmp_path):
    """Its pooling comes along; within the window linear attention is softmax attention, so the vectors are equal."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Pooling, Transformer

    tokenizer = make_tokenizer()
    make_teacher(vocab_size=len(tokenizer)).model.save_pretrained(tmp_path / "body")
    tokenizer.save_pretrained(tmp_path / "body")
    body = Transformer(str(tmp_path / "body"))
    teacher = SentenceTransformer(modules=[body, Pooling(32, pooling_mode="mean")], device="cpu")
    teacher.save(str(tmp_path / "teacher"))
    assert main(["convert", str(tmp_path / "teacher"), str(tmp_path / "out"), "--attention.window", "64"]) == 0
    student = SentenceTransformer(str(tmp_path / "out"), device="cpu")
    assert type(student[0].auto_model).__name__ == "LinearizedLlamaModel" and student[1].pooling_mode == "mean"
    texts = ["the river ran past a house", "nobody spoke"]
    found, expected = (x.encode(texts, convert_to_tensor=True) for x in (student, teacher))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "pipeline_tag: feature-extraction" in card and "Generation keeps" not in card


class Mine(linearize.LinearizedLlamaForCausalLM):
    """A user's subclass, in a module of theirs."""


def test_a_subclass_is_saved_beside_the_backbone(tmp_path):
    model = Mine(make_student(make_teacher(), LINEAR).config)
    model.save_pretrained(tmp_path)
    names = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    assert names["AutoModel"] == "modeling_llama.LinearizedLlamaModel" and (tmp_path / "modeling_llama.py").is_file()
    assert names["AutoModelForCausalLM"] == "test_heads.Mine"
