"""An encoder's stages: rows of sentences, masks, losses, the whole run, resuming it, and bad input."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from scipy.stats import spearmanr
from tiny_models import make_bert, make_student, perturb
from tiny_runs import make_bert_directory, make_bert_tokenizer, make_teacher_directory
from torch.nn import functional
from torch.utils.data import Subset
from transformers import AutoModelForMaskedLM, BertForMaskedLM, pipeline

import linearize
from linearize.cli import main
from linearize.config.embeddings import EmbeddingConfig
from linearize.config.full_training import FullTrainingConfig
from linearize.config.settings import DataConfig, TransferConfig
from linearize.conversion.students import load_encoder
from linearize.data.masking import Masking
from linearize.data.rows import collate, held_out_documents, prepare_rows, split_sentences
from linearize.errors import UserError
from linearize.evaluation.embeddings import (
    EmbeddingEvaluation,
    EmbeddingReport,
    adjacent_pairs,
    adjacent_recall,
    embed,
    rank_correlation,
    sentence_embeddings,
)
from linearize.evaluation.masked import masked_perplexity, masked_scores
from linearize.runs.engine import run
from linearize.runs.settings import resolve_run
from linearize.stages.encoder_training import distill_embeddings, without_dropout
from linearize.stages.full_training import train_all
from linearize.stages.transfer import transfer_attention
from linearize.stages.transfer_loss import LayerLosses
from linearize.training.mixed_precision import leave_mixed_precision

DEMO_TEXT = Path(linearize.__file__).parent / "demo_text"
MIXERS = {"linear": {"type": "linear", "window": 3, "sinks": 1}}
STEPS = {"batch_size": 8, "tokens_per_step": 8 * 48, "logging_steps": 1}
TRAIN_ALL = {"kind": "train", "weights": "all"}
MASKED = {"objective": "masked", "mixer_learning_rate": 1e-3, "weight_decay": 0.01, "adam_beta2": 0.999, **STEPS}
"""Of hidden words, as the preset of BERT has them."""


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def data(cache):
    return {
        "dataset": str(DEMO_TEXT / "train.jsonl.gz"),
        "validation": str(DEMO_TEXT / "validation.jsonl.gz"),
        "sequence_length": 48,
        "max_tokens": 20_000,
        "cache_dir": cache,
    }


@pytest.fixture
def rows(data):
    return prepare_rows(DataConfig(**data), make_bert_tokenizer())


# --- rows


def test_sentences_of_a_text():
    text = 'One came home late. "Two were gone," he said. Was it (three or four)? Yes!\nA heading\nThis line has none'
    assert split_sentences(text) == [
        "One came home late.",
        '"Two were gone," he said.',
        "Was it (three or four)?",
        "This line has none",
    ]
    assert split_sentences("1 2 3 4 5 6") == [] == split_sentences("")


def test_rows_are_whole_sentences_between_marks(rows, data):
    train, validation = rows
    tokenizer = make_bert_tokenizer()
    assert len(train) > 300 and len(validation) > 50 and train.sequence_length == 48
    row = train[5]
    real = row["input_ids"][row["attention_mask"].bool()]
    assert real[0] == tokenizer.cls_token_id and real[-1] == tokenizer.sep_token_id
    assert (row["input_ids"][len(real) :] == tokenizer.pad_token_id).all()
    batch = collate([train[i] for i in range(4)])
    longest = max(int(train.lengths[i]) for i in range(4))
    assert batch["input_ids"].shape[1] - longest in range(8) and batch["input_ids"].shape[1] % 8 == 0
    single = prepare_rows(DataConfig(**{**data, "sentences_per_row": 1}), tokenizer)[0]
    assert single.lengths.mean() < train.lengths.mean()
    again = prepare_rows(DataConfig(**data), tokenizer)[0]
    assert torch.equal(again[7]["input_ids"], train[7]["input_ids"])


def test_documents_are_carved_off(tmp_path, cache):
    names = [first + second for first in "abcdefgh" for second in "vwxyz"]
    texts = [f"Document {name} has one sentence. And then another one of {name} follows." for name in names]
    (tmp_path / "text.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in [*texts, texts[0]]))
    config = {"dataset": str(tmp_path / "text.jsonl"), "sequence_length": 48, "cache_dir": cache}
    config = DataConfig(**config, validation_documents=3)
    train, validation = prepare_rows(config, make_bert_tokenizer())
    held_out = held_out_documents(config)
    assert len(held_out) == 3 and len(validation) in range(3, 7) and len(train) >= 36
    kept = {tuple(train[i]["input_ids"].tolist()) for i in range(len(train))}
    assert not kept & {tuple(validation[i]["input_ids"].tolist()) for i in range(len(validation))}


# --- masks


def test_masking_hides_a_share_of_ordinary_tokens():
    tokenizer = make_bert_tokenizer()
    masking = Masking.of(tokenizer, 0.15)
    ids = torch.randint(40, 70, (64, 100))
    ids[:, 0], ids[:, 80:] = tokenizer.cls_token_id, tokenizer.pad_token_id
    mask = (torch.arange(100) < 80).long().expand(64, 100)
    hidden = masking.hide({"input_ids": ids, "attention_mask": mask}, range(64))
    chosen = hidden["labels"] != -100
    assert not chosen[:, 0].any() and not chosen[:, 80:].any()
    assert abs(chosen[:, 1:80].double().mean() - 0.15) < 0.02
    assert torch.equal(hidden["labels"][chosen], ids[chosen])
    assert torch.equal(hidden["input_ids"][~chosen], ids[~chosen])
    shown = hidden["input_ids"][chosen]
    assert abs((shown == tokenizer.mask_token_id).double().mean() - 0.8) < 0.05
    assert 0.07 < (shown == ids[chosen]).double().mean() < 0.15
    tokenizer.mask_token = None
    with pytest.raises(UserError, match="no mask token"):
        Masking.of(tokenizer, 0.15)


def test_the_same_tokens_are_hidden_in_every_measurement(rows):
    """Whatever the batch and its padding."""
    masking = Masking.of(make_bert_tokenizer(), 0.3)
    chosen = [rows[1][i] for i in range(12)]
    whole = masking.hide({name: torch.stack([row[name] for row in chosen]) for name in chosen[0]}, range(12))
    for i in range(12):
        alone = masking.hide(collate([chosen[i]]), [i])
        width = alone["input_ids"].shape[1]
        assert all(torch.equal(alone[name][0], whole[name][i, :width]) for name in alone)
    model = make_bert(kind=BertForMaskedLM, vocab_size=85)
    found = [masked_scores(model, chosen, masking, arm=None, batch_size=size) for size in (1, 5, 12)]
    assert len({(scores.tokens, scores.accuracy) for scores in found}) == 1
    assert [scores.nll for scores in found] == pytest.approx([found[0].nll] * 3, rel=1e-6)


# --- evaluation


def test_embeddings_are_means_over_real_tokens():
    tokenizer, model = make_bert_tokenizer(), make_bert(vocab_size=85)
    texts = ["two old cats slept", "the river ran past a small red house where two old cats slept", "snow"]
    found = embed(model, tokenizer, texts, None, batch_size=2)
    for text, row in zip(texts, found, strict=True):
        with torch.no_grad():
            states = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
        assert torch.allclose(row.float(), functional.normalize(states.mean(0), dim=0), atol=1e-6)
    states = torch.randn(2, 5, 4)
    states[0, 3:] = torch.nan
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    assert torch.allclose(sentence_embeddings(states, mask).norm(dim=-1), torch.ones(2))


def test_recall_and_rank_correlation():
    ours, theirs = functional.normalize(torch.randn(2, 30, 6, dtype=torch.float64), dim=-1).unbind()
    assert adjacent_recall(ours, ours) == 1.0
    assert adjacent_recall(ours[:4], ours[[1, 0, 2, 3]]) == 0.5
    ours[3] = ours[4]  # equal similarities share their rank
    above = torch.triu_indices(30, 30, 1)
    expected = spearmanr(*((x @ x.T)[above[0], above[1]] for x in (ours, theirs))).statistic
    assert rank_correlation(ours, theirs) == pytest.approx(expected, abs=1e-6)
    assert rank_correlation(ours[:2], theirs[:2]) is None


def test_pairs_are_neighbours_of_one_document():
    documents = [" ".join(f"This is sentence {n} of text {d}." for n in range(5)) for d in range(3)]
    pairs = adjacent_pairs(documents, 10)
    assert len(pairs) == 6 == len({sentence for pair in pairs for sentence in pair}) // 2
    assert all(first.split()[-1] == second.split()[-1] for first, second in pairs)
    assert adjacent_pairs(documents, 4) == pairs[:4] == adjacent_pairs([*documents, documents[0]], 4)
    with pytest.raises(UserError, match="no two adjacent sentences"):
        adjacent_pairs(["Only one sentence is here."], 4)


def test_the_report_tells_students_from_the_teacher(tmp_path):
    tokenizer, teacher = make_bert_tokenizer(), make_bert(vocab_size=85)
    student = make_student(teacher, MIXERS)
    perturb(student)
    documents = [
        "The river ran past a house. Two old cats slept in it. Nobody spoke to them there. Snow fell late in winter."
    ]
    evaluation = EmbeddingEvaluation(documents, tokenizer)
    evaluation.measure("stock", teacher, None)
    evaluation.measure("teacher arm", student, "teacher")
    evaluation.measure("student", student)
    first, arm, last = evaluation.report.rows
    assert first.cosine == 1.0 and arm.cosine == pytest.approx(1.0, abs=1e-6) and last.cosine < 0.9999
    evaluation.report.save(tmp_path)
    saved = EmbeddingReport.from_dict(json.loads((tmp_path / "embeddings.json").read_text()))
    assert saved.rows == evaluation.report.rows and "recall@1 of 2" in (tmp_path / "embeddings.md").read_text()


# --- stages


def test_transfer_looks_both_ways_and_past_padding(rows, tmp_path):
    """The loss is that of the mechanism as the model runs it, and it falls; nothing else changes."""
    student = make_student(make_bert(vocab_size=85), MIXERS)
    batch = collate([rows[0][i] for i in range(4)])
    with LayerLosses(student, "relative_mse") as losses:
        losses.run(**batch, weights={"mixed": 1.0}, gradient_factor=None)
        found = losses.means(torch.device("cpu"))["mixed"][0]
    seen = []
    attention = student.mixer_attentions()[0]
    attention.observer = lambda *args: seen.append(args)
    with torch.no_grad(), student.use_arm("teacher"):
        student(**batch)
    attention.observer = None
    _, query, key, value, target, mask = seen[0]
    ours = attention.mixer(query, key, value, mask, causal=False)
    real = mask[:, None, :, None]
    expected = ((ours - target) * real).square().sum() / (target * real).square().sum()
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)

    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    config = TransferConfig(max_steps=25, **STEPS)
    validation = Subset(rows[1], range(3))
    result = transfer_attention(student, rows[0], config, output_dir=tmp_path, validation=validation)
    means = torch.tensor(result.losses_per_layer).mean(1)
    assert means[-5:].mean() < 0.9 * means[:5].mean()
    changed = {name for name, tensor in student.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == set(student.mixer_state_dict())


@pytest.mark.parametrize("weights", ["all", "attention"])
def test_distillation_brings_the_embeddings_closer(weights, rows, data, tmp_path):
    teacher = make_bert(vocab_size=85, hidden_dropout_prob=0.1)
    student = make_student(teacher, MIXERS, ["linear", "softmax", "linear"])
    perturb(student)
    tokenizer = make_bert_tokenizer()
    documents = held_out_documents(DataConfig(**data))
    evaluation = EmbeddingEvaluation(documents, tokenizer, pairs=60, max_length=48)
    evaluation.measure("teacher", teacher, None)
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    first = evaluation.measure("before", student).cosine
    rates = {"learning_rate": 1e-3, "mixer_learning_rate": 1e-2}
    config = EmbeddingConfig(max_steps=80, warmup_steps=2, weights=weights, **rates, **STEPS)
    result = distill_embeddings(student, teacher, rows[0], config, output_dir=tmp_path, device="cpu")
    last = evaluation.measure("after", student).cosine
    assert 1 - last < 0.5 * (1 - first) and len(result.losses) == 80
    changed = {name for name, tensor in student.state_dict().items() if not torch.equal(tensor, before[name])}
    names = {name.split(".")[0] for name in changed}
    assert names == ({"embeddings", "encoder"} if weights == "all" else {"encoder"})
    converted = ("encoder.layer.0.attention", "encoder.layer.2.attention")
    attention = {name for name in before if name.startswith(converted)}
    assert changed == attention if weights == "attention" else attention <= changed
    assert student.embeddings.dropout.p == 0.1 and all(p.requires_grad for p in student.parameters())
    record = json.loads(result.log_path.read_text().splitlines()[-1])
    assert record["loss"] == pytest.approx(record["embedding"] + record["similarity"] + record["hidden"], rel=1e-4)


def test_masked_language_modelling_learns(rows, tmp_path):
    student = make_student(make_bert(kind=BertForMaskedLM, vocab_size=85), MIXERS)
    tokenizer = make_bert_tokenizer()
    masking = Masking.of(tokenizer, 0.15)
    held_out = [rows[1][i] for i in range(40)]
    first = masked_perplexity(student, held_out, masking)
    assert masked_perplexity(student, held_out, masking, batch_size=40) == pytest.approx(first, rel=1e-5)
    config = FullTrainingConfig(max_steps=40, warmup_steps=2, learning_rate=3e-3, min_lr_ratio=0, **MASKED)
    hidden = {"tokenizer": tokenizer, "mask_probability": 0.15, "output_dir": tmp_path, "device": "cpu"}
    train_all(student, rows[0], config, **hidden)
    assert masked_perplexity(student, held_out, masking) < 0.6 * first
    with pytest.raises(UserError, match="no head that finds hidden tokens"):
        train_all(make_student(make_bert(vocab_size=85), MIXERS), rows[0], config, **hidden)


@pytest.mark.parametrize("stage", ["mlm", "distillation"])
def test_what_bfloat16_trained_is_measured_in_float32(stage, rows, tmp_path):
    """After a stage of mixed precision, and in the middle of one, as the same weights in a fresh model."""
    teacher, tokenizer = make_bert(kind=BertForMaskedLM, vocab_size=85), make_bert_tokenizer()
    student, fresh = (make_student(teacher, MIXERS) for _ in range(2))
    steps = {**STEPS, "max_steps": 2, "precision": "bfloat16", "learning_rate": 1e-3}
    masking, held_out = Masking.of(tokenizer, 0.15), [rows[1][i] for i in range(16)]
    texts = ["Two old cats slept in a house.", "Snow fell late in winter, and the river ran past it."]
    if stage == "mlm":
        hidden = {"tokenizer": tokenizer, "mask_probability": 0.15, "output_dir": tmp_path, "device": "cpu"}
        train_all(student, rows[0], FullTrainingConfig(**MASKED | steps, warmup_steps=1), **hidden)
    else:
        config = EmbeddingConfig(**steps)
        distill_embeddings(student, teacher, rows[0], config, output_dir=tmp_path, device="cpu")
    fresh.load_state_dict(student.state_dict())
    assert "forward" not in student.__dict__ and "forward" not in student.base_model.__dict__

    def figures(model):
        return masked_perplexity(model, held_out, masking), embed(model, tokenizer, texts)

    perplexity, embeddings = figures(fresh)
    assert figures(student)[0] == perplexity and torch.equal(figures(student)[1], embeddings)
    prepared = fresh if stage == "mlm" else fresh.base_model
    PartialState._reset_state()
    AcceleratorState._reset_state()
    Accelerator(mixed_precision="bf16", cpu=True).prepare_model(prepared)
    before = prepared.__dict__["forward"]
    for _ in range(2):
        assert figures(fresh)[0] == perplexity and torch.equal(figures(fresh)[1], embeddings)
    assert prepared.__dict__["forward"] is before
    leave_mixed_precision(fresh)
    assert "forward" not in prepared.__dict__ and figures(fresh)[0] == perplexity


@pytest.mark.parametrize("stage", ["mlm", "distillation"])
def test_the_cut_into_micro_batches_has_no_part_in_the_result(rows, tmp_path, stage):
    """Neither in what is hidden nor in the rows whose similarities are compared."""
    found = []
    for size in (8, 2, 1):
        student = make_student(make_bert(kind=BertForMaskedLM, vocab_size=85), MIXERS)
        perturb(student)
        steps = {**STEPS, "batch_size": size, "max_steps": 3, "learning_rate": 1e-3, "dropout": False}
        where = {"output_dir": tmp_path / str(size), "device": "cpu"}
        if stage == "mlm":
            where |= {"tokenizer": make_bert_tokenizer(), "mask_probability": 0.15}
            config = FullTrainingConfig(**MASKED | steps, warmup_steps=50)
            losses = [loss for _, loss in train_all(student, rows[0], config, **where).losses]
        else:
            config = EmbeddingConfig(**steps, similarity_weight=20.0)
            losses = distill_embeddings(student, make_bert(vocab_size=85), rows[0], config, **where).losses
        found.append((losses, student.state_dict()["bert.encoder.layer.0.attention.self.query.weight"]))
    for losses, weight in found[1:]:
        assert losses == pytest.approx(found[0][0], rel=1e-4)
        torch.testing.assert_close(weight, found[0][1], rtol=0, atol=2e-4)


def test_a_teacher_of_another_width_is_refused(rows, tmp_path):
    student = make_student(make_bert(vocab_size=85), MIXERS)
    with pytest.raises(UserError, match="width of the teacher is 32, but 64 of the student"):
        distill_embeddings(student, make_bert(hidden_size=32), rows[0], EmbeddingConfig(), output_dir=tmp_path)


def test_dropout_is_switched_off_and_on():
    student = make_student(make_bert(hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.5), MIXERS).train()
    ids = torch.randint(3, 80, (2, 12))
    for arm in ("mixed", "teacher"):
        with student.use_arm(arm):
            with without_dropout(student):
                assert torch.equal(*(student(ids).last_hidden_state for _ in range(2)))
            assert not torch.equal(*(student(ids).last_hidden_state for _ in range(2)))


# --- the run


@pytest.fixture
def settings(tmp_path, data):
    teacher = make_bert_directory(tmp_path / "teacher", kind=BertForMaskedLM, sentences=True)
    steps = {**STEPS, "max_steps": 6, "warmup_steps": 1, "save_steps": 3}
    return {
        "model_name_or_path": str(teacher),
        "output_dir": str(tmp_path / "out"),
        "device": "cpu",
        "attention": {"type": "linear", "window": 3, "sinks": 1},
        "softmax_layers": [1],
        "data": data,
        "stages": {
            "transfer": {"kind": "transfer", **STEPS, "max_steps": 4},
            "mlm": {**TRAIN_ALL, **MASKED, **steps},
            "distillation": {**TRAIN_ALL, "objective": "embeddings", **steps},
        },
        "evaluation": {"pairs": 20},
    }


ROWS = [
    "teacher",
    "student after conversion",
    "student after attention transfer",
    "student after mlm",
    "student",
    "student, window and sinks alone",
    "student, linear branch alone",
]


@pytest.mark.slow
def test_a_run_leaves_figures_and_a_repository(settings, tmp_path, capsys):
    result = run(settings)
    figures = {row.name: row for row in result.report.rows}
    assert list(figures) == ROWS
    assert all(row.masked_perplexity > 1 and 0 < row.cosine <= 1.0001 for row in figures.values())
    assert figures["student"].cosine > figures["student after mlm"].cosine
    stored = json.loads((result.output_dir / "report.json").read_text())
    assert stored["embeddings"] == result.report.to_dict()
    tokens = {"transfer": 4 * 384, "mlm": 6 * 384, "distillation": 6 * 384}
    assert {name: done["tokens"] for name, done in stored["stages"].items()} == tokens == result.record["tokens"]
    student = linearize.load_student(result.final)
    assert type(student).__name__ == "LinearizedBertForMaskedLM"
    assert student.config.mixer_types == ["linear", "softmax", "linear"]
    assert (result.final / "1_Pooling" / "config.json").is_file() and (result.final / "modules.json").is_file()
    card = (result.final / "README.md").read_text()
    assert "Embeddings of 40 held-out sentences" in card and "masked perplexity" in card and "fill-mask" in card
    assert str(tmp_path) not in (result.final / "linearize.json").read_text()
    assert pipeline("fill-mask", model=str(result.final), trust_remote_code=True)("two old [MASK] slept")
    assert isinstance(AutoModelForMaskedLM.from_pretrained(result.final), type(student))
    with pytest.raises(UserError, match="already holds a run"):
        run(settings)

    # A run that lost its end goes on from the last checkpoints and gives the same weights and figures.
    shutil.rmtree(result.final)
    (result.output_dir / "report.json").unlink()
    shutil.rmtree(result.output_dir / "checkpoints" / "distillation" / "step-6")
    again = run({**settings, "resume_from_checkpoint": True})
    for name, tensor in linearize.load_student(again.final).state_dict().items():
        assert torch.allclose(tensor, student.state_dict()[name], atol=1e-6), name
    assert [row.name for row in again.report.rows] == ROWS
    for row in again.report.rows:
        assert row.cosine == pytest.approx(figures[row.name].cosine, abs=1e-5)
    assert json.loads((result.output_dir / "report.json").read_text())["stages"].keys() == tokens.keys()
    capsys.readouterr()
    run({**settings, "resume_from_checkpoint": True})
    assert "is complete" in capsys.readouterr().out


def test_the_command_and_the_evaluation(settings, tmp_path, capsys):
    settings |= {"stages": {"transfer": settings["stages"]["transfer"]}, "evaluation": None}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
    assert main(["run", str(tmp_path / "tiny.yaml"), "--transfer.max_steps", "2"]) == 0
    final, text = str(tmp_path / "out" / "final"), str(DEMO_TEXT / "README.md")
    text = shutil.copy(text, tmp_path / "text.txt")
    capsys.readouterr()
    flags = ["--text", str(text), "--batch_size", "8", "--device", "cpu"]
    assert main(["evaluate", str(tmp_path / "out"), *flags, "--output", str(tmp_path / "figures")]) == 0
    own = json.loads((tmp_path / "figures" / "embeddings.json").read_text())["rows"]
    assert [row["name"] for row in own] == ["teacher", "student", "student, softmax arm", "student, linear arm"]
    teacher = settings["model_name_or_path"]
    assert main(["evaluate", final, *flags, "--teacher", teacher, "--output", str(tmp_path / "figures")]) == 0
    assert json.loads((tmp_path / "figures" / "embeddings.json").read_text())["rows"][1]["cosine"] == pytest.approx(
        own[1]["cosine"], abs=1e-6
    )
    assert main(["evaluate", teacher, *flags]) == 0
    assert "cosine to the teacher" in capsys.readouterr().out
    assert type(load_encoder(final)).__name__ == "LinearizedBertForMaskedLM"
    record = json.loads((tmp_path / "out" / "final" / "linearize.json").read_text())
    record["tokens"]["distillation"], record["trained"]["distillation"] = 5, "all"
    (tmp_path / "out" / "final" / "linearize.json").write_text(json.dumps(record))
    assert main(["evaluate", final, *flags]) == 2
    assert "name the teacher with --teacher" in capsys.readouterr().err
    assert main(["evaluate", final, *flags, "--speed"]) == 2
    assert "measured by its embeddings" in capsys.readouterr().err


def test_presets_are_valid():
    objectives = {"minilm_linear": "embeddings", "minilm_cosine": "embeddings", "bert_base_linear": "masked"}
    for name, objective in objectives.items():
        config = resolve_run(name)
        *_, last = config.stages.values()
        assert last.objective == objective, name
        for stage in config.stages.values():
            if hasattr(stage, "tokens"):
                assert stage.plan(config.data.sequence_length).tokens_per_step == stage.tokens_per_step, name


@pytest.mark.parametrize(
    "change, sentence",
    [
        (["--attention.type", "gain_cell"], "choose one of linear"),
        (["--attention", "{{type: linear, windw: 3}}"], "windw"),
        (["--data.sequence_length", "128"], "the teacher's context is 64 tokens"),
        (["--data.sentences_per_row", "0"], "at least 1"),
        (["--data.format", "chat"], "plain text"),
        (["--data.mask_probability", "1"], "below 1"),
        (["--distillation.hidden_weight", "-1"], "must not be negative"),
        (
            {"distillation": {"kind": "train", "objective": "embeddings", "weights": "heads"}},
            "weights all or attention",
        ),
        (["--evaluation.pairs", "0"], "at least 1"),
        (
            {"mlm": {**TRAIN_ALL, "objective": "masked", "tokens_per_step": 3072}},
            "has no head that finds hidden tokens",
        ),
        (["--distillation.batch_size", "7"], "multiple"),
        ({"transfer": {"kind": "transfer", "tokens_per_step": 100}}, "transfer.tokens_per_step is 100"),
        (
            {"transfer": {"kind": "transfer", "weights": "all"}},
            "kind transfer, which has no weights: leave it out",
        ),
        (["--evaluation.texts", "{train}"], "part of the training data"),
        (["--model_name_or_path", "{llama}"], "is no encoder"),
    ],
)
def test_bad_input_is_one_sentence(change, sentence, data, tmp_path, capsys):
    """Flags, or other stages."""
    stages = {"distillation": {**TRAIN_ALL, "objective": "embeddings", "tokens_per_step": 3072}}
    flags, stages = (change, stages) if isinstance(change, list) else ([], change)
    places = {"train": data["dataset"], "llama": ""}
    if "{llama}" in flags:
        places["llama"] = make_teacher_directory(tmp_path / "llama")
    settings = {
        "model_name_or_path": str(make_bert_directory(tmp_path / "teacher")),
        "output_dir": str(tmp_path / "out"),
        "device": "cpu",
        "data": {**data, "max_tokens": 2000},
        "stages": {name: {"max_steps": 1, **stage} for name, stage in stages.items()},
        "evaluation": {"pairs": 4},
    }
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
    capsys.readouterr()
    assert main(["run", str(tmp_path / "tiny.yaml"), *(word.format(**places) for word in flags)]) == 2
    error = capsys.readouterr().err
    assert sentence in error and "Traceback" not in error and error.count("\n") == 1
    assert not (tmp_path / "out" / "final").exists()
