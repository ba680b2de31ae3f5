"""The metadata of a card: what huggingface_hub writes, and reads again."""

import math

import pytest
from huggingface_hub import ModelCard
from tiny_models import make_student, make_teacher

from linearize.evaluation.embeddings import EmbeddingReport, EmbeddingRow
from linearize.evaluation.report import Report, Row
from linearize.evaluation.tasks import TaskReport, TaskScore
from linearize.hub.card import model_card

RECORD = {
    "teacher": "someone/teacher",
    "teacher_on_hub": True,
    "recipe": {"data": {"dataset": "someone/texts"}},
    "tokens": {"finetune": 8},
}
SCORES = [
    TaskScore("piqa", "acc", "none", 0.75, 0.01, 100),
    TaskScore("gsm8k", "exact_match", "strict-match", 0.5, None, 100),
]


@pytest.fixture(scope="module")
def config():
    model = make_student(make_teacher(), {"linear": {"type": "linear", "window": 4, "sinks": 1}})
    model.config.architectures = [type(model).__name__]
    return model.config


def load(tmp_path, config, **measured):
    path = tmp_path / "README.md"
    path.write_text(model_card("final", {**RECORD, **measured}, config), encoding="utf-8")
    return ModelCard.load(path)


def rows(perplexity):
    return Report(rows=[Row(name, perplexity, 1.0, 64, None, None, 0.1) for name in ("teacher", "student")]).to_dict()


def figures(card):
    return [
        (result.dataset_type, result.dataset_config, result.dataset_split, result.metric_type, result.metric_value)
        for result in card.data.eval_results
    ]


def test_what_was_not_measured_has_no_results(tmp_path, config):
    data = load(tmp_path, config).data
    assert data.eval_results is None and "model-index" not in data.to_dict() and data.model_name is None
    assert (data.base_model, data["base_model_relation"], data.datasets) == (
        "someone/teacher",
        "finetune",
        ["someone/texts"],
    )
    assert (data.library_name, data.pipeline_tag) == ("transformers", "text-generation")
    assert data.tags == ["linearize", "linear-attention"]


def test_all_figures_of_the_model_are_results(tmp_path, config):
    embedded = EmbeddingReport(
        4, 2, [EmbeddingRow("teacher", 1.0, 1.0, 0.5), EmbeddingRow("student", 0.9, None, 0.25)]
    )
    card = load(
        tmp_path,
        config,
        evaluation=rows(12.5),
        embeddings=embedded.to_dict(),
        validation={"perplexity": 9.5, "tokens": 64, "accuracy": 0.125},
        tasks=TaskReport(SCORES).to_dict(),
        glue={"task": "mnli", "scores": {"accuracy_matched": 0.5, "accuracy_mismatched": 0.25}},
    )
    assert figures(card) == [
        ("someone/texts", None, None, "perplexity", 12.5),
        ("someone/texts", None, None, "cosine_similarity", 0.9),
        ("someone/texts", None, None, "recall", 0.25),
        ("someone/texts", None, None, "perplexity", 9.5),
        ("someone/texts", None, None, "accuracy", 0.125),
        ("piqa", None, None, "acc", 0.75),
        ("gsm8k", None, None, "exact_match", 0.5),
        ("glue", "mnli", "validation_matched", "accuracy", 0.5),
        ("glue", "mnli", "validation_mismatched", "accuracy", 0.25),
    ]
    assert card.data.model_name == "teacher with linear attention"
    assert {result.task_type for result in card.data.eval_results} == {"text-generation"}
    assert card.data.eval_results[6].metric_name == "exact_match (strict-match)"


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_figures_that_are_not_finite_are_no_results(tmp_path, config, value):
    assert load(tmp_path, config, evaluation=rows(value)).data.eval_results is None


@pytest.mark.parametrize("own", [{"evaluation": {"texts": "news.txt"}}, {"data": {"validation": "news.txt"}}])
def test_text_of_ones_own_is_not_called_the_data(tmp_path, config, own):
    recipe = {"data": {"dataset": "someone/texts", **own.get("data", {})}, "evaluation": own.get("evaluation")}
    (result,) = load(tmp_path, config, evaluation=rows(12.5), recipe=recipe).data.eval_results
    assert (result.dataset_type, result.dataset_name) == ("text", "held-out text")


def test_every_stage_says_what_it_trained(tmp_path, config):
    tokens = {"warm": 5, "tuned": 6, "last": 7, "transfer": 8}
    trained = {"fit": "nothing", "warm": "mechanism", "tuned": "lora", "last": "all"}
    text = load(tmp_path, config, tokens=tokens, trained=trained).text
    assert "- warm: 5 tokens, the mechanism trained\n- tuned: 6 tokens, adapters of low rank trained\n" in text
    assert "- last: 7 tokens, all weights trained\n- transfer: 8 tokens\n" in text and "- fit" not in text


def test_a_record_of_before_stages_has_its_card(tmp_path, config):
    """Its recipe has the settings of each stage at the top, and it does not say what they trained."""
    settings = {"transfer": {"tokens": 20, "loss": "mse"}, "finetune": {"lora_rank": 8}, "calibration_sequences": 8}
    recipe = {**RECORD["recipe"], **settings}
    calibration = {"sequences": 8, "measure": "error", "before": 0.5, "after": 0.25}
    card = load(tmp_path, config, recipe=recipe, tokens={"transfer": 20, "finetune": 9}, calibration=calibration)
    assert (
        "- calibration: 8 sequences, error 0.500 -> 0.250\n- transfer: 20 tokens\n- finetune: 9 tokens\n" in card.text
    )
    assert "loss: mse" in card.text and "lora_rank: 8" in card.text and card.data.datasets == ["someone/texts"]
    assert "Nothing has been trained" not in card.text
