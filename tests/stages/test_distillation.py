"""Training against a teacher: the losses against their formulas, what fits, and that students come nearer."""

import json
import math

import pytest
import torch
from data_toys import write_jsonl
from tiny_models import make_gpt2
from tiny_runs import make_teacher_directory
from torch.nn import functional

from linearize.cli import main
from linearize.config.settings import DistillationConfig
from linearize.conversion.students import convert, load_model, load_tokenizer
from linearize.errors import UserError
from linearize.modeling import compiled
from linearize.modeling import op_gain_cell_chunked as chunked
from linearize.runs.engine import run
from linearize.stages.distillation import Distiller

ATTENTION = {"type": "gain_cell", "window": 32, "cell": {"tile": 8, "score_saturation": 20.0}}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return make_teacher_directory(tmp_path_factory.mktemp("teacher"), make=make_gpt2, n_positions=64)


@pytest.fixture
def student(teacher):
    return convert(teacher, ATTENTION, dtype="float32")


def batch(model, rows=3, length=24):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.config.vocab_size, (rows, length), generator=generator)
    labels = ids.clone()
    labels[0, 5:9] = -100
    return {"input_ids": ids, "labels": labels}


@pytest.mark.parametrize("weights", [(1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0), (0.5, 2.0, 3.0)])
def test_the_losses_are_their_formulas(weights, teacher, student):
    model = load_model(teacher)
    config = DistillationConfig("teacher", *weights, logits_chunk=7)
    inputs, denominator = batch(model), 50
    found = Distiller(model, student, config).losses(student, inputs, denominator)
    with torch.no_grad():
        ours = student(input_ids=inputs["input_ids"], output_hidden_states=True)
        theirs = model(input_ids=inputs["input_ids"], output_hidden_states=True)
        targets = inputs["labels"][:, 1:]
        seen = targets != -100
        logs, target = (x.logits[:, :-1].log_softmax(-1) for x in (ours, theirs))
        cross_entropy = functional.nll_loss(logs[seen], targets[seen], reduction="sum") / denominator
        divergence = (target.exp() * (target - logs)).sum(-1)[seen].sum() / denominator
        cosines = [
            functional.cosine_similarity(a, b, dim=-1)
            for a, b in zip(ours.hidden_states, theirs.hidden_states, strict=True)
        ]
        hidden = sum((1 - c[:, :-1])[seen].sum() for c in cosines[1:]) / (len(cosines) - 1) / denominator
    assert found.cross_entropy == pytest.approx(cross_entropy.item(), rel=1e-4)
    if weights[1]:
        assert found.divergence == pytest.approx(divergence.item(), rel=1e-3)
    if weights[2]:
        assert found.hidden == pytest.approx(float(hidden), rel=1e-3)
    total = sum(w * x for w, x in zip(weights, (cross_entropy, divergence, hidden), strict=True))
    assert found.total.item() == pytest.approx(float(total), rel=1e-3)


def test_the_student_alone_gets_gradients(teacher, student):
    model = load_model(teacher)
    distiller = Distiller(model, student, DistillationConfig("teacher"))
    distiller.losses(student, batch(model), 50).total.backward()
    assert all(p.grad is None for p in model.parameters())
    missing = [name for name, p in student.named_parameters() if p.requires_grad and p.grad is None]
    assert not missing


def test_a_teacher_against_itself_has_nothing_to_teach(teacher):
    model, same = load_model(teacher), load_model(teacher)
    found = Distiller(model, same, DistillationConfig("teacher", labels_weight=0)).losses(same, batch(model), 1)
    assert abs(found.total.item()) < 1e-4


@pytest.mark.parametrize(
    "change, what", [({"vocab_size": 131}, "vocabulary"), ({"n_layer": 1}, "layers"), ({"n_embd": 16}, "width")]
)
def test_a_teacher_that_does_not_fit_is_named(change, what, student):
    same = {name: getattr(student.config, name) for name in ("vocab_size", "n_layer", "n_embd", "n_head")}
    with pytest.raises(UserError, match=what):
        Distiller(make_gpt2(**{**same, **change}), student, DistillationConfig("teacher"))


def test_bad_weights_are_one_sentence(tmp_path, capsys):
    for flags, sentence in (
        (["--linear.hidden_weight", "-1"], "negative"),
        (["--linear.logits_chunk", "0"], "at least 1"),
    ):
        assert main(["run", "smollm2_gain_cell", "--output_dir", str(tmp_path / "out"), *flags]) == 2
        assert sentence in capsys.readouterr().err


@pytest.fixture
def settings(teacher, student, tmp_path):
    student.save_pretrained(tmp_path / "student")
    load_tokenizer(teacher).save_pretrained(tmp_path / "student")
    text = [{"text": f"{i} and {i + 1} are followed by {i + 2}, and so on until the end. " * 4} for i in range(60)]
    return {
        "model_name_or_path": str(tmp_path / "student"),
        "output_dir": str(tmp_path / "out"),
        "device": "cpu",
        "data": {
            "dataset": str(write_jsonl(tmp_path / "text.jsonl", text)),
            "sequence_length": 64,
            "cache_dir": str(tmp_path / "cache"),
        },
        "stages": {"training": {
            "kind": "train", "weights": "all", "teacher": str(teacher), "labels_weight": 0.0, "max_steps": 12,
            "batch_size": 4, "tokens_per_step": 512, "learning_rate": 3e-3, "warmup_steps": 1, "logging_steps": 1,
        }},
        "evaluation": None,
    }  # fmt: skip


def read(folder):
    return [json.loads(line) for line in (folder / "logs" / "training.jsonl").read_text().splitlines()]


def test_distillation_brings_the_student_to_the_teacher(settings, tmp_path):
    result = run(settings)
    log = read(tmp_path / "out")
    assert log[-1]["kl"] < 0.8 * log[0]["kl"] and log[-1]["hidden"] < log[0]["hidden"]
    losses = result.stages["training"].figures["losses"]
    assert len(losses) == 12 and all(math.isfinite(loss) for _, loss in losses)


def test_mixed_precision_is_the_teachers_and_the_heads_as_well(settings, monkeypatch):
    """In float32 beside a student in bfloat16, teacher and heads took most of a step's time."""
    seen, losses = [], Distiller.losses

    def spy(self, *arguments):
        parts = self.teacher.base_model, self.teacher.get_output_embeddings(), self.head
        handles = [x.register_forward_hook(lambda *_: seen.append(torch.is_autocast_enabled("cpu"))) for x in parts]
        try:
            return losses(self, *arguments)
        finally:
            for handle in handles:
                handle.remove()

    monkeypatch.setattr(Distiller, "losses", spy)
    for precision in ("float32", "bfloat16"):
        others = {"output_dir": settings["output_dir"] + precision, "training.precision": precision}
        run(settings, {**others, "training.max_steps": 1})
    assert set(seen[: len(seen) // 2]) == {False} and set(seen[len(seen) // 2 :]) == {True}


def test_a_compiled_reader_takes_the_same_steps(settings, tmp_path, monkeypatch):
    run(settings, {"training.max_steps": 2})
    eager = read(tmp_path / "out")
    calls = []
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **k: calls.append(f) or compile(f, backend="aot_eager", **k))
    run(settings, {"output_dir": str(tmp_path / "compiled"), "training.max_steps": 2, "training.compile": True})
    assert calls == [chunked._read] and not compiled._active
    for one, other in zip(eager, read(tmp_path / "compiled"), strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-4)
