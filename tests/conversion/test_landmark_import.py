"""Checkpoints in the published landmark code's layout, its forward written out, and what the import makes of them."""

import json
import subprocess
import sys

import pytest
import torch
from fakehub import FakeHub
from safetensors.torch import load_file, save_file
from tiny_models import make_teacher
from tiny_runs import WORDS, make_tokenizer
from torch.nn import functional
from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer

from linearize.cli import main
from linearize.config.record import read_record
from linearize.conversion.importers.landmark import import_landmark
from linearize.errors import UserError

FREQUENCY, CONTEXT = 5, 40
TEXT = " ".join(WORDS)
FIELDS = {
    "model_type": "llama_with_landmark",
    "mem_freq": FREQUENCY,
    "train_context_length": CONTEXT,
    "include_landmark_in_loss": True,
}
LEGACY = {"model_type": "llama"}


def published_tokenizer():
    """The base tokenizer, grown as the published training grows it: `[PAD]`, then `<landmark>`."""
    tokenizer = make_tokenizer()
    tokenizer.pad_token = None
    tokenizer.add_special_tokens({"pad_token": "[PAD]", "additional_special_tokens": ["<landmark>"]})
    return tokenizer


def write(path, fields=FIELDS, *, tokenizer=None, weights="safetensors", shards=1, rows=None, **changes):
    """A checkpoint, and the Llama in it; a buffer of old files lies beside its weights.

    Args:
        rows: of the vocabulary, where it is larger than the tokenizer.
        changes: of the Llama's config, and of config.json where the Llama has no such field.
    """
    tokenizer = published_tokenizer() if tokenizer is None else tokenizer
    own = {
        name: changes.pop(name) for name in list(changes) if name in ("mem_id", "rope_theta", "quantization_config")
    }
    groups = {"num_key_value_heads": 4, "hidden_size": 32, "head_dim": None, "num_hidden_layers": 2}
    teacher = make_teacher(**{"vocab_size": rows or len(tokenizer), "pad_token_id": None, **groups, **changes})
    teacher.save_pretrained(path)
    tokenizer.save_pretrained(path)
    config = json.loads((path / "config.json").read_text())
    for name in ("rope_parameters", "head_dim", "num_key_value_heads", "architectures"):
        config.pop(name, None)
    if fields["model_type"] != "llama":
        own = {"mem_id": tokenizer.convert_tokens_to_ids("<landmark>"), **own}
    (path / "config.json").write_text(json.dumps(config | fields | own))
    tensors = load_file(path / "model.safetensors")
    tensors["model.layers.1.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    store(path, tensors, weights, shards)
    return teacher


def store(path, tensors, weights="safetensors", shards=1):
    """Write the weights as one file or several, of one kind or the other."""
    (path / "model.safetensors").unlink(missing_ok=True)
    stem, suffix = ("model", "safetensors") if weights == "safetensors" else ("pytorch_model", "bin")
    save = save_file if weights == "safetensors" else torch.save
    if shards == 1:
        save(tensors, path / f"{stem}.{suffix}")
        return
    places = {}
    for i in range(shards):
        part, name = dict(list(tensors.items())[i::shards]), f"{stem}-{i + 1:05d}-of-{shards:05d}.{suffix}"
        save(part, path / name)
        places |= dict.fromkeys(part, name)
    (path / f"{stem}.{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


def grouped_softmax(scores, is_landmark):
    """The published softmax, query by query: one over the own block and earlier landmarks, which are gates, then one
    within each earlier block. `scores (B, H, T, T)`."""
    weights = torch.zeros_like(scores)
    ends = is_landmark.nonzero().flatten().tolist()
    for i in range(len(is_landmark)):
        earlier = [end for end in ends if end < i]
        start = earlier[-1] + 1 if earlier else 0
        local = [j for j in range(start, i + 1) if not is_landmark[j]]
        top = scores[..., i, local + earlier].softmax(-1)
        weights[..., i, local] = top[..., : len(local)]
        for block, end in enumerate(earlier):
            tokens = list(range(earlier[block - 1] + 1 if block else 0, end))
            gate = top[..., len(local) + block, None]
            weights[..., i, tokens] = gate * scores[..., i, tokens].softmax(-1)
    return weights


@torch.no_grad()
def published_logits(teacher, ids, mem_id, include):
    """The published forward on one text `(1, T)`: landmarks among the ids, and the logits of real tokens behind it.

    With the published labels a block's last token predicts the landmark, so what comes after it is predicted by the
    landmark.
    """
    slots, with_landmarks = [], []
    for count, token in enumerate(ids[0].tolist(), 1):
        slots.append(len(with_landmarks))
        with_landmarks.append(token)
        if count % FREQUENCY == 0:
            slots[-1] += include
            with_landmarks.append(mem_id)
    grown = torch.tensor([with_landmarks])

    def attend(module, query, key, value, attention_mask, scaling, **kwargs):
        key, value = (x.repeat_interleave(query.shape[1] // key.shape[1], 1) for x in (key, value))
        return (grouped_softmax(scaling * query @ key.mT, grown[0] == mem_id) @ value).transpose(1, 2), None

    AttentionInterface.register("published_landmark", attend)
    teacher.set_attn_implementation("published_landmark")
    return teacher(grown).logits[:, slots]


def text_ids(tokenizer, tokens):
    return tokenizer(TEXT * 9, return_tensors="pt").input_ids[:, :tokens]


@torch.no_grad()
@pytest.mark.parametrize("include", [True, False])
@pytest.mark.parametrize("tokens", [28, 30])
def test_the_import_computes_what_the_original_does(tmp_path, include, tokens):
    teacher = write(tmp_path / "published", {**FIELDS, "include_landmark_in_loss": include})
    found = import_landmark(tmp_path / "published")
    mem_id = found.settings["mem_id"]
    ids = text_ids(found.tokenizer, tokens)
    logits = found.model.double()(ids).logits
    expected = published_logits(teacher.double(), ids, mem_id, include)[..., :mem_id]
    assert logits.shape == expected.shape
    assert (logits - expected).abs().max() < 1e-5  # landmarks and tables of the rotation stay float32
    ordinary = published_logits(teacher, ids, mem_id, not include)[..., :mem_id]
    assert (logits - ordinary).abs().max() > 1e-2  # the labels matter


@torch.no_grad()
@pytest.mark.parametrize("include", [True, False])
def test_generation_follows_the_original(tmp_path, include):
    teacher = write(tmp_path / "published", {**FIELDS, "include_landmark_in_loss": include})
    found = import_landmark(tmp_path / "published")
    prompt = text_ids(found.tokenizer, 13)
    text = found.model.generate(prompt, min_new_tokens=15, max_new_tokens=15, do_sample=False, eos_token_id=None)
    expected = published_logits(teacher, text, found.settings["mem_id"], include)[..., : found.settings["mem_id"]]
    assert torch.equal(text[0, 13:], expected.argmax(-1)[0, 12:-1])


@torch.no_grad()
def test_shared_keys_are_told_by_the_weights(tmp_path):
    teacher = write(tmp_path / "published", num_key_value_heads=2)
    found = import_landmark(tmp_path / "published")
    assert found.model.config.num_key_value_heads == 2
    ids = text_ids(found.tokenizer, 30)
    expected = published_logits(teacher.double(), ids, found.settings["mem_id"], include=True)
    assert (found.model.double()(ids).logits - expected[..., :-1]).abs().max() < 1e-5


@torch.no_grad()
def test_the_landmark_becomes_a_parameter_and_other_ids_stay(tmp_path):
    teacher = write(tmp_path / "published")
    found = import_landmark(tmp_path / "published")
    model, rows = found.model, len(published_tokenizer())
    assert model.config.vocab_size == rows - 1 == len(found.tokenizer) == model.lm_head.weight.shape[0]
    assert torch.equal(model.model.mixer.embedding, teacher.model.embed_tokens.weight[-1])
    assert torch.equal(model.model.mixer.output, teacher.lm_head.weight[-1])
    assert torch.equal(model.model.embed_tokens.weight, teacher.model.embed_tokens.weight[:-1])
    before = published_tokenizer().get_vocab()
    assert before.pop("<landmark>") == rows - 1 and found.tokenizer.get_vocab() == before
    assert found.tokenizer(TEXT).input_ids == published_tokenizer()(TEXT).input_ids
    assert found.tokenizer.pad_token_id == model.config.pad_token_id == rows - 2  # [PAD] has its row
    settings = model.config.mixer(0)
    assert (settings.block_size, settings.top_k) == (6, 5)  # 40 tokens with 7 landmarks make 7 whole blocks, 2 local
    with_padding = found.tokenizer([TEXT, "the"], padding=True, return_tensors="pt")
    assert model(**with_padding).logits.isfinite().all()


def test_the_command_writes_a_repository(tmp_path, capsys):
    write(tmp_path / "published", weights="pickle", shards=3)
    assert main(["import", "landmark", str(tmp_path / "published"), str(tmp_path / "out")]) == 0
    assert f"{(ids := len(published_tokenizer()) - 1)} ids, {ids} was the landmark" in capsys.readouterr().out
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert loaded.config.model_type == "linearized_llama" and not hasattr(loaded.config, "mem_id")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert "<landmark>" not in (tmp_path / "out" / "tokenizer_config.json").read_text()
    assert str(tmp_path) not in (tmp_path / "out" / "tokenizer_config.json").read_text()
    ids = text_ids(tokenizer, 60)
    out = loaded.generate(ids, min_new_tokens=20, max_new_tokens=20, do_sample=False)
    assert out.shape == (1, 80) and int(out.max()) < loaded.config.vocab_size
    record = read_record(tmp_path / "out")
    assert record["teacher"] == "published" and record["recipe"]["imported"]["mem_freq"] == FREQUENCY
    card = (tmp_path / "out" / "README.md").read_text()
    assert "published code" in card and "Nothing has been trained" not in card and "constant size" not in card
    words = ["import", "landmark", str(tmp_path / "published"), str(tmp_path / "out")]
    assert main(words) == 2 and "--overwrite" in capsys.readouterr().err
    assert main([*words, "--overwrite", "--top_k", "3", "--dtype", "bfloat16"]) == 0
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.config.mixer(0).top_k == 3 and loaded.dtype == torch.bfloat16
    assert loaded.model.mixer.embedding.dtype == torch.float32


@torch.no_grad()
@pytest.mark.parametrize("weights, shards", [("safetensors", 1), ("safetensors", 2), ("pickle", 1), ("pickle", 2)])
def test_every_kind_of_file_gives_the_same_model(tmp_path, weights, shards):
    teacher = write(tmp_path / "published", weights=weights, shards=shards)
    state = import_landmark(tmp_path / "published").model.state_dict()
    kept = {name: tensor for name, tensor in teacher.state_dict().items() if tensor.shape[0] != teacher.vocab_size}
    assert all(torch.equal(state[name], tensor) for name, tensor in kept.items()) and len(kept) == len(state) - 4


def test_old_pickles_that_cannot_be_mapped(tmp_path):
    teacher = write(tmp_path / "published")
    (tmp_path / "published" / "model.safetensors").unlink()
    file = tmp_path / "published" / "pytorch_model.bin"
    torch.save(teacher.state_dict(), file, _use_new_zipfile_serialization=False)
    assert torch.equal(import_landmark(tmp_path / "published").model.model.norm.weight, teacher.model.norm.weight)


@torch.no_grad()
def test_a_checkpoint_of_the_first_version_takes_flags(tmp_path, capsys):
    teacher = write(tmp_path / "published", LEGACY)
    mem_id = len(published_tokenizer()) - 1
    words = ["import", "landmark", str(tmp_path / "published"), str(tmp_path / "out"), "--mem_freq", str(FREQUENCY)]
    assert main(words) == 2  # 32001 is the default, and the tokenizer knows better
    assert f"give --mem_id {mem_id}" in capsys.readouterr().err
    assert main([*words, "--mem_id", str(mem_id)]) == 0
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").double()
    assert loaded.config.mixer(0).top_k == (512 + 511 // FREQUENCY) // (FREQUENCY + 1) - 2
    ids = text_ids(AutoTokenizer.from_pretrained(tmp_path / "out"), 33)
    expected = published_logits(teacher.double(), ids, mem_id, include=True)[..., :mem_id]
    assert (loaded(ids).logits - expected).abs().max() < 1e-5


def test_published_defaults(tmp_path):
    write(tmp_path / "published", LEGACY, rows=32002, tokenizer=make_tokenizer(), hidden_size=8, num_hidden_layers=1)
    found = import_landmark(tmp_path / "published", mem_id=32001)
    assert found.model.config.vocab_size == 32001 and found.model.model.mixer.include_in_loss
    assert (found.settings["block_size"], found.settings["top_k"]) == (51, 8)  # 522 positions, as trained


def test_short_training_contexts_leave_one_block(tmp_path):
    write(tmp_path / "published", {**FIELDS, "train_context_length": 7})
    assert import_landmark(tmp_path / "published").settings["top_k"] == 1


def test_a_block_size_is_the_frequency_with_the_landmark(tmp_path):
    write(tmp_path / "published", LEGACY)
    mem_id = len(published_tokenizer()) - 1
    assert import_landmark(tmp_path / "published", mem_id=mem_id, block_size=6).settings["mem_freq"] == 5
    with pytest.raises(UserError, match="give one"):
        import_landmark(tmp_path / "published", mem_id=mem_id, block_size=6, mem_freq=6)


@torch.no_grad()
def test_rows_behind_the_landmark_that_no_token_has_are_cut(tmp_path):
    teacher = write(tmp_path / "published", rows=576)
    found = import_landmark(tmp_path / "published")
    assert found.model.config.vocab_size == found.settings["mem_id"] == len(published_tokenizer()) - 1
    assert torch.equal(found.model.model.mixer.embedding, teacher.model.embed_tokens.weight[found.settings["mem_id"]])


@torch.no_grad()
def test_tied_embeddings(tmp_path):
    teacher = write(tmp_path / "published", tie_word_embeddings=True)
    model = import_landmark(tmp_path / "published").model
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model.model.mixer.output, teacher.model.embed_tokens.weight[-1])


@torch.no_grad()
def test_the_published_model_ignores_what_config_json_says_of_rope(tmp_path):
    teacher = write(tmp_path / "published", rope_theta=500000.0)
    found = import_landmark(tmp_path / "published")
    assert len(found.notes) == 1 and "rope_theta 500000" in found.notes[0]
    ids = text_ids(found.tokenizer, 12)
    expected = published_logits(teacher.double(), ids, found.settings["mem_id"], include=True)
    assert (found.model.double()(ids).logits - expected[..., :-1]).abs().max() < 1e-5


def test_another_tokenizer_may_stand_in(tmp_path):
    write(tmp_path / "published")
    for file in (tmp_path / "published").glob("tokenizer*"):
        file.unlink()
    with pytest.raises(UserError, match="--tokenizer"):
        import_landmark(tmp_path / "published")
    make_tokenizer().save_pretrained(tmp_path / "base")
    found = import_landmark(tmp_path / "published", tokenizer=str(tmp_path / "base"))
    assert found.tokenizer.get_vocab() == make_tokenizer().get_vocab()
    assert found.model.config.pad_token_id == make_tokenizer().pad_token_id


def test_tokenizer_files_of_transformers_4(tmp_path):
    write(tmp_path / "published")
    described = {str(number): {"content": word} for word, number in published_tokenizer().get_added_vocab().items()}
    names = {"bos_token": "<s>", "pad_token": "[PAD]", "additional_special_tokens": ["<landmark>"]}
    files = {
        "tokenizer_config": {**names, "added_tokens_decoder": described, "tokenizer_class": "LlamaTokenizer"},
        "special_tokens_map": names,
        "added_tokens": published_tokenizer().get_added_vocab(),
    }
    for name, contents in files.items():
        (tmp_path / "published" / f"{name}.json").write_text(json.dumps(contents))
    tokenizer = import_landmark(tmp_path / "published").tokenizer
    assert "<landmark>" not in tokenizer.all_special_tokens and len(tokenizer) == len(published_tokenizer()) - 1
    assert tokenizer.pad_token == "[PAD]" and tokenizer(TEXT).input_ids == published_tokenizer()(TEXT).input_ids
    (tmp_path / "published" / "tokenizer.json").unlink()
    (tmp_path / "published" / "tokenizer.model").write_bytes(b"pieces")
    with pytest.raises(UserError, match="no tokenizer that can be read: give one with --tokenizer"):
        import_landmark(tmp_path / "published")


def test_generation_settings_that_transformers_refuses_are_left_out(tmp_path):
    write(tmp_path / "published")
    settings = {"temperature": 0.9, "do_sample": False, "eos_token_id": 2, "pad_token_id": 32001}
    (tmp_path / "published" / "generation_config.json").write_text(json.dumps(settings))
    assert main(["import", "landmark", str(tmp_path / "published"), str(tmp_path / "out")]) == 0
    generation = AutoModelForCausalLM.from_pretrained(tmp_path / "out").generation_config
    assert generation.eos_token_id == 2 and generation.pad_token_id == len(published_tokenizer()) - 2


def grown_again():
    tokenizer = published_tokenizer()
    tokenizer.add_tokens(["<extra>"])
    return tokenizer


@pytest.mark.parametrize(
    "fields, options, flags, sentence",
    [
        ({**FIELDS, "model_type": "gpt2"}, {}, {}, "gpt2 model: only .* llama"),
        ({**FIELDS, "model_type": "linearized_llama"}, {}, {}, "only checkpoints of the published Llama code"),
        ({**FIELDS, "mem_freq": "often"}, {}, {}, "mem_freq is 'often'"),
        ({**FIELDS, "include_landmark_in_loss": 1}, {}, {}, "true or false"),
        (FIELDS, {}, {"mem_freq": 6}, "was trained with mem_freq 5"),
        (FIELDS, {}, {"top_k": 0}, "top_k"),
        (FIELDS, {"mem_id": 7}, {}, "not 7"),
        (FIELDS, {"mem_id": 600, "tokenizer": make_tokenizer()}, {}, "none for the landmark 600"),
        (FIELDS, {"tokenizer": make_tokenizer(), "mem_id": 7}, {}, "7 is .* no landmark"),
        (FIELDS, {"tokenizer": grown_again()}, {}, "'<extra>' .* is behind it"),
        (FIELDS, {"quantization_config": {"load_in_8bit": True}}, {}, "quantised"),
        (LEGACY, {}, {"mem_freq": 0}, "mem_freq is 0"),
        (LEGACY, {"tokenizer": make_tokenizer()}, {}, "nothing in .* says that it has a landmark"),
        (LEGACY, {"tokenizer": make_tokenizer()}, {"mem_id": 32001}, "none for the landmark 32001"),
    ],
)
def test_other_checkpoints_are_one_sentence(tmp_path, fields, options, flags, sentence):
    write(tmp_path / "published", fields, **options)
    with pytest.raises(UserError, match=sentence) as caught:
        import_landmark(tmp_path / "published", **flags)
    assert "\n" not in str(caught.value)


def without(weights, name):
    del weights[name]


def added(weights, name):
    weights[name] = torch.ones(3)


def shortened(weights, name):
    weights[name] = weights[name][:-1].clone()


def resized(weights, name):
    weights[name] = functional.pad(weights[name], (0, 1))


@pytest.mark.parametrize(
    "change, name, sentence",
    [
        (without, "model.embed_tokens.weight", "has no model.embed_tokens.weight"),
        (without, "model.layers.1.mlp.up_proj.weight", "lacks 1 weights"),
        (without, "lm_head.weight", "lacks 1 weights"),
        (resized, "model.layers.1.mlp.up_proj.weight", "other shapes"),
        (resized, "model.embed_tokens.weight", "other shapes"),
        (added, "model.layers.0.self_attn.q_proj.bias", "holds 1 weights"),
        (shortened, "lm_head.weight", "of outputs"),
    ],
)
def test_other_weights_are_one_sentence(tmp_path, change, name, sentence):
    write(tmp_path / "published")
    tensors = load_file(tmp_path / "published" / "model.safetensors")
    change(tensors, name)
    store(tmp_path / "published", tensors)
    with pytest.raises(UserError, match=sentence) as caught:
        import_landmark(tmp_path / "published")
    assert "\n" not in str(caught.value)


class Malicious:
    def __reduce__(self):
        return (print, ("run",))


def test_files_that_cannot_be_read_leave_nothing(tmp_path, capsys):
    source, out = tmp_path / "published", tmp_path / "out"
    write(source, weights="pickle", shards=2)
    first = sorted(source.glob("*.bin"))[0]
    whole = first.read_bytes()
    capsys.readouterr()
    cases = {
        "lacks pytorch_model-00001": lambda: first.unlink(),
        "cannot be read as a file of tensors": lambda: first.write_bytes(whole[: len(whole) // 2]),
        "cannot be read as a file of tensors (Weights only": lambda: torch.save({"x": Malicious()}, first),
        "holds other things than tensors": lambda: torch.save({"x": 1}, first),
    }
    for sentence, damage in cases.items():
        damage()
        assert main(["import", "landmark", str(source), str(out)]) == 2
        errors = capsys.readouterr()
        assert sentence in errors.err and errors.err.count("\n") == 1 and "run" not in errors.out.split()
    (source / "pytorch_model.bin.index.json").write_text('{"weight_map": {"x": "../x.bin"}}')
    assert main(["import", "landmark", str(source), str(out)]) == 2
    assert "restore the index" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["published"]


def test_checkpoints_of_the_other_code_base(tmp_path, capsys):
    (tmp_path / "exp").mkdir()
    torch.save({"model": {}}, tmp_path / "exp" / "ckpt.pt")
    for name in ("exp", "exp/ckpt.pt"):
        assert main(["import", "landmark", str(tmp_path / name), str(tmp_path / "out")]) == 2
        assert "lm_benchmark" in (sentence := capsys.readouterr().err) and "Llama code" in sentence
    (tmp_path / "empty").mkdir()
    assert main(["import", "landmark", str(tmp_path / "empty"), str(tmp_path / "out")]) == 2
    assert "no config.json" in capsys.readouterr().err


def test_a_checkpoint_of_the_hub(tmp_path):
    write(tmp_path / "safetensors")
    write(tmp_path / "pickles", weights="pickle", shards=2)
    run = "import sys; from linearize.cli import main; sys.exit(main(sys.argv[1:]))"
    with FakeHub() as hub:
        environment = hub.environment(tmp_path / "home")
        for name in ("safetensors", "pickles", "nothing"):
            if name != "nothing":
                hub.add_directory(f"tester/{name}", tmp_path / name)
            words = ["import", "landmark", f"tester/{name}", str(tmp_path / f"{name}-out")]
            ended = subprocess.run(
                [sys.executable, "-c", run, *words], env=environment, capture_output=True, text=True, timeout=120
            )
            assert ended.returncode == (2 if name == "nothing" else 0), ended.stderr
    assert "there is no directory and no Hub repository tester/nothing" in ended.stderr
    first, second = (load_file(tmp_path / f"{name}-out" / "model.safetensors") for name in ("safetensors", "pickles"))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    record = read_record(tmp_path / "pickles-out")
    assert record["teacher"] == "tester/pickles" and record["teacher_on_hub"] and record["teacher_revision"]


def test_an_output_over_its_source_is_refused(tmp_path, capsys):
    write(tmp_path / "published")
    source = str(tmp_path / "published")
    assert main(["import", "landmark", source, source, "--overwrite"]) == 2
    assert "overlaps" in capsys.readouterr().err and (tmp_path / "published" / "model.safetensors").is_file()
