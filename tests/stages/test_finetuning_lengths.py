"""Stage 2 on longer sequences, on several lengths, and from the state of the piece before."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from finetuning_toys import LENGTH, MIXERS, InterruptedBlocks, settings, stock_llama, student, token_blocks
from tiny_models import make_student, perturb
from tiny_runs import make_teacher_directory, make_tokenizer, tiny_config, write_text
from tiny_students import HYBRID, MAKERS

from linearize import UserError
from linearize.cli import main
from linearize.config.settings import DataConfig, FinetuneConfig
from linearize.config.yaml_io import write_config
from linearize.data.sequences import TokenBlocks, epoch_order, prepare_data
from linearize.runs import engine
from linearize.runs.settings import resolve_run
from linearize.stages.adapters import add_adapters
from linearize.stages.finetune_lengths import JoinedRows, StepLengths, check_state_passing, pieces, training_rows
from linearize.stages.finetuning import finetune
from linearize.stages.finetuning_trainer import FinetuningTrainer, Objective, state_after
from linearize.training.losses import LossWeights


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    return stock_llama(tmp_path_factory.mktemp("stock"))


@pytest.fixture
def shapes(monkeypatch):
    """Of the token ids of every micro-batch, and whether they start from a state."""
    found, step = [], FinetuningTrainer.training_step

    def watch(self, model, inputs, *others):
        found.append((*inputs["input_ids"].shape, "previous_ids" in inputs))
        return step(self, model, inputs, *others)

    monkeypatch.setattr(FinetuningTrainer, "training_step", watch)
    return found


def run(stock, output, train=None, **changes):
    keywords = {key: changes.pop(key) for key in ("resume", "arm") if key in changes}
    train = token_blocks(12) if train is None else train
    return finetune(student(stock), train, settings(**changes), output_dir=output, **keywords)


# --- longer sequences


def test_longer_sequences_are_rows_that_follow_each_other():
    blocks = token_blocks(7)
    rows = training_rows(blocks, settings(sequence_length=3 * LENGTH, state_passing=0.5))
    assert (len(rows), rows.sequence_length) == (2, 3 * LENGTH)
    stream, labels = (torch.from_numpy(x).flatten() for x in (blocks.input_ids, blocks.labels))
    second = rows[1]
    assert torch.equal(second["input_ids"], stream[3 * LENGTH : 6 * LENGTH])
    assert torch.equal(second["labels"], labels[3 * LENGTH : 6 * LENGTH])
    assert torch.equal(second["previous_ids"], stream[: 3 * LENGTH])
    assert torch.equal(rows[0]["previous_ids"], second["input_ids"])  # nothing is before the first one
    assert training_rows(blocks, settings()) is blocks


def test_tokens_a_step_stay(stock, tmp_path, shapes):
    plain = run(stock, tmp_path / "plain", batch_size=1, max_steps=2)
    longer = run(stock, tmp_path / "longer", batch_size=1, max_steps=2, sequence_length=2 * LENGTH)
    assert shapes == [(1, LENGTH, False)] * 8 + [(1, 2 * LENGTH, False)] * 4
    assert longer.tokens == plain.tokens == 2 * 4 * LENGTH


# --- several lengths


def test_lengths_and_states_have_their_shares():
    lengths = StepLengths([16, 64, 32], [0.5, 0.3, 0.2], 0.25)
    given = [lengths.of(step) for step in range(200)]
    assert [sum(length == n for length, _ in given) for n in (16, 64, 32)] == [100, 60, 40]
    for n, count in ((16, 25), (64, 15), (32, 10)):
        assert sum(passes for length, passes in given if length == n) == count
    for step in range(1, 200):  # at any time, not only at the end
        assert abs(sum(length == 64 for length, _ in given[:step]) - 0.3 * step) <= 1
    assert StepLengths([16, 64, 32], [5, 3, 2], 0.25).of(150) == given[150]
    assert [StepLengths([8], None, share).of(7)[1] for share in (0.0, 1.0)] == [False, True]


def test_each_step_has_one_length_and_as_many_tokens(stock, tmp_path, shapes):
    run(stock, tmp_path, sequence_length=[LENGTH // 2, 2 * LENGTH], max_steps=4, batch_size=1)
    assert shapes == [(4, LENGTH // 2, False)] * 2 + [(1, 2 * LENGTH, False)] * 2 + shapes[:4]


def test_pieces_keep_the_order_of_the_text():
    stream = torch.arange(48)
    rows = {"input_ids": stream[16:].view(2, 16), "previous_ids": stream[:32].view(2, 16)}
    cut = pieces(rows, 8, True)
    assert torch.equal(cut["input_ids"], stream[16:].view(4, 8))
    assert torch.equal(cut["previous_ids"], stream[8:40].view(4, 8))
    assert set(pieces(rows, 8, False)) == {"input_ids"}


def test_resuming_continues_bit_for_bit(stock, tmp_path, shapes):
    changes = {"max_steps": 8, "sequence_length": [LENGTH // 2, LENGTH], "length_shares": [0.4, 0.6]}
    changes |= {"state_passing": 0.5, "lora_dropout": 0.1, "save_steps": 3}
    whole = run(stock, tmp_path / "whole", **changes)
    taken = shapes.copy()
    blocks = token_blocks(12)
    with pytest.raises(KeyboardInterrupt):
        run(stock, tmp_path / "parts", InterruptedJoins(blocks.input_ids, blocks.labels), **changes)
    rest = run(stock, tmp_path / "parts", resume=True, **changes)
    assert 0 < len(rest.losses) < 8 and rest.losses == whole.losses[-len(rest.losses) :]
    assert shapes[-2 * len(rest.losses) :] == taken[-2 * len(rest.losses) :]
    assert {shape[1:] for shape in taken} == {(n, p) for n in (LENGTH // 2, LENGTH) for p in (False, True)}
    for other in ({"state_passing": 0.25}, {"length_shares": None}, {"sequence_length": [8, LENGTH]}):
        with pytest.raises(UserError, match="cannot resume"):
            run(stock, tmp_path / "parts", resume=True, **{**changes, **other})


class InterruptedJoins(InterruptedBlocks):
    """Two reads for each row: itself, and the one before it."""

    def __getitem__(self, index):
        self.reads -= 0.5
        return super().__getitem__(index)


# --- states


def by_hand(model, ids, labels, previous):
    """The loss on a piece through the whole text at once."""
    with torch.no_grad():
        logits = model.eval()(input_ids=torch.cat([previous, ids], 1), use_cache=False).logits[:, previous.shape[1] :]
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, reduction="sum")


KINDS = {
    "linear": {"type": "linear", "window": 5, "sinks": 2},
    "gated": {"type": "linear", "window": 5, "sinks": 2, "map_input": "projections", "gate": "token"},
    "cosine": {"type": "cosine", "window": 5, "sinks": 2},
    "gated cosine": {"type": "cosine", "window": 5, "sinks": 2, "gate": "token"},
    "salient": {"type": "salient", "window": 5, "sinks": 1, "kept_tokens": 4},
    "gain_cell": {"type": "gain_cell", "window": 64, "cell": {"tile": 4}},
}


@pytest.mark.parametrize("backbone", MAKERS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_piece_that_starts_from_a_state_is_the_end_of_the_whole_text(kind, backbone):
    """The loss and the teacher's; and the gradient stops at the piece."""
    student = make_student(MAKERS[backbone](), {"student": KINDS[kind]}, HYBRID)
    perturb(student)
    adapted = add_adapters(student.double(), FinetuneConfig(), train_mixers=True).double()
    ids = torch.randint(3, 97, (2, 26), generator=torch.Generator().manual_seed(5))
    previous, piece = ids[:, :13], ids[:, 13:]
    labels = piece.masked_fill(torch.arange(13) < 4, -100)
    expected = by_hand(adapted, piece, labels, previous)
    adapted.train()
    objective = Objective(LossWeights(1.0, 0.5), 4)
    total, cross_entropy, divergence = objective(adapted, piece, labels, torch.tensor(1), previous_ids=previous)
    assert cross_entropy.item() == pytest.approx(expected.item(), abs=1e-9)
    total.backward()
    assert any(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in adapted.parameters())
    with student.use_arm("teacher"), torch.no_grad(), adapted.disable_adapter():
        teacher = student(ids, use_cache=False).logits[:, 13:]
    with torch.no_grad():
        ours = adapted.eval()(input_ids=ids, use_cache=False).logits[:, 13:]
    kl = F.kl_div(ours.log_softmax(-1), teacher.log_softmax(-1), log_target=True, reduction="none").sum(-1)
    assert divergence.item() == pytest.approx(kl[:, :-1][labels[:, 1:] != -100].sum().item(), abs=1e-8)
    alone = objective(adapted, piece, labels, torch.tensor(1))[1]
    assert abs(alone - cross_entropy) > 1e-3  # the state matters


