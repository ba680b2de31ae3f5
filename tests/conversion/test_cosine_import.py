"""What the import makes of published cosine checkpoints, against the published forward written out."""

import json
import subprocess
import sys

import pytest
import torch
from cosine_toys import (
    BERT,
    EXPONENTS,
    FIELDS,
    GPTJ,
    KINDS,
    LAYERS,
    WIDTH,
    batch,
    published_bert,
    published_gptj,
    published_weights,
    write,
)
from fakehub import FakeHub
from safetensors.torch import load_file
from tiny_runs import WORDS, make_tokenizer
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer, DynamicCache, pipeline

from linearize.cli import main
from linearize.config.record import read_record
from linearize.conversion.importers.cosine import import_cosine
from linearize.errors import UserError
from linearize.modeling import LinearizedGPTJConfig, LinearizedGPTJForCausalLM


@torch.no_grad()
def test_bert_computes_what_the_original_does(tmp_path):
    weights = write(tmp_path / "published", "bert")
    found = import_cosine(tmp_path / "published")
    ids, mask, types = batch()
    logits = found.model.double()(ids, attention_mask=mask, token_type_ids=types).logits
    rows = zip(ids, mask, types, strict=True)
    expected = torch.stack([published_bert(weights, *row) for row in rows])  # padding among them
    assert (logits - expected).abs().max() < 1e-9 * expected.abs().max()
    assert type(found.model).__name__ == "LinearizedBertForMaskedLM"
    assert found.settings["scale_side"] == "query" and "next-sentence head" in found.notes[0]


@torch.no_grad()
def test_gptj_computes_what_the_original_does(tmp_path):
    weights = write(tmp_path / "published", "gptj")
    found = import_cosine(tmp_path / "published")
    ids, mask, _ = batch()
    model = found.model.double()
    logits = model(ids, attention_mask=mask).logits
    expected = torch.stack([published_gptj(weights, *row) for row in zip(ids, mask, strict=True)])
    assert (logits - expected).abs().max() < 1e-6 * expected.abs().max()  # tables of the rotation are float32
    ordinary = published_gptj(weights, ids[0], mask[0], side="query")
    assert (logits[0] - ordinary).abs().max() > 1e-2  # the side of the scale matters
    cache = DynamicCache(config=model.config)
    steps = [model(ids[:1, i : i + 1], past_key_values=cache, use_cache=True).logits for i in range(ids.shape[1])]
    assert (torch.cat(steps, 1) - logits[:1]).abs().max() < 1e-9 * logits.abs().max()
    assert type(model).__name__ == "LinearizedGPTJForCausalLM" and found.notes == []


@torch.no_grad()
def test_generation_follows_the_original(tmp_path):
    weights = write(tmp_path / "published", "gptj")
    found = import_cosine(tmp_path / "published")
    prompt = batch((9,))[0]
    text = found.model.generate(prompt, max_new_tokens=8, do_sample=False, eos_token_id=None)
    expected = published_gptj(weights, text[0], torch.ones(17, dtype=torch.long))
    assert torch.equal(text[0, 9:], expected.argmax(-1)[8:-1])


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_every_tensor_arrives(tmp_path, kind):
    weights = published_weights(kind)
    write(tmp_path / "pickle", kind, weights=weights)
    write(tmp_path / "safetensors", kind, weights=weights, safetensors=True)
    for name in ("pickle", "safetensors"):
        found = import_cosine(tmp_path / name)
        state = found.model.state_dict()
        for layer, attention in enumerate(found.model.mixer_attentions()):
            logit = weights[EXPONENTS[kind].format(layer)].flatten()
            assert torch.equal(attention.mixer.scales.exponent_logit, logit)
            assert [x for x, _ in attention.mixer.named_parameters()] == ["scales.exponent_logit"]
        shared = {x for x in state if x in weights}
        assert all(torch.equal(state[x], weights[x]) for x in shared)
        left = {x for x in weights if x not in state and "norm_const" not in x}
        dropped = ("attn.bias", "masked_bias", "position_ids", "seq_relationship.", "pooler.")
        assert all(any(part in x for part in dropped) for x in left)
        low, high = found.settings["exponents"]
        assert 0 < low < high < 1 and found.settings["layers"] == LAYERS
        settings = found.model.config.mixer(0)
        assert (settings.window, settings.sinks, settings.gain) == (0, 0, False)
        assert settings.scale_side == {"bert": "query", "gptj": "key"}[kind]
        assert (settings.directions, settings.gate) == ("rotated", "none")
        assert not hasattr(found.model.config, "fast_inference")


