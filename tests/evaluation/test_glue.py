"""GLUE: the nine tasks from local files, their metrics, and the table over seeds."""

import json
import math
import subprocess
import sys

import pytest
import torch
from glue_toys import examples, make_inputs, settings, write_task
from tiny_runs import make_bert_directory, make_bert_tokenizer
from transformers import AutoModelForSequenceClassification, BertForMaskedLM, BertForSequenceClassification, pipeline

import linearize
import linearize.conversion.students
from linearize.cli import main
from linearize.config.presets import all_presets
from linearize.config.yaml_io import resolve
from linearize.errors import UserError
from linearize.evaluation.glue.data import KINDS, collate, load_task, tokenize
from linearize.evaluation.glue.metrics import GlueMetrics
from linearize.evaluation.glue.report import Result, make_report
from linearize.evaluation.glue.settings import REVISION, GlueDataConfig, GlueRunConfig
from linearize.evaluation.glue.tasks import TASKS
from linearize.runs.glue import run_glue
from linearize.stages.glue_training import Finetuning, load_classifier, predict


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("glue"))


# --- metrics

KNOWN = {  # predictions, labels, figures by hand
    "cola": ([1, 1, 0, 0, 1, 0], [1, 0, 0, 0, 1, 1], {"matthews_correlation": (2 * 2 - 1 * 1) / 9}),
    "sst2": ([1, 0, 1, 1], [1, 0, 0, 1], {"accuracy": 0.75}),
    "mrpc": ([1, 1, 1, 0, 0], [1, 1, 0, 1, 0], {"accuracy": 0.6, "f1": 2 / 3}),
    "qqp": ([1, 1, 0, 0], [1, 0, 1, 0], {"accuracy": 0.5, "f1": 0.5}),
    "stsb": ([1.0, 2.0, 3.0, 10.0], [0.0, 1.0, 2.0, 3.0], {"pearson": 14 / math.sqrt(50 * 5), "spearmanr": 1.0}),
    "mnli": ([0, 1, 2, 2], [0, 1, 1, 2], {"accuracy": 0.75}),
    "qnli": ([0, 1], [1, 1], {"accuracy": 0.5}),
    "rte": ([0, 1], [0, 1], {"accuracy": 1.0}),
    "wnli": ([0, 1], [1, 0], {"accuracy": 0.0}),
}


def test_metrics_are_those_of_the_tasks():
    metrics = GlueMetrics()
    assert metrics.source.startswith("scikit-learn ") and " and scipy " in metrics.source
    assert set(KNOWN) == set(TASKS)
    for name, (predictions, labels, expected) in KNOWN.items():
        assert metrics.scores(name, predictions, labels) == pytest.approx(expected), name
        assert set(expected) == set(TASKS[name].metrics)
    assert metrics.scores("stsb", [2.0, 2.0, 2.0], [0.0, 1.0, 2.0]) == {"pearson": 0.0, "spearmanr": 0.0}
    assert metrics.scores("cola", [1, 1, 1], [0, 1, 1]) == {"matthews_correlation": 0.0}
    assert TASKS["mnli"].score_names == ["accuracy_matched", "accuracy_mismatched"]


def test_a_correlation_of_one_example_counts_as_0():
    assert GlueMetrics().scores("stsb", [2.0], [1.0]) == {"pearson": 0.0, "spearmanr": 0.0}


@pytest.mark.parametrize("missing", ["sklearn.metrics", "scipy.stats"])
def test_metrics_need_their_packages(missing, monkeypatch):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(UserError, match="need scikit-learn and scipy.*linearize\\[eval\\]"):
        GlueMetrics()


# --- data


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_file_holds_the_same(kind, tmp_path):
    for name in ("stsb", "mnli", "cola"):
        write_task(tmp_path, name, kind)
        data = load_task(name, GlueDataConfig(dataset=str(tmp_path)))
        expected = examples(name, 40, seed=len("train"))
        assert data.train.labels == [row["label"] for row in expected]
        assert data.train.texts == [[row[column] for row in expected] for column in TASKS[name].columns]
        assert list(data.validation) == list(TASKS[name].validation)
        assert all(len(split) == 12 for split in data.validation.values())
    cut = load_task("mnli", GlueDataConfig(dataset=str(tmp_path), max_examples=5))
    assert [len(cut.train), *map(len, cut.validation.values())] == [5, 5, 5]


