"""Perplexity, share and report on tiny random models: right by a plain computation, and invariant to how it is cut."""

import copy
import dataclasses
import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from linearize.errors import UserError
from linearize.evaluation import (
    PerplexityResult,
    Report,
    StateBytes,
    continuation,
    evaluate,
    linear_index,
    linear_share,
    measure_speed,
    perplexity,
)
from linearize.evaluation import perplexity as perplexity_function
from linearize.evaluation.report import LINEAR_ARM, OWN_WEIGHTS, SOFTMAX_ARM, STUDENT, TEACHER
from linearize.modeling import LinearizedLlamaConfig, LinearizedLlamaForCausalLM

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # inside peft 0.21

SHAPE = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
WINDOW, SINKS, LENGTH = 8, 2, 40


class Blocks:
    """The little that the evaluation needs of `TokenBlocks`."""

    def __init__(self, number=5, length=LENGTH, seed=0):
        self.input_ids = torch.randint(97, (number, length), generator=torch.Generator().manual_seed(seed))
        self.labels = self.input_ids.clone()

    def __len__(self):
        return len(self.input_ids)

    def __getitem__(self, i):
        return {"input_ids": self.input_ids[i], "labels": self.labels[i]}


def make_student(**settings):
    """A student of sharp attention, so that the arms differ by more than rounding."""
    torch.manual_seed(0)
    mixers = {"linear": {"type": "linear", "window": WINDOW, "sinks": SINKS, **settings}}
    config = LinearizedLlamaConfig(**SHAPE, mixer_types=["linear", "softmax", "linear"], mixers=mixers)
    model = LinearizedLlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "_proj" in name:
                parameter.mul_(12)
        model.lm_head.weight.mul_(20)
    return model


@pytest.fixture(scope="module")
def student():
    return make_student()


@pytest.fixture(scope="module")
def blocks():
    return Blocks()


def with_lora(model):
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "o_proj"], modules_to_save=["mixer"])
    wrapped = get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    return wrapped


@pytest.mark.parametrize("arm", ["mixed", "teacher", "softmax", "linear"])
def test_perplexity_is_the_plain_float64_computation(arm, blocks):
    model = make_student().double()
    blocks.labels = blocks.input_ids.clone()
    blocks.labels[0, :17] = -100
    result = perplexity(model, blocks, arm=arm, batch_size=2)
    with torch.no_grad(), model.use_arm(arm):
        log_probs = model(blocks.input_ids).logits.log_softmax(-1)
    losses = [
        -log_probs[row, n, blocks.labels[row, n + 1]].item()
        for row in range(len(blocks))
        for n in range(LENGTH - 1)
        if blocks.labels[row, n + 1] != -100
    ]
    assert result.tokens == len(losses) == 5 * (LENGTH - 1) - 16
    assert result.nll == pytest.approx(math.fsum(losses) / len(losses), abs=1e-12)
    assert result.perplexity == pytest.approx(math.exp(result.nll), rel=1e-12)
    blocks.labels = blocks.input_ids.clone()


def test_perplexity_does_not_depend_on_batches_and_chunks(student, blocks, monkeypatch):
    module = __import__("sys").modules["linearize.evaluation.next_token"]
    whole = perplexity(student, blocks, batch_size=5)
    monkeypatch.setattr(module, "LOGITS_AT_ONCE", 97 * 7)
    cut = perplexity(student, blocks, batch_size=2)
    assert cut.tokens == whole.tokens
    assert cut.nll == pytest.approx(whole.nll, abs=1e-6)


def test_arms_differ_and_are_put_back(student, blocks):
    values = [perplexity(student, blocks, arm=arm).nll for arm in ("mixed", "teacher", "softmax", "linear")]
    assert len({round(value, 3) for value in values}) == 4
    assert all(attention.arm == "mixed" for attention in student.mixer_attentions())


def test_teacher_arm_is_the_stock_model(student, blocks):
    stock = LlamaForCausalLM(LlamaConfig(**SHAPE)).eval()
    stock.load_state_dict({k: v for k, v in student.state_dict().items() if ".mixer." not in k})
    expected = perplexity(stock, blocks, arm=None)
    assert perplexity(student, blocks, arm="teacher").nll == expected.nll
    with pytest.raises(UserError, match="converted model"):
        perplexity(stock, blocks)
    assert evaluate(stock, blocks).row(TEACHER).nll == expected.nll


def test_training_mode_comes_back_and_adapters_count(student, blocks):
    wrapped = with_lora(copy.deepcopy(student)).train()
    result = perplexity(wrapped, blocks)
    assert wrapped.training
    assert result.nll != pytest.approx(perplexity(student, blocks).nll, abs=1e-3)
    with wrapped.disable_adapter():
        assert perplexity(wrapped, blocks).nll == pytest.approx(perplexity(student, blocks).nll, abs=1e-6)