@torch.no_grad()
@pytest.mark.parametrize("kind, auto_class", [("bert", AutoModelForMaskedLM), ("gptj", AutoModelForCausalLM)])
def test_the_command_writes_a_repository(tmp_path, capsys, kind, auto_class):
    write(tmp_path / "published", kind)
    words = ["import", "cosine", str(tmp_path / "published"), str(tmp_path / "out")]
    assert main(words) == 0
    assert "2 layers of cosine attention, exponents 0." in (printed := capsys.readouterr().out)
    assert ("masked language model is kept" in printed) == (kind == "bert")
    loaded = auto_class.from_pretrained(tmp_path / "out", trust_remote_code=True)
    ids, mask, _ = batch()
    expected = import_cosine(tmp_path / "published").model(ids, attention_mask=mask).logits
    assert torch.equal(loaded(ids, attention_mask=mask).logits, expected)
    assert AutoTokenizer.from_pretrained(tmp_path / "out")(" ".join(WORDS)) == make_tokenizer()(" ".join(WORDS))
    record = read_record(tmp_path / "out")
    assert record["teacher"] == "published" and not record["teacher_on_hub"]
    assert record["recipe"]["imported"]["architecture"] == FIELDS[kind]["architectures"][0]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "published code" in card and "2409.18747" in card and "Nothing has been trained" not in card
    assert str(tmp_path) not in card
    assert not list((tmp_path / "out").glob("*.pt")) and not list((tmp_path / "out").glob("*.bin"))
    if kind == "gptj":
        assert len(pipeline("text-generation", str(tmp_path / "out"))("the river", max_new_tokens=3)) == 1
    capsys.readouterr()
    assert main(words) == 2 and "--overwrite" in capsys.readouterr().err
    assert main([*words, "--overwrite", "--dtype", "bfloat16"]) == 0
    loaded = auto_class.from_pretrained(tmp_path / "out")
    assert loaded.dtype == torch.bfloat16
    assert {x.dtype for x in loaded.mixer_state_dict().values()} == {torch.float32}


@torch.no_grad()
def test_a_checkpoint_that_was_finetuned_keeps_its_head(tmp_path):
    weights = {name: x for name, x in published_weights("bert").items() if not name.startswith("cls.")}
    weights |= {"classifier.weight": torch.randn(3, WIDTH), "classifier.bias": torch.randn(3)}
    names = {str(i): f"LABEL_{i}" for i in range(3)}
    head = {"architectures": ["BertForSequenceClassification"], "id2label": names}
    write(tmp_path / "published", "bert", weights=weights, fields=BERT | head)
    model = import_cosine(tmp_path / "published").model
    assert type(model).__name__ == "LinearizedBertForSequenceClassification"
    assert torch.equal(model.classifier.weight, weights["classifier.weight"])
    assert torch.equal(model.bert.pooler.dense.weight, weights["bert.pooler.dense.weight"])


def test_a_tokenizer_may_be_given_and_may_be_missing(tmp_path, capsys):
    write(tmp_path / "published", "gptj", tokenizer=False)
    found = import_cosine(tmp_path / "published")
    assert found.tokenizer is None and "--tokenizer EleutherAI/gpt-j-6b" in found.notes[0]
    make_tokenizer().save_pretrained(tmp_path / "base")
    words = [str(tmp_path / "published"), str(tmp_path / "out"), "--tokenizer", str(tmp_path / "base")]
    assert main(["import", "cosine", *words]) == 0 and "No tokenizer" not in capsys.readouterr().out
    assert len(AutoTokenizer.from_pretrained(tmp_path / "out")) == len(make_tokenizer())
    (tmp_path / "published" / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="no tokenizer that can be read: give one with --tokenizer"):
        import_cosine(tmp_path / "published")