def test_quotation_marks_and_names_of_classes(tmp_path):
    write_task(tmp_path, "cola", ".tsv")
    (tmp_path / "cola" / "train.tsv").write_text('sentence\tlabel\n"Two cats slept\tunacceptable\n\tacceptable\n')
    write_task(tmp_path, "sst2", ".csv")
    (tmp_path / "sst2" / "train.csv").write_text('label,sentence\npositive,"He said ""no"", twice"\n0,snow\n')
    config = GlueDataConfig(dataset=str(tmp_path))
    assert load_task("cola", config).train.texts == [['"Two cats slept', ""]]
    assert load_task("cola", config).train.labels == [0, 1]
    assert load_task("sst2", config).train.texts == [['He said "no", twice', "snow"]]
    assert load_task("sst2", config).train.labels == [1, 0]


def test_the_hub_is_asked_for_a_pinned_revision(monkeypatch):
    asked = []

    def load_dataset(name, config, *, split, revision):
        import datasets

        asked.append((name, config, split, revision))
        return datasets.Dataset.from_list(examples("mnli", 6))

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    data = load_task("mnli", GlueDataConfig())
    assert data.train.labels == [0, 1, 2, 0, 1, 2]
    splits = ("train", "validation_matched", "validation_mismatched")
    assert asked == [("nyu-mll/glue", "mnli", split, REVISION) for split in splits]

    def unreachable(*arguments, **options):
        raise ConnectionError("no route")

    monkeypatch.setattr("datasets.load_dataset", unreachable)
    with pytest.raises(UserError, match="cannot be reached .* set data.dataset to a folder that holds mnli/train.csv"):
        load_task("mnli", GlueDataConfig())
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match="pip install datasets, or set data.dataset to a folder"):
        load_task("mnli", GlueDataConfig())


def test_pairs_are_tokenised_and_padded(inputs):
    tokenizer = make_bert_tokenizer()
    data = load_task("rte", GlueDataConfig(dataset=str(inputs / "files")))
    rows = tokenize(data.train, tokenizer, 12)
    first, second = (column[0] for column in data.train.texts)
    assert max(map(len, rows.input_ids)) == 12
    whole = tokenize(data.train, tokenizer, 64)
    expected = tokenizer(first, second)
    assert whole[0]["input_ids"] == expected["input_ids"] and not any(whole[0]["token_type_ids"])
    tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]  # as BERT's own
    segments = tokenize(data.train, tokenizer, 64)[0]["token_type_ids"]
    assert segments == tokenizer(first, second)["token_type_ids"] and sum(segments) > 0
    batch = collate([whole[i] for i in range(4)], tokenizer.pad_token_id)
    width = batch["input_ids"].shape[1]
    assert width % 8 == 0 and all(tensor.shape == (4, width) for name, tensor in batch.items() if name != "labels")
    assert (batch["input_ids"][batch["attention_mask"] == 0] == tokenizer.pad_token_id).all()
    assert batch["labels"].dtype == torch.int64
    similarity = tokenize(load_task("stsb", GlueDataConfig(dataset=str(inputs / "files"))).train, tokenizer, 64)
    assert collate([similarity[0]], 0)["labels"].dtype == torch.float32


# --- models


def test_heads_are_new_and_the_same_for_teacher_and_student(inputs, tmp_path):
    def load(source, task="mnli", seed=0, **options):
        return load_classifier(Finetuning("x", str(source), None, task, 1e-5, seed), **options)

    (teacher, fresh), (student, _) = load(inputs / "teacher"), load(inputs / "student")
    assert type(teacher) is BertForSequenceClassification and not fresh
    assert type(student) is linearize.LinearizedBertForSequenceClassification
    assert teacher.config.num_labels == student.config.num_labels == 3
    assert student.config.id2label == {0: "entailment", 1: "neutral", 2: "contradiction"}
    assert torch.equal(teacher.classifier.weight, student.classifier.weight)
    assert not torch.equal(teacher.classifier.weight, load(inputs / "teacher", seed=1)[0].classifier.weight)
    assert torch.equal(teacher.bert.pooler.dense.weight, student.bert.pooler.dense.weight)
    regression = load(inputs / "student", "stsb")[0]
    assert (regression.config.num_labels, regression.config.problem_type) == (1, "regression")

    # Of a masked language model, which has no pooler, and of a model that was finetuned on another task.
    make_bert_directory(tmp_path / "masked", kind=BertForMaskedLM)
    masked, fresh = load(tmp_path / "masked")
    assert fresh == ["pooler"]
    reset, fresh = load(inputs / "student", reset_pooler=True)
    assert fresh == ["pooler"] and torch.equal(reset.bert.pooler.dense.weight, masked.bert.pooler.dense.weight)
    make_bert_directory(tmp_path / "tuned", kind=BertForSequenceClassification, num_labels=5)
    assert torch.equal(load(tmp_path / "tuned")[0].classifier.weight, teacher.classifier.weight)