def test_no_gradient_goes_through_the_state(stock):
    """It is that of a state which is a constant."""
    adapted = add_adapters(student(stock, torch.float64), FinetuneConfig(), train_mixers=True).train()
    ids = torch.from_numpy(token_blocks(2).input_ids).long()
    objective = Objective(LossWeights(), 64)
    objective(adapted, ids[1:], ids[1:], torch.tensor(1), previous_ids=ids[:1])[0].backward()
    gradients = {name: p.grad.clone() for name, p in adapted.named_parameters() if p.grad is not None}
    adapted.zero_grad()
    base = adapted.get_base_model()
    logits = base(input_ids=ids[1:], past_key_values=state_after(adapted, ids[:1]), use_cache=True).logits
    F.cross_entropy(logits[0, :-1], ids[1, 1:], reduction="sum").backward()
    assert len(gradients) > 6
    for name, parameter in adapted.named_parameters():
        if name in gradients:
            torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-7, atol=1e-9)
    adapted.zero_grad()
    whole = base(input_ids=ids.view(1, -1), use_cache=False).logits[0, LENGTH:-1]
    F.cross_entropy(whole, ids[1, 1:], reduction="sum").backward()
    assert any(not torch.allclose(gradients[n], p.grad) for n, p in adapted.named_parameters() if n in gradients)


