"""Gates and maps before position in both stages: what trains, at which rate, and what stays after a save."""

import pytest
import torch
from finetuning_toys import settings as finetune_settings
from tiny_models import make_gpt2, make_student, make_teacher

from linearize import load_student
from linearize.config.settings import TransferConfig
from linearize.data.sequences import TokenBlocks
from linearize.errors import UserError
from linearize.evaluation import linear_share
from linearize.stages.adapters import merge
from linearize.stages.finetuning import finetune
from linearize.stages.transfer import RATES, mixer_parameters, transfer_attention
from linearize.stages.transfer_loss import LayerLosses, branch_weights

LENGTH = 32
GATES = ("head", "token", "key")


KINDS = {"linear": {"map_input": "projections"}, "cosine": {"directions": "projections"}}


def make_model(gate, make=make_teacher, kind="linear", **changes):
    settings = {"type": kind, "window": 4, "sinks": 1, **KINDS[kind], "gate": gate, **changes}
    return make_student(make(), {kind: settings})


@pytest.fixture
def blocks():
    return TokenBlocks(torch.randint(3, 97, (10, LENGTH), generator=torch.Generator().manual_seed(5)))


def gates_of(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if ".mixer.gate." in name}


def transfer_settings(**changes):
    values = {"max_steps": 4, "batch_size": 2, "tokens_per_step": 4 * LENGTH, "logging_steps": 1, "save_steps": 2}
    return TransferConfig(**{**values, **changes})


@pytest.mark.parametrize("make", [make_teacher, make_gpt2], ids=["llama", "gpt2"])
@pytest.mark.parametrize("gate", GATES)
def test_transfer_gives_every_gate_a_gradient(gate, make):
    """In packed and padded rows too, where what it reads goes with the tokens."""
    model = make_model(gate, make)
    ids = torch.randint(3, 97, (2, LENGTH), generator=torch.Generator().manual_seed(6))
    mask = torch.ones_like(ids)
    mask[1, -9:] = 0
    place = torch.cat([torch.arange(20), torch.arange(LENGTH - 20)]).expand(2, -1)
    for given in ({}, {"attention_mask": mask}, {"attention_mask": mask, "position_ids": place}):
        model.zero_grad()
        with LayerLosses(model, "relative_mse") as losses:
            losses.run(ids, **given, weights=branch_weights("both"), gradient_factor=1.0)
        for group, parameters in mixer_parameters(model).items():
            for name, parameter in parameters.items():
                if group.startswith("gate"):
                    assert parameter.grad.abs().max() > 0, name
                assert torch.isfinite(parameter.grad).all(), name


def test_the_observers_student_is_the_models(blocks):
    """With a perfect teacher the loss is 0: what transfer computes is what the model computes."""
    model = make_model("token", window=LENGTH)
    with LayerLosses(model, "relative_mse") as losses:
        losses.run(blocks[0]["input_ids"][None], weights=branch_weights("mixed"), gradient_factor=None)
        assert max(losses.means(torch.device("cpu"))["mixed"]) <= 1e-10


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gate", GATES)
def test_groups_and_rates(gate, kind):
    groups = mixer_parameters(make_model(gate, kind=kind))
    other = {"linear": "maps", "cosine": "scalers"}[kind]
    assert set(groups) == {other, "window", "gate_bias", *(["gate"] if gate != "head" else [])}
    assert {RATES[name] for name in groups} <= {"learning_rate", "window_learning_rate", "gate_learning_rate"}
    assert TransferConfig().gate_learning_rate == 1e-3
    with pytest.raises(UserError, match="gate_learning_rate"):
        TransferConfig(gate_learning_rate=-1.0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gate", GATES)
def test_both_stages_train_the_gate_and_keep_it(gate, kind, blocks, tmp_path):
    model = make_model(gate, kind=kind)
    starts = [gates_of(model)]
    transfer_attention(model, blocks, transfer_settings(), output_dir=tmp_path)
    starts.append(gates_of(model))
    config = finetune_settings(tokens_per_step=4 * LENGTH)
    ids = torch.stack([blocks[i]["input_ids"] for i in range(10)]).numpy()
    labelled = TokenBlocks(ids, ids)
    tuned = merge(finetune(model, labelled, config, output_dir=tmp_path, base_model="me/tiny").model)
    starts.append(gates_of(tuned))
    for before, after in zip(starts[:-1], starts[1:], strict=True):
        assert before.keys() == after.keys() and len(before) == 3 * (1 if gate == "head" else 2)
        assert all(not torch.equal(before[name], after[name]) for name in before)
    tuned.save_pretrained(tmp_path / "saved")
    loaded = load_student(tmp_path / "saved")
    assert all(torch.equal(gates_of(loaded)[name], starts[-1][name]) for name in starts[-1])
    ids = blocks[0]["input_ids"][None]
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, tuned.eval()(ids).logits)


def test_a_rate_of_0_keeps_weights_at_their_start(blocks, tmp_path):
    model = make_model("token")
    transfer_attention(model, blocks, transfer_settings(gate_learning_rate=0.0), output_dir=tmp_path)
    gates = gates_of(model)
    assert all((x == 0).all() == name.endswith("weight") for name, x in gates.items())


def test_transfer_resumes_with_its_gates(blocks, tmp_path):
    whole, cut = make_model("token"), make_model("token")
    transfer_attention(whole, blocks, transfer_settings(), output_dir=tmp_path / "whole")
    transfer_attention(cut, blocks, transfer_settings(), output_dir=tmp_path / "cut")
    again = make_model("token")
    checkpoint = tmp_path / "cut" / "checkpoints" / "transfer" / "step-2"
    transfer_attention(again, blocks, transfer_settings(), output_dir=tmp_path / "cut", resume=checkpoint)
    for name, x in gates_of(again).items():
        assert torch.equal(x, gates_of(whole)[name])


@pytest.mark.parametrize("gate", GATES)
def test_the_linear_share_reads_what_the_mixer_does(gate, blocks):
    closed, open_gate = (make_model(gate, gate_bias=bias) for bias in (-3.0, 9.0))
    shares = [linear_share(model, blocks, batch_size=2, max_tokens=64).mean for model in (closed, open_gate)]
    assert 0 < shares[0] < shares[1]