def test_predictions_do_not_depend_on_the_batch(inputs):
    model, _ = load_classifier(Finetuning("x", str(inputs / "student"), None, "mnli", 1e-5, 0))
    data = load_task("mnli", GlueDataConfig(dataset=str(inputs / "files")))
    tokenizer = make_bert_tokenizer()
    rows = tokenize(data.train, tokenizer, 32)
    with torch.no_grad():
        alone = [
            model.eval()(**tokenizer(a, b, return_tensors="pt")).logits.argmax().item()
            for a, b in zip(*data.train.texts, strict=True)
        ]
    assert predict(model, rows, 1) == predict(model, rows, 7) == alone
    model, _ = load_classifier(Finetuning("x", str(inputs / "student"), None, "stsb", 1e-5, 0))
    one, several = predict(model, rows, 1), predict(model, rows, 7)
    assert several == pytest.approx(one, abs=1e-5) and isinstance(one[0], float)


@pytest.mark.slow
def test_nine_tasks_in_one_run(inputs, tmp_path, capsys):
    report = run_glue(settings(inputs, tmp_path / "out", tasks=list(TASKS), save_models=True)).report
    assert len(report.results) == 18 and report.models == ["teacher", "student"]
    lines = {(score.task, score.metric) for score in report.scores}
    assert {(name, metric) for name, task in TASKS.items() for metric in task.score_names} <= lines
    assert {("average", "9 tasks"), ("average without WNLI", "8 tasks")} <= lines
    average = report.score("student", "average")
    per_task = [[s.mean for s in report.scores if (s.model, s.task) == ("student", name)] for name in TASKS]
    assert average.mean == pytest.approx(sum(sum(values) / len(values) for values in per_task) / 9)
    assert all(score.spread is None for score in report.scores)
    assert {result.architecture for result in report.results} == {
        "BertForSequenceClassification",
        "LinearizedBertForSequenceClassification",
    }
    out = capsys.readouterr().out
    assert "Matthews correlation" in out and "accuracy, mismatched" in out and "difference" in out
    stored = json.loads((tmp_path / "out" / "report.json").read_text())
    assert stored["metrics"][0].startswith("scikit-learn") and len(stored["results"]) == 18
    table = (tmp_path / "out" / "report.md").read_text()
    assert "| STS-B | Pearson |" in table and "One seed (0)." in table and "Metrics by scikit-learn" in table
    assert not list((tmp_path / "out" / "checkpoints").rglob("step-*"))

    # The kept models are ordinary repositories that give the reported figures.
    final = tmp_path / "out" / "models" / "student" / "mnli" / "lr2e-05-seed0"
    model = AutoModelForSequenceClassification.from_pretrained(final)
    data = load_task("mnli", GlueDataConfig(dataset=str(inputs / "files")))
    for name, split in data.validation.items():
        found = predict(model, tokenize(split, make_bert_tokenizer(), 32), 5)
        accuracy = sum(a == b for a, b in zip(found, split.labels, strict=True)) / len(split)
        metric = "accuracy" + name.removeprefix("validation")
        assert report.score("student", "mnli", metric).mean == pytest.approx(accuracy)
    label = pipeline("text-classification", model=str(final), trust_remote_code=True)(
        {"text": "two", "text_pair": "old"}
    )
    assert label["label"] in TASKS["mnli"].labels
    assert "MNLI, validation examples" in (final / "README.md").read_text()
    assert type(AutoModelForSequenceClassification.from_pretrained(tmp_path / "out/models/teacher/stsb/lr2e-05-seed0"))


# --- training


