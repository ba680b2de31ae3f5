"""Stage 2 on tiny models: what trains, what it computes, and what it leaves."""

import json
from types import SimpleNamespace

import pytest
import torch
from finetuning_toys import LENGTH, settings, stock_llama, student, token_blocks
from peft import PeftModel
from transformers import LlamaForCausalLM

from linearize import UserError, convert
from linearize.conversion import load_student
from linearize.stages.adapters import adaptable_layers, add_adapters, merge, save_adapter
from linearize.stages.finetuning import finetune, gradient_checkpointing
from linearize.stages.finetuning_trainer import Objective, parameter_groups, teacher_hidden_states
from linearize.training.losses import LossWeights, supervised_tokens
from linearize.training.stage_trainer import RunSampler, row_numbers


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    return stock_llama(tmp_path_factory.mktemp("stock"))


@pytest.fixture(scope="module")
def trained(stock, tmp_path_factory):
    """A model after four steps that move everything, with its output directory and its logits."""
    output = tmp_path_factory.mktemp("run")
    result = finetune(student(stock), token_blocks(), settings(), output_dir=output, base_model="me/converted")
    return result, output, logits(result.model)


def ids():
    return torch.randint(0, 96, (2, LENGTH), generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def logits(model):
    return model(input_ids=ids(), use_cache=False).logits


def adapted(stock, dtype=torch.float32, **changes):
    """Adapters that are not zero."""
    model = add_adapters(student(stock, dtype), settings(**changes), train_mixers=True)
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn_like(parameter)
    return model


def test_adapters_and_mechanisms_train_in_float32_on_a_bfloat16_base(stock):
    model = student(stock, torch.bfloat16)
    result_model = add_adapters(model, settings(), train_mixers=True)
    trained = {name: p for name, p in result_model.named_parameters() if p.requires_grad}
    assert {p.dtype for p in trained.values()} == {torch.float32}
    assert {name.split("self_attn.")[1].split(".")[0] for name in trained} == {
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "mixer",
    }
    assert {p.dtype for name, p in model.named_parameters() if not p.requires_grad and "mixer" not in name} == {
        torch.bfloat16
    }
    assert all(p.dtype == torch.float32 for name, p in model.named_parameters() if "mixer" in name)


def test_mechanisms_have_their_own_learning_rate(stock):
    config = settings(learning_rate=1e-4, mixer_learning_rate=1e-3, weight_decay=0.1)
    model = add_adapters(student(stock), config, train_mixers=True)
    adapters, mixers = parameter_groups(model, config)
    assert (adapters["lr"], adapters["weight_decay"]) == (1e-4, 0.1)
    assert (mixers["lr"], mixers["weight_decay"]) == (1e-3, 0.0)
    assert {id(p) for p in mixers["params"]} == {
        id(p) for n, p in model.named_parameters() if "mixer" in n and p.requires_grad
    }
    assert len(adapters["params"]) == 3 * 4 * 2  # layers x projections x (A, B)


def test_unknown_target_is_named_with_those_there_are(stock, tmp_path):
    model = student(stock)
    assert adaptable_layers(model) == ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    with pytest.raises(UserError, match="no linear layer named c_attn; there are q_proj, k_proj"):
        finetune(model, token_blocks(), settings(lora_targets=["q_proj", "c_attn"]), output_dir=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kl_weight", [0.0, 0.5])
def test_gradient_checkpointing_gives_equal_gradients(stock, kl_weight):
    gradients = []
    for checkpointing in (False, True):
        model = adapted(stock, torch.float64)
        model.train()
        batch = token_blocks()[:2]
        objective = Objective(LossWeights(1.0, kl_weight), logits_chunk=8)
        with gradient_checkpointing(model.get_base_model(), checkpointing):
            total, _, _ = model(objective=objective, **batch, denominator=supervised_tokens(batch["labels"]))
            total.backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(gradient is not None for gradient in gradients[0])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, plain, rtol=0, atol=0)


def test_objective_is_the_loss_of_the_model_and_of_the_stock_teacher(stock):
    model, batch = adapted(stock, torch.float64), token_blocks()[:3]
    teacher = LlamaForCausalLM.from_pretrained(stock, dtype=torch.float64)
    kept = batch["labels"][:, 1:] != -100
    with torch.no_grad():
        student_logits = model(input_ids=batch["input_ids"]).logits[:, :-1][kept]
        teacher_logits = teacher(input_ids=batch["input_ids"]).logits[:, :-1][kept]
        found = model(objective=Objective(LossWeights(0.6, 0.4, 2.0), 8), **batch, denominator=kept.sum())
        q, p = (student_logits / 2).log_softmax(-1), (teacher_logits / 2).softmax(-1)
        divergence = (p * (p.log() - q)).sum(-1).mean() * 4
        cross_entropy = torch.nn.functional.cross_entropy(student_logits, batch["labels"][:, 1:][kept])
    # The mechanism computes in float32 at least; the stock model's RMSNorm rounds to float32.
    torch.testing.assert_close(found[0], 0.6 * cross_entropy + 0.4 * divergence, rtol=0, atol=1e-7)


def test_the_teacher_is_the_stock_model_bit_for_bit_and_everything_is_switched_back(stock):
    model = adapted(stock)
    before, trained = logits(model), {n for n, p in model.named_parameters() if p.requires_grad}
    model.train()
    hidden = teacher_hidden_states(model, ids())
    with torch.no_grad():
        expected = LlamaForCausalLM.from_pretrained(stock).model(input_ids=ids()).last_hidden_state
    assert torch.equal(hidden, expected)
    assert not hidden.requires_grad
    assert model.training and {n for n, p in model.named_parameters() if p.requires_grad} == trained
    assert torch.equal(logits(model.eval()), before)


def test_training_lowers_the_loss_and_keeps_the_config(stock, tmp_path):
    model = student(stock)
    use_cache = model.config.use_cache
    result = finetune(model, token_blocks(4), settings(max_steps=12), output_dir=tmp_path)
    assert result.steps == len(result.losses) == 12 and result.tokens == 12 * 4 * LENGTH
    assert result.losses[-1] < result.losses[0] - 0.1
    assert model.config.use_cache == use_cache
    assert not result.model.training


def test_frozen_mechanisms_stay(stock, tmp_path):
    model = student(stock)
    before = {name: tensor.clone() for name, tensor in model.mixer_state_dict().items()}
    plain = merge(finetune(model, token_blocks(), settings(train_mixers=False), output_dir=tmp_path).model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in plain.mixer_state_dict().items())


def test_trained_mechanisms_move_and_the_originals_do_not(trained):
    model = trained[0].model.get_base_model()
    wrapper = model.model.layers[0].self_attn.mixer
    moved = [
        not torch.equal(new, old)
        for (_, new), (_, old) in zip(
            wrapper.modules_to_save["default"].named_parameters(),
            wrapper.original_module.named_parameters(),
            strict=True,
        )
    ]
    assert all(moved)


def test_files_of_a_run(trained):
    result, output, _ = trained
    records = [json.loads(line) for line in result.log_path.read_text().splitlines()]
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    assert [record["loss"] for record in records] == result.losses
    assert records[0]["learning_rate"] == 1e-2 and records[-1]["tokens"] == result.tokens
    assert (output / "plots" / "finetune_loss.png").stat().st_size > 5000
    assert [path.name for path in (output / "checkpoints" / "finetune").iterdir()] == ["step-4"]
    assert (
        json.loads((output / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"]
        == "me/converted"
    )


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # inside peft 0.21
def test_adapter_reloads_on_the_converted_model(stock, trained):
    result, _, expected = trained
    fresh = PeftModel.from_pretrained(student(stock), result.adapter_path).eval()
    assert torch.equal(logits(fresh), expected)


def test_adapter_names_the_repository_that_the_model_came_from_by_default(stock, tmp_path):
    student(stock).save_pretrained(tmp_path / "converted")
    model = add_adapters(load_student(tmp_path / "converted"), settings(), train_mixers=True)
    save_adapter(model, tmp_path / "adapter")
    base = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert base == str(tmp_path / "converted")


def test_merging_gives_a_plain_model_with_equal_logits(stock, tmp_path):
    result = finetune(student(stock), token_blocks(), settings(), output_dir=tmp_path)
    expected = logits(result.model)
    plain = merge(result.model)
    assert type(plain).__name__ == "LinearizedLlamaForCausalLM"
    assert set(plain.state_dict()) == set(student(stock).state_dict())
    assert not hasattr(plain, "peft_config") and all(parameter.requires_grad for parameter in plain.parameters())
    torch.testing.assert_close(logits(plain), expected, rtol=0, atol=1e-5)
    plain.save_pretrained(tmp_path / "final")
    assert torch.equal(logits(type(plain).from_pretrained(tmp_path / "final")), logits(plain))


def test_yardstick_trains_the_teacher_and_unloads(stock, tmp_path):
    model = student(stock)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    result = finetune(model, token_blocks(4), settings(max_steps=8), output_dir=tmp_path, arm="teacher")
    assert not any("mixer" in name for name, p in model.named_parameters() if p.requires_grad)
    assert result.losses[-1] < result.losses[0] - 0.1
    stock_model = LlamaForCausalLM.from_pretrained(stock)
    batch = token_blocks(4)[list(RunSampler(4, 0, 4))]
    with torch.no_grad():
        stock_logits = stock_model(input_ids=batch["input_ids"]).logits[:, :-1]
    first = torch.nn.functional.cross_entropy(stock_logits.flatten(0, 1), batch["labels"][:, 1:].flatten())
    assert result.losses[0] == pytest.approx(float(first), abs=1e-6)
    base = result.model.unload()
    assert base is model and base.mixer_attentions()[0].arm == "mixed"
    assert set(base.state_dict()) == set(before)
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items())
    # The same model then takes the student's adapters.
    finetune(base, token_blocks(4), settings(max_steps=1), output_dir=tmp_path / "student")


def test_accumulation_weighs_every_token_alike(stock, tmp_path):
    """Sequences with very different numbers of labels: four micro-batches of one give the steps of one batch of
    four."""
    runs = [
        finetune(
            student(stock, torch.float64), token_blocks(), settings(batch_size=size), output_dir=tmp_path / str(size)
        )
        for size in (1, 4)
    ]
    assert runs[0].losses == pytest.approx(runs[1].losses, abs=1e-7)
    first, second = (run.model.state_dict() for run in runs)
    for name in first:
        if "lora" in name:
            torch.testing.assert_close(first[name], second[name], rtol=0, atol=1e-6)


def test_micro_batches_leave_the_same_blocks_out(stock, tmp_path):
    """Landmark attention's draws belong to a row of the global batch."""
    attention = {"type": "landmark", "block_size": 8, "top_k": 8, "block_dropout": 0.9}
    losses = [
        finetune(
            convert(stock, attention, dtype=torch.float64),
            token_blocks(),
            settings(batch_size=size, max_steps=2),
            output_dir=tmp_path / str(size),
        ).losses
        for size in (1, 4)
    ]
    assert losses[0] == pytest.approx(losses[1], abs=1e-7)


def test_rows_are_numbered_alike_by_any_number_of_processes():
    def numbers(size, accumulation, world):
        return {
            int(number)
            for rank in range(world)
            for micro in range(accumulation)
            for number in row_numbers(
                SimpleNamespace(
                    per_device_train_batch_size=size,
                    gradient_accumulation_steps=accumulation,
                    world_size=world,
                    process_index=rank,
                ),
                3,
                micro,
                size,
            )
        }

    cuts = [numbers(8, 1, 1), numbers(2, 4, 1), numbers(2, 2, 2), numbers(1, 1, 8)]
    assert all(cut == set(range(24, 32)) for cut in cuts)


def test_tokens_per_step_must_be_exact(stock, tmp_path):
    with pytest.raises(
        UserError, match=r"finetune.tokens_per_step is 100, but it must be a multiple of .* 1 x 2 x 32 = 64"
    ):
        finetune(student(stock), token_blocks(), settings(tokens_per_step=100), output_dir=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_float16_is_refused(stock, tmp_path):
    with pytest.raises(UserError, match="set dtype to bfloat16 or float32"):
        finetune(student(stock, torch.float16), token_blocks(), settings(), output_dir=tmp_path)


def test_sampler_walks_the_epochs_without_a_gap():
    from linearize.data.sequences import epoch_order

    expected = [int(i) for epoch in range(3) for i in epoch_order(5, 7, epoch)]
    assert list(RunSampler(5, 7, 12)) == expected[:12]


def test_logging_means_and_parts(stock, tmp_path):
    result = finetune(
        student(stock), token_blocks(), settings(max_steps=6, logging_steps=3, kl_weight=0.5), output_dir=tmp_path
    )
    records = [json.loads(line) for line in result.log_path.read_text().splitlines()]
    assert [record["step"] for record in records] == [3, 6]
    assert records[0]["loss"] == pytest.approx(sum(result.losses[:3]) / 3)
    for record in records:
        assert record["loss"] == pytest.approx(record["cross_entropy"] + 0.5 * record["kl"], abs=1e-5)
        assert record["kl"] > 0


def test_the_last_step_is_logged(stock, tmp_path):
    result = finetune(student(stock), token_blocks(), settings(max_steps=3, logging_steps=2), output_dir=tmp_path)
    records = [json.loads(line) for line in result.log_path.read_text().splitlines()]
    assert [record["step"] for record in records] == [2, 3]
    assert records[-1]["loss"] == result.losses[-1]