@pytest.mark.parametrize("arm", ["mixed", "teacher"])
def test_the_first_loss_of_a_run_is_that_by_hand(stock, tmp_path, arm):
    """Two pieces a row, each from the state of the one before, in the student and in the yardstick."""
    train = TokenBlocks(token_blocks(8).input_ids)  # every token counts
    changes = {"sequence_length": 2 * LENGTH, "state_passing": 1.0, "max_steps": 1, "learning_rate": 0.0, "arm": arm}
    loss = run(stock, tmp_path, train, **changes).losses[0]
    rows, model = JoinedRows(train, 2 * LENGTH, True), student(stock)
    with model.use_arm(arm):
        taken = [rows[i] for i in epoch_order(len(rows), 0, 0)[:2].tolist()]
        parts = [[row[name][None] for name in ("input_ids", "labels", "previous_ids")] for row in taken]
        sums = [by_hand(model, *part) for part in parts]
    assert loss == pytest.approx(sum(map(float, sums)) / (2 * (2 * LENGTH - 1)), rel=1e-5)
    assert math.isfinite(loss)


# --- what cannot be


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"sequence_length": 3 * LENGTH // 2}, "rows of data.sequence_length = 32 tokens are joined"),
        ({"sequence_length": [24, 2 * LENGTH]}, "holds 24, which does not divide the longest, 64"),
        ({"sequence_length": 8 * LENGTH, "tokens_per_step": 8 * LENGTH}, "the next one is 512"),
        ({"sequence_length": 32 * LENGTH, "tokens_per_step": 64 * LENGTH}, "no whole sequence of 1024 tokens"),
        ({"sequence_length": 4 * LENGTH, "batch_size": 2}, "must be a multiple of processes x batch_size"),
        ({"state_passing": 0.5, "sequence_length": 5 * LENGTH}, "positions up to 320, twice the longest sequence"),
    ],
)
def test_lengths_that_do_not_fit_are_one_sentence(stock, tmp_path, changes, sentence):
    with pytest.raises(UserError, match=sentence):
        run(stock, tmp_path, token_blocks(20), **changes)


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"sequence_length": [32, 32]}, "lengths of at least 2, each once"),
        ({"sequence_length": []}, "lengths of at least 2"),
        ({"length_shares": [0.5, 0.5]}, "a positive share for each of the 1 lengths"),
        ({"sequence_length": [16, 32], "length_shares": [1.0, 0.0]}, "a positive share for each of the 2"),
        ({"state_passing": 1.5}, "shares are between 0 and 1"),
        ({"state_passing": 0.5, "gradient_checkpointing": True}, "recomputed layers are given no state"),
    ],
)
def test_settings_that_cannot_be_are_one_sentence(changes, sentence):
    with pytest.raises(UserError, match=sentence):
        FinetuneConfig(**changes)