LEARN = {"training__learning_rates": [2e-3], "training__batch_size": 16, "training__logging_steps": 20}


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, model, steps", [("sst2", "teacher", 60), ("sst2", "student", 60), ("stsb", "student", 120)]
)
def test_a_task_is_learned(name, model, steps, inputs, tmp_path):
    write_task(tmp_path, name, train=200, validation=60)
    changes = {**LEARN, "data__dataset": str(tmp_path), "models": [str(inputs / model)], "tasks": [name]}
    changes["training__max_steps"] = steps
    report = run_glue(settings(inputs, tmp_path / "out", **changes)).report
    assert report.score(model, name, TASKS[name].metrics[0]).mean > 0.9  # chance: 0.5 of sst2, 0 of stsb
    log = tmp_path / "out" / "logs" / model / name / "lr0.002-seed0.jsonl"
    losses = [json.loads(line)["loss"] for line in log.read_text().splitlines()]
    assert len(losses) == steps // 20 and losses[-1] < 0.5 * losses[0]


def test_evaluation_is_outside_mixed_precision(inputs, tmp_path):
    """What was trained under autocast is scored as a fresh load of it scores."""
    changes = {"tasks": ["stsb"], "models": [str(inputs / "student")], "save_models": True}
    report = run_glue(settings(inputs, tmp_path / "out", training__precision="bfloat16", **changes)).report
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out/models/student/stsb/lr2e-05-seed0")
    split = load_task("stsb", GlueDataConfig(dataset=str(inputs / "files"))).validation["validation"]
    found = predict(model, tokenize(split, make_bert_tokenizer(), 32), 64)
    scores = GlueMetrics().scores("stsb", found, split.labels)
    assert report.results[0].scores == pytest.approx(scores, abs=1e-6)


def test_a_cosine_student_is_finetuned(inputs, tmp_path):
    linearize.convert(inputs / "teacher", {"type": "cosine", "window": 0, "sinks": 0}).save_pretrained(tmp_path / "x")
    make_bert_tokenizer().save_pretrained(tmp_path / "x")
    changes = {"models": [str(tmp_path / "x")], "tasks": ["rte"], "save_models": True, "training__max_steps": 3}
    result = run_glue(settings(inputs, tmp_path / "out", **changes)).report.results[0]
    final = tmp_path / "out" / "models" / "x" / "rte" / "lr2e-05-seed0"
    start, model = (AutoModelForSequenceClassification.from_pretrained(path) for path in (tmp_path / "x", final))
    assert {mixer["type"] for mixer in model.config.mixers.values()} == {"cosine"}
    pairs = zip(start.bert.named_parameters(), model.bert.parameters(), strict=True)
    moved = {name for (name, before), after in pairs if not torch.equal(before, after)}
    assert any(".mixer." in name for name in moved) and "encoder.layer.0.attention.self.query.weight" in moved
    data = load_task("rte", GlueDataConfig(dataset=str(inputs / "files")))
    split = data.validation["validation"]
    found = predict(model, tokenize(split, make_bert_tokenizer(), 32), 5)
    assert result.scores["accuracy"] == sum(a == b for a, b in zip(found, split.labels, strict=True)) / len(split)


def test_two_seeds_give_mean_and_spread(inputs, tmp_path):
    changes = {"tasks": ["stsb"], "seeds": [3, 5], "training__learning_rates": [1e-3, 1e-5]}
    report = run_glue(settings(inputs, tmp_path / "out", models=[str(inputs / "student")], **changes)).report
    assert len(report.results) == 4
    score = report.score("student", "stsb", "pearson")
    values = {
        r.seed: r.scores["pearson"]
        for r in report.results
        if (r.task, r.learning_rate) == ("stsb", score.learning_rate)
    }
    assert score.seeds == values and values[3] != values[5]
    mean = (values[3] + values[5]) / 2
    assert score.mean == pytest.approx(mean)
    assert score.spread == pytest.approx(abs(values[3] - values[5]) / math.sqrt(2))
    assert f"{100 * score.mean:.2f} ± {100 * score.spread:.2f}" in (tmp_path / "out" / "report.md").read_text()
    assert any("best on these same examples, out of 1e-05, 0.001" in note for note in report.notes)
    assert any("over 2 seeds (3, 5)" in note for note in report.notes)


