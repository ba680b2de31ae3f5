"""Trainings of all weights that cannot fit are refused by their config alone; what they hold is counted exactly."""

import json

import pytest
import torch
from accelerate import PartialState
from tiny_models import make_bert, make_student, make_teacher
from tiny_runs import make_teacher_directory, write_text
from transformers import MistralConfig

import linearize
from linearize import UserError
from linearize.hardware import memory_full
from linearize.hardware.memory_full import CHECK, check_full_training, free_memory, full_training, parameter_count

GIB = 2**30
TRAINING = {"kind": "train", "weights": "all", "max_steps": 1, "batch_size": 1, "tokens_per_step": 32}


class State:
    """Processes on GPUs that this machine does not have."""

    def __init__(self, processes=1, device="cuda"):
        self.num_processes, self.device = processes, torch.device(device)


@pytest.fixture
def free(monkeypatch):
    """Sets the free memory of every device."""

    def set_free(count):
        monkeypatch.setattr(memory_full, "free_memory", lambda device: count)

    return set_free


def test_parameters_are_counted_without_weights():
    teacher = make_teacher()
    models = [teacher, make_student(teacher, {"linear": {"type": "linear", "window": 4}}), make_bert()]
    models.append(make_student(teacher, {"landmark": {"type": "landmark", "block_size": 4}}))
    for model in models:
        assert parameter_count(model.config) == model.num_parameters()


def test_what_adam_holds_is_what_is_counted():
    model = make_teacher()
    optimizer = torch.optim.AdamW(model.parameters())
    model(input_ids=torch.zeros(1, 4, dtype=torch.long)).logits.sum().backward()
    optimizer.step()
    moments = [x for state in optimizer.state.values() for x in state.values() if x.dim()]
    held = [*model.parameters(), *(p.grad for p in model.parameters()), *moments]
    counted = full_training(model.config)
    assert counted.total == sum(x.numel() * x.element_size() for x in held)
    together = full_training(model.config, teacher=model.config, processes=2)
    assert together.total == counted.total + 2 * 4 * model.num_parameters()
    assert full_training(model.config, trains_all=False).total == 4 * model.num_parameters()


def test_mistral_7b_on_gpus_of_80_gib(free):
    """The shipped preset: 7.24 billion weights."""
    config = MistralConfig(sliding_window=None)
    free(79 * GIB)
    with pytest.raises(UserError) as refused:
        check_full_training("mistral", config, State(8), teacher=config)
    sentence = str(refused.value)
    for sign in ("7,241,732,096 weights", "161.9 GiB", "79.0 GiB of the GPU", "weights: lora", f"{CHECK}=off"):
        assert sign in sentence, sentence
    assert "leave the teacher out" not in sentence, "without it the run would not fit either"
    free(110 * GIB)
    with pytest.raises(UserError, match="leave the teacher out"):
        check_full_training("mistral", config, State(), teacher=config)
    check_full_training("mistral", config, State())


def test_processes_share_the_memory_of_a_machine(free):
    config = make_teacher().config
    needed = full_training(config, processes=2).total
    free(2 * needed)
    check_full_training("tiny", config, State(2, "cpu"))
    free(2 * needed - 2)
    with pytest.raises(UserError, match="of memory are free"):
        check_full_training("tiny", config, State(2, "cpu"))
    check_full_training("tiny", config, State(2, "cuda"))


def test_the_memory_of_this_machine_is_known():
    assert 2**20 < free_memory(PartialState(cpu=True).device) < 2**50


@pytest.mark.parametrize("kind", ["stock", "random weights", "landmark", "gain cell", "encoder"])
def test_runs_are_refused_before_anything_is_fetched(tmp_path, monkeypatch, free, kind):
    source = tmp_path / "config only"
    (make_bert() if kind == "encoder" else make_teacher()).config.save_pretrained(source)
    run = {"output_dir": str(tmp_path / "out"), "device": "cpu", "data": {"dataset": "me/unfetched"}}
    run |= {"stages": {"training": TRAINING}}
    run["data"]["sequence_length"] = 32
    start = {**run, "model_name_or_path": str(source)}
    runs = {
        "stock": {**start, "attention": None},
        "random weights": {**run, "architecture": {"n_layer": 1, "n_head": 2, "n_embd": 8}, "attention": None},
        "landmark": {**start, "attention": {"type": "landmark", "block_size": 4}},
        "gain cell": {**start, "attention": {"type": "gain_cell"}},
        "encoder": {**start, "stages": {"distillation": {**TRAINING, "objective": "embeddings"}}},
    }
    free(1000)
    with pytest.raises(UserError, match="takes at least"):
        linearize.run(runs[kind])
    assert not (tmp_path / "out").exists()


def test_the_check_can_be_left_out(tmp_path, monkeypatch, free):
    teacher, text = make_teacher_directory(tmp_path / "teacher"), write_text(tmp_path / "text.jsonl")
    free(1000)
    monkeypatch.setenv(CHECK, "off")
    settings = {
        "model_name_or_path": str(teacher), "output_dir": str(tmp_path / "out"), "device": "cpu",
        "data": {"dataset": str(text), "sequence_length": 32, "cache_dir": str(tmp_path / "cache")},
        "attention": None, "evaluation": None, "stages": {"training": TRAINING},
    }  # fmt: skip
    report = json.loads((linearize.run(settings).output_dir / "report.json").read_text())
    assert report["stages"]["training"]["steps"] == 1