def test_generation_settings_that_transformers_refuses_are_left_out(tmp_path):
    write(tmp_path / "published", "gptj")
    settings = {"temperature": 0.9, "do_sample": False, "eos_token_id": 2}
    (tmp_path / "published" / "generation_config.json").write_text(json.dumps(settings))
    assert main(["import", "cosine", str(tmp_path / "published"), str(tmp_path / "out")]) == 0
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").generation_config.eos_token_id == 2


@pytest.mark.parametrize(
    "kind, fields, stock",
    [
        ("bert", BERT, "BertForPreTraining"),
        ("gptj", GPTJ, "GPTJForCausalLM"),
        ("gptj", {x: y for x, y in GPTJ.items() if x != "architectures"}, "GPTJForCausalLM"),
    ],
)
def test_softmax_checkpoints_need_no_import(tmp_path, capsys, kind, fields, stock):
    weights = {name: x for name, x in published_weights(kind).items() if "norm_const" not in name}
    write(tmp_path / "softmax", kind, weights=weights, fields=fields)
    assert main(["import", "cosine", str(tmp_path / "softmax"), str(tmp_path / "out")]) == 2
    sentence = capsys.readouterr().err
    assert f"load it with {stock} of transformers" in sentence and sentence.count("\n") == 1
    assert not (tmp_path / "out").exists()


def without(weights, name):
    del weights[name]


def reshaped(weights, name):
    weights[name] = weights[name].flatten()


def more_heads(weights, name):
    weights[name] = weights[name].repeat(1, 2, 1, 1)


def infinite(weights, name):
    weights[name] = weights[name] / 0


def shortened(weights, name):
    weights[name] = weights[name][:-1].clone()


def added(weights, name):
    weights[name] = torch.ones(3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "change, name, sentence",
    [
        (without, "{}", "lacks .*1.*norm_const, the exponents of one of its layers"),
        (reshaped, "{}", r"has the shape \(., but|has the shape \(.,\), but"),
        (more_heads, "{}", r"has the shape \(1, ., 1, 1\), but . heads have \(1, ., 1, 1\)"),
        (infinite, "{}", "not finite"),
        (without, "ffn", "lacks 1 weights"),
        (shortened, "ffn", "other shapes"),
        (added, "transformer.h.7.attn.norm_const", "holds 1 weights"),
    ],
)
def test_other_weights_are_one_sentence(tmp_path, kind, change, name, sentence):
    weights = published_weights(kind)
    ffn = {"bert": "bert.encoder.layer.1.intermediate.dense.weight", "gptj": "transformer.h.1.mlp.fc_in.weight"}
    change(weights, ffn[kind] if name == "ffn" else name.format(EXPONENTS[kind].format(1)))
    write(tmp_path / "published", kind, weights=weights)
    with pytest.raises(UserError, match=sentence) as caught:
        import_cosine(tmp_path / "published")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "kind, changes, sentence",
    [
        ("gptj", {"model_type": "gpt2"}, "is a gpt2 model: only the published cosine checkpoints"),
        ("gptj", {"model_type": "linearized_gptj"}, "only the published cosine checkpoints"),
        ("gptj", {"n_head": 4}, "4 heads have"),
        ("gptj", {"rotary_dim": 7}, "rotary_dim is 7"),
        ("gptj", {"n_layer": 3}, "lacks transformer.h.2.attn.norm_const"),
        ("gptj", {"n_embd": "wide"}, "holds a value that it cannot have"),
        ("bert", {"position_embedding_type": "relative_key"}, "relative_key positions"),
        ("bert", {"is_decoder": True}, "a converted BERT is an encoder"),
        ("bert", {"quantization_config": {"load_in_8bit": True}}, "quantised"),
    ],
)
def test_other_configs_are_one_sentence(tmp_path, kind, changes, sentence):
    write(tmp_path / "published", kind, fields={**FIELDS[kind], **changes})
    with pytest.raises(UserError, match=sentence) as caught:
        import_cosine(tmp_path / "published")
    assert "\n" not in str(caught.value)