def result(model="a", task="sst2", rate=1e-5, seed=0, fresh=(), **scores):
    scores = scores or {"accuracy": 0.5}
    return Result(
        *(model, model, None, "", "Bert", task, rate, seed, scores, 10, 10, 1, 1.0, None, "cpu", list(fresh), "", "x")
    )


def test_the_best_rate_over_the_seeds_is_shown():
    found = [result(rate=1e-5, seed=s, accuracy=a) for s, a in enumerate((0.6, 0.9))]
    found += [result(rate=2e-5, seed=s, accuracy=a) for s, a in enumerate((0.8, 0.8))]
    found += [result("b", rate=1e-5, seed=0, accuracy=1.0, fresh=["pooler"])]
    found += [result("a", "rte", seed=s, accuracy=0.5) for s in (0, 1)]
    report = make_report(found, ["a", "b"], {"max_examples": 7})
    score = report.score("a", "sst2")
    assert (score.learning_rate, score.mean, score.spread) == (2e-5, 0.8, 0.0)
    assert report.score("b", "sst2").spread is None
    assert report.table().rows[0] == ["SST-2", "accuracy", "80.00 ± 0.00", "100.00", "+20.00"]
    assert report.table().rows[1] == ["RTE", "accuracy", "50.00 ± 0.00", "-", "-"]
    assert report.score("a", "average").seeds == {0: 0.65, 1: 0.65}
    assert not [s for s in report.scores if (s.model, s.task) == ("b", "average")]
    notes = " ".join(report.notes)
    assert "The pooler of b started at random, unlike that of a" in notes and "first 7 examples" in notes


# --- the command


def test_the_command_with_flags(inputs, tmp_path, capsys):
    flags = ["--models", str(inputs / "teacher"), "--names", "softmax", "--tasks", "CoLA,SST-2", "--seeds", "4"]
    flags += ["--data.dataset", str(inputs / "files"), "--data.sequence_length", "32", "--training.max_steps", "1"]
    flags += ["--training.learning_rates", "1e-5", "--device", "cpu", "--output_dir", str(tmp_path / "out")]
    assert main(["glue", *flags]) == 0
    assert "softmax" in capsys.readouterr().out
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [result["task"] for result in report["results"]] == ["cola", "sst2"]
    assert main(["glue", "--output_dir", str(tmp_path / "out"), "--resume_from_checkpoint"]) == 0
    assert "2 of 2 finetunings" in capsys.readouterr().out


def test_nothing_heavy_is_loaded_for_the_settings():
    code = "import sys\nfrom linearize.evaluation.glue import metrics, report, settings\n"
    code += "print([name for name in ('datasets', 'sklearn', 'scipy.stats') if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_presets_are_the_published_ones():
    assert {preset.name for preset in all_presets() if preset.command == "glue"} == {
        "bert_base_glue",
        "bert_base_glue_published",
    }
    config = resolve("bert_base_glue_published", settings=GlueRunConfig)
    assert (config.training.batch_size, config.training.epochs, config.data.sequence_length) == (32, 3, 128)
    assert config.training.learning_rates == [5e-5, 4e-5, 3e-5, 2e-5]
    assert config.tasks == list(TASKS) and config.data.revision == REVISION
    stage = config.training.stage(3668, 128, 2e-5)  # MRPC
    assert (stage.max_steps, stage.warmup_steps, stage.batch_size) == (344, 34, 32)
    with pytest.raises(UserError, match="multiple of the 3 processes"):
        config.training.stage(3668, 128, 2e-5, 3)


def test_names_of_models(tmp_path):
    (tmp_path / "run" / "final").mkdir(parents=True)
    config = GlueRunConfig(
        models=["me/encoder", str(tmp_path / "run" / "final"), str(tmp_path / "run" / "..") + "/run2"]
    )
    assert config.model_names() == ["encoder", "run", "run2"]


def test_a_real_checkpoint_gets_a_head(minilm):
    model, fresh = load_classifier(Finetuning("minilm", str(minilm), None, "mnli", 2e-5, 0))
    assert fresh == [] and model.config.num_labels == 3
    stored = linearize.conversion.students.load_encoder(minilm).state_dict()
    loaded = model.bert.state_dict()
    assert all(torch.equal(stored[name], tensor) for name, tensor in loaded.items())