def test_rows_that_do_not_follow_each_other_are_refused():
    blocks, config = token_blocks(8), settings(sequence_length=2 * LENGTH)
    gaps = TokenBlocks(blocks.input_ids, blocks.labels, contiguous=False)
    with pytest.raises(UserError, match="rows without an answer are left out"):
        training_rows(gaps, config)
    assert len(training_rows(gaps, settings(sequence_length=[LENGTH // 2, LENGTH]))) == 8  # only cut
    apart = TokenBlocks(blocks.input_ids, blocks.labels, positions=blocks.input_ids)
    with pytest.raises(UserError, match="set data.packing to stream"):
        training_rows(apart, config)


def test_a_growing_state_is_refused():
    with pytest.raises(UserError, match="landmark attention keeps every block"):
        check_state_passing(settings(), ["linear", "landmark"], None, 32)
    check_state_passing(settings(), ["softmax", *(mixer["type"] for mixer in MIXERS.values())], 64, 32)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    root = tmp_path_factory.mktemp("run")
    make_teacher_directory(root / "teacher")
    write_text(root / "text.jsonl")
    return root


def config_of(workspace, out, tmp_path, **finetune):
    values = tiny_config(workspace / "teacher", workspace / "text.jsonl", out, workspace / "cache")
    values["stages"]["finetune"] |= finetune
    write_config(resolve_run(values), tmp_path / "tiny.yaml")
    return str(tmp_path / "tiny.yaml")


def test_the_plan_counts_the_longest(workspace, tmp_path):
    """Steps and memory are those of data with rows as long."""
    values = tiny_config(workspace / "teacher", workspace / "text.jsonl", tmp_path, workspace / "cache")
    plans = [
        engine.plan(values, changes).of("finetune")
        for changes in ({"finetune.sequence_length": [32, 64]}, {"data.sequence_length": 64}, {})
    ]
    assert plans[0].forecast == plans[1].forecast != plans[2].forecast and plans[0].steps == plans[1].steps


def test_a_whole_run_with_flags(workspace, tmp_path):
    path = config_of(workspace, tmp_path / "out", tmp_path)
    flags = ["--finetune.sequence_length", "32,64", "--finetune.length_shares", "0.5,0.5"]
    assert main(["run", "--config", path, *flags, "--finetune.state_passing", "0.5"]) == 0
    text = (tmp_path / "out" / "config.yaml").read_text()
    assert "state_passing: 0.5" in text and (tmp_path / "out" / "final" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    "flags, sentence",
    [
        (["--finetune.sequence_length", "48"], "give a multiple of it, such as 64"),
        (["--finetune.sequence_length", "64", "--data.packing", "bfd"], "set data.packing to stream"),
        (["--finetune.state_passing", "0.5", "--data.isolate_documents", "true"], "data.isolate_documents to false"),
        (["--finetune.state_passing", "0.5", "--attention.type", "landmark"], "landmark"),
        (["--finetune.sequence_length", "1024"], "finetune.sequence_length is 1024, but the teacher's context is"),
        (["--finetune.sequence_length", "128"], "finetune.tokens_per_step is 64, but it must be a multiple"),
    ],
)
def test_bad_input_is_one_sentence_before_anything_is_loaded(flags, sentence, workspace, tmp_path, capsys):
    path = config_of(workspace, tmp_path / "out", tmp_path)
    capsys.readouterr()
    assert main(["run", "--config", path, *flags]) == 2
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1 and not (tmp_path / "out").exists()


def test_blocks_of_answers_say_whether_rows_are_left_out(tmp_path):
    """A row of the stream without an answer is in no block."""
    path = tmp_path / "chat.jsonl"
    long = " ".join(["the river ran past a small red house"] * 6)
    for question, contiguous in (("two cats", True), (long, False)):
        rows = [{"prompt": f"{question} {i}", "completion": "snow and cats"} for i in range(40)]
        path.write_text("\n".join(map(json.dumps, rows)))
        config = DataConfig(
            dataset=str(path), format="completion", sequence_length=16, cache_dir=str(tmp_path / f"{contiguous}")
        )
        assert prepare_data(config, make_tokenizer())[0].contiguous is contiguous