class Malicious:
    def __reduce__(self):
        return (print, ("run",))


def test_what_is_no_checkpoint_leaves_nothing(tmp_path, capsys):
    source, out = tmp_path / "published", tmp_path / "out"
    write(source, "gptj")
    file, config = source / "pytorch_model.bin", source / "config.json"
    whole = file.read_bytes()
    capsys.readouterr()
    cases = {
        "cannot be read as a file of tensors": lambda: file.write_bytes(whole[: len(whole) // 2]),
        "cannot be read as a file of tensors (Weights only": lambda: torch.save({"x": Malicious()}, file),
        "holds other things than tensors": lambda: torch.save({"x": 1}, file),
        "has no model.safetensors and no pytorch_model.bin": lambda: file.unlink(),
        "is not valid JSON": lambda: config.write_text("{"),
        "no directory with a config.json": lambda: config.unlink(),
    }
    for sentence, damage in cases.items():
        damage()
        assert main(["import", "cosine", str(source), str(out)]) == 2
        errors = capsys.readouterr()
        assert sentence in errors.err and errors.err.count("\n") == 1 and "run" not in errors.out.split()
    (tmp_path / "file.bin").write_bytes(whole)
    assert main(["import", "cosine", str(tmp_path / "file.bin"), str(out)]) == 2
    assert "no directory with a config.json" in capsys.readouterr().err
    assert main(["import", "cosine", str(tmp_path / "nowhere"), str(out)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file.bin", "published"]


def test_an_output_over_its_source_is_refused(tmp_path, capsys):
    write(tmp_path / "published", "gptj")
    source = str(tmp_path / "published")
    assert main(["import", "cosine", source, source, "--overwrite"]) == 2
    assert "overlaps" in capsys.readouterr().err and (tmp_path / "published" / "pytorch_model.bin").is_file()
    assert main(["import", "cosine", source, str(tmp_path / "out"), "--dtype", "int8"]) == 2
    assert "--dtype is 'int8'" in capsys.readouterr().err


def test_a_checkpoint_of_the_hub(tmp_path):
    write(tmp_path / "pickles", "bert")
    run = "import sys; from linearize.cli import main; sys.exit(main(sys.argv[1:]))"
    with FakeHub() as hub:
        environment = hub.environment(tmp_path / "home")
        hub.add_directory("tester/pickles", tmp_path / "pickles")
        words = ["import", "cosine", "tester/pickles", str(tmp_path / "out")]
        ended = subprocess.run(
            [sys.executable, "-c", run, *words], env=environment, capture_output=True, text=True, timeout=120
        )
    assert ended.returncode == 0, ended.stderr
    assert "bert.encoder.layer.1.attention.self.mixer.scales.exponent_logit" in load_file(
        tmp_path / "out" / "model.safetensors"
    )
    record = read_record(tmp_path / "out")
    assert record["teacher"] == "tester/pickles" and record["teacher_on_hub"] and record["teacher_revision"]


@pytest.mark.parametrize("width, inner, millions", [(1024, 3072, 313.1), (2048, 8192, 1213.4)], ids=["300M", "1.2B"])
def test_the_published_shapes_have_the_published_sizes(width, inner, millions):
    """Parameters of the two language models, one exponent for each of 16 heads in 20 layers among them."""
    shape = {"n_embd": width, "n_layer": 20, "n_head": 16, "n_inner": inner, "rotary_dim": 64, "n_positions": 1024}
    attention = {"type": "cosine", "window": 0, "sinks": 0, "gain": False, "scale_side": "key"}
    with torch.device("meta"):
        model = LinearizedGPTJForCausalLM(LinearizedGPTJConfig(**shape, mixers={"cosine": attention}))
    assert round(model.num_parameters() / 1e6, 1) == millions
    assert sum(tensor.numel() for tensor in model.mixer_state_dict().values()) == 320