def test_nothing_to_score_is_one_sentence(student, blocks):
    with pytest.raises(UserError, match="no token to score"):
        perplexity(student, Blocks(number=0))
    silent = Blocks()
    silent.labels[:] = -100
    with pytest.raises(UserError, match="no token to score"):
        perplexity(student, silent)


def test_spans_sum_to_the_whole(student, blocks):
    result = perplexity(student, blocks)
    inside, past = result.span(0, WINDOW + SINKS), result.span(WINDOW + SINKS)
    assert inside.tokens + past.tokens == result.tokens
    mean = (inside.nll * inside.tokens + past.nll * past.tokens) / result.tokens
    assert mean == pytest.approx(result.nll, abs=1e-12)
    assert result.span(LENGTH) is None


def test_inside_the_window_the_student_is_its_teacher(student, blocks):
    reach = WINDOW + SINKS
    mixed, teacher = (perplexity(student, blocks, arm=arm) for arm in ("mixed", "teacher"))
    assert mixed.span(0, reach).nll == pytest.approx(teacher.span(0, reach).nll, abs=1e-5)
    assert mixed.span(reach).nll != pytest.approx(teacher.span(reach).nll, abs=1e-3)


def test_linear_share(student, blocks):
    share = linear_share(student, blocks, batch_size=2)
    assert set(share.per_layer) == {0, 2}
    assert all(0 < value < 1 for value in share.per_layer.values())
    assert share.mean == pytest.approx(sum(share.per_layer.values()) / 2)
    assert share.tokens == 5 * (LENGTH - WINDOW - SINKS)
    assert linear_share(student, blocks, batch_size=5).mean == pytest.approx(share.mean, abs=1e-6)
    assert linear_share(student, blocks, max_tokens=1).tokens == LENGTH - WINDOW - SINKS
    assert linear_share(with_lora(copy.deepcopy(student)), blocks).mean != pytest.approx(share.mean, abs=1e-6)


def test_linear_share_at_the_ends(student):
    short = linear_share(student, Blocks(length=WINDOW + SINKS))
    assert (short.mean, short.tokens, set(short.per_layer.values())) == (0.0, 0, {0.0})
    pure = linear_share(make_student(window=0, sinks=0), Blocks(number=1))
    assert pure.mean == pytest.approx(1.0)


def test_share_is_a_direct_computation():
    """One layer's share from its own formula: linear sum over linear sum plus window mass, on the layer's inputs."""
    student, caught = make_student(map_input="rotated", gate="none"), {}
    attention = student.mixer_attentions()[0]
    hook = attention.mixer.register_forward_pre_hook(lambda m, args: caught.update(inputs=args[:3]))
    blocks = Blocks(number=1)
    measured = linear_share(student, blocks).per_layer[0]
    hook.remove()
    query, key, _ = caught["inputs"]
    mixer, key = attention.mixer, key.repeat_interleave(2, dim=1)
    features_q, features_k = (torch.cat([x.softmax(-1), (-x).softmax(-1)], -1) for x in (query, key))  # untrained maps
    scores = mixer.scaling * query @ key.mT
    n, j = torch.arange(LENGTH)[:, None], torch.arange(LENGTH)[None]
    near = (j <= n) & ((n - j < WINDOW) | (j < SINKS))
    level = scores.masked_fill(~near, -torch.inf).logsumexp(-1)
    shift = mixer.window_mix.shift[None, :, None] * level
    mass = (mixer.window_mix.window_weight().log()[None, :, None] + shift).exp()
    linear = ((features_q @ features_k.mT) * ((j <= n) & ~near)).sum(-1)
    expected = (linear / (linear + mass))[:, :, WINDOW + SINKS :].mean().item()
    assert measured == pytest.approx(expected, abs=1e-5)


def test_report_of_an_adapted_student(student, blocks):
    wrapped = with_lora(copy.deepcopy(student))
    yardstick = perplexity(wrapped, blocks, arm="teacher")
    report = evaluate(wrapped, blocks, yardsticks={"teacher + the same LoRA": yardstick}, speed=True)
    expected = {arm: perplexity(student, blocks, arm=arm).nll for arm in ("teacher", "softmax")}
    assert report.row(TEACHER).nll == pytest.approx(expected["teacher"], abs=1e-6)
    assert report.row(report.control).nll == pytest.approx(expected["softmax"], abs=1e-6)
    assert report.control == "control: softmax window 8 + 2 sinks, no training"
    assert report.row(SOFTMAX_ARM).nll == pytest.approx(perplexity(wrapped, blocks, arm="softmax").nll)
    assert report.row(LINEAR_ARM).nll == pytest.approx(perplexity(wrapped, blocks, arm="linear").nll)
    assert report.row("teacher + the same LoRA").nll == yardstick.nll
    assert set(report.speed) == {TEACHER, STUDENT} and all(s.decode > 0 for s in report.speed.values())
    assert [figures.tokens for figures in report.state] == [1024, 8192, 32768]


