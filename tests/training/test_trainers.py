"""Converted models in other libraries' trainers: packed texts cost what they cost one by one."""

import sys

import pytest
import torch
from datasets import Dataset
from tiny_models import make_gpt2, make_student, make_teacher, perturb
from tiny_runs import make_tokenizer
from transformers import DataCollatorWithFlattening, Trainer, TrainingArguments

TEACHERS = {"llama": make_teacher, "gpt2": make_gpt2}
CELL = {"tile": 4, "leak": 0.01, "input_levels": None, "weight_levels": None, "output_levels": None}
MIXERS = {
    "linear": {"type": "linear", "window": 4, "sinks": 2},
    "cosine": {"type": "cosine", "window": 4, "sinks": 2},
    "cosine-gated": {"type": "cosine", "window": 4, "sinks": 2, "directions": "projections", "gate": "token"},
    "cosine-pure": {"type": "cosine", "window": 0, "sinks": 0},
    "gain_cell": {"type": "gain_cell", "window": 8, "cell": CELL},
    "landmark": {"type": "landmark", "block_size": 4},
}
LENGTHS = (9, 3, 14, 5, 8, 11)
ARGUMENTS = {"report_to": [], "use_cpu": True, "max_steps": 1, "logging_steps": 1, "save_strategy": "no"}


@pytest.fixture(params=[(backbone, kind) for backbone in TEACHERS for kind in MIXERS], ids="-".join)
def model(request):
    backbone, kind = request.param
    student = make_student(TEACHERS[backbone](vocab_size=512), {kind: MIXERS[kind]})
    perturb(student)
    return student.train()


@pytest.fixture
def texts():
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, 97, (n,), generator=generator).tolist() for n in LENGTHS]


def loss_alone(model, texts):
    """Mean over the predicted tokens of all texts, each read by itself."""
    sums = []
    for text in texts:
        ids = torch.tensor([text])
        sums.append(model(ids, labels=ids, use_cache=False).loss * (len(text) - 1))
    return (sum(sums) / sum(len(text) - 1 for text in texts)).detach()


def check(trainer, expected):
    """The loss of a batch of all texts, and the one that a step of training logs."""
    (batch,) = trainer.get_train_dataloader()
    assert batch["input_ids"].shape[0] == 1 or batch["input_ids"].shape[1] > max(LENGTHS), "nothing is packed"
    loss = trainer.compute_loss(trainer.model, dict(batch))
    assert abs(loss.detach() - expected) <= 1e-5
    trainer.train()
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert abs(logged[0] - expected) <= 1e-4  # which the log has rounded


@pytest.mark.parametrize("more", [{}, {"return_flash_attn_kwargs": True, "return_seq_idx": True}], ids=["", "all"])
def test_flattening_collator(model, texts, more, tmp_path):
    expected = loss_alone(model, texts)
    args = TrainingArguments(str(tmp_path), per_device_train_batch_size=len(texts), **ARGUMENTS)
    data = Dataset.from_dict({"input_ids": texts})
    check(Trainer(model, args, train_dataset=data, data_collator=DataCollatorWithFlattening(**more)), expected)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="no release of TRL for Python 3.10 knows transformers 5.23")
@pytest.mark.filterwarnings("ignore:.gradient_checkpointing. is deprecated:FutureWarning")  # TRL sets it
@pytest.mark.parametrize("more", [{"packing": True, "max_length": 64}, {"padding_free": True, "max_length": None}])
def test_trl(model, texts, more, tmp_path):
    import trl

    expected = loss_alone(model, texts)
    args = trl.SFTConfig(str(tmp_path), per_device_train_batch_size=len(texts), bf16=False, **ARGUMENTS, **more)
    data = Dataset.from_dict({"input_ids": texts})
    check(trl.SFTTrainer(model, args, train_dataset=data, processing_class=make_tokenizer()), expected)