def test_without_lora_the_softmax_arm_is_the_control(student, blocks):
    report = evaluate(student, blocks, share_tokens=0)
    expected = perplexity(student, blocks, arm="softmax").nll
    assert report.row(SOFTMAX_ARM).nll == report.row(report.control).nll == pytest.approx(expected)
    assert report.share is None and "by construction" in report.notes[0]


def test_report_of_a_merged_student(student, blocks):
    merged = with_lora(copy.deepcopy(student)).merge_and_unload()
    alone = evaluate(merged, blocks, merged=True)
    assert alone.control is None and alone.reference == OWN_WEIGHTS and "merged" in alone.notes[0]
    compared = evaluate(merged, blocks, merged=True, original=student)
    assert compared.row(TEACHER).nll == pytest.approx(perplexity(student, blocks, arm="teacher").nll)
    assert compared.row(compared.control).nll == pytest.approx(perplexity(student, blocks, arm="softmax").nll)
    assert compared.row(STUDENT).nll == pytest.approx(alone.row(STUDENT).nll)
    with pytest.raises(UserError, match="untrained student"):
        evaluate(merged, blocks, merged=True, original=LlamaForCausalLM(LlamaConfig(**SHAPE)))


def test_report_comes_back_from_json_and_reads_well(student, blocks, tmp_path):
    report = evaluate(student, blocks)
    report.seconds, report.samples = {"stage 1": 3.0}, {"prompt": "a | b\nc"}
    assert Report.from_json(report.to_json()) == report
    paths = report.save(tmp_path)
    assert Report.from_json((tmp_path / "evaluation.json").read_text()) == report
    assert [path.name for path in paths if path.suffix == ".png"] == [
        "evaluation_arms.png",
        "evaluation_linear_share.png",
    ]
    assert all(path.stat().st_size > 1000 for path in paths)
    text = (tmp_path / "evaluation.md").read_text()
    for row in report.rows:
        line = next(line for line in text.splitlines() if line.startswith(f"| {row.name} |"))
        assert float(line.split("|")[2]) == pytest.approx(row.perplexity, rel=1e-3)
    assert "a \\| b c" in text
    table_lines = [line for line in text.splitlines() if line.startswith("|")]
    assert all(line.endswith("|") for line in table_lines)


def test_report_shows_in_a_terminal(student, blocks):
    from rich.console import Console

    console = Console(record=True, width=110, file=__import__("io").StringIO())
    evaluate(student, blocks, controls=False).show(console)
    shown = console.export_text()
    assert "student" in shown and "KV cache of the teacher" in shown and SOFTMAX_ARM not in shown


def test_linear_index():
    assert linear_index(teacher_nll=2.0, mixed_nll=2.25, softmax_nll=3.0) == pytest.approx(0.75)
    assert linear_index(teacher_nll=2.0, mixed_nll=3.0, softmax_nll=3.0) == 0.0
    assert linear_index(teacher_nll=2.0, mixed_nll=1.5, softmax_nll=1.8) is None


def test_overflow_stays_a_number():
    huge = PerplexityResult.from_positions(torch.tensor([1e6], dtype=torch.float64), torch.tensor([1]))
    assert huge.perplexity == math.inf


def test_generation(student):
    class Tokenizer:
        def __call__(self, text, return_tensors):
            from transformers import BatchEncoding

            ids = torch.tensor([[ord(c) % 97 for c in text]])
            return BatchEncoding({"input_ids": ids, "attention_mask": torch.ones_like(ids)})

        def decode(self, ids, skip_special_tokens):
            return " ".join(map(str, ids.tolist()))

    wrapped = with_lora(copy.deepcopy(student))
    prompt = "a prompt that is longer than the window"
    texts = {
        "student": continuation(student, Tokenizer(), prompt, max_new_tokens=12),
        "teacher": continuation(student, Tokenizer(), prompt, arm="teacher", max_new_tokens=12),
    }
    assert texts["student"] != texts["teacher"]
    assert all(len(text.split()) <= 12 for text in texts.values())
    options = {"arm": "teacher", "max_new_tokens": 12, "adapters": False}
    assert continuation(wrapped, Tokenizer(), prompt, **options) == texts["teacher"]
    speed = measure_speed(student, prompt_tokens=16, new_tokens=2)
    assert dataclasses.asdict(speed).keys() == {"prefill", "decode"} and speed.prefill > 0


def test_public_names():
    assert perplexity_function is perplexity and StateBytes(1, 2, 3).teacher == 3
