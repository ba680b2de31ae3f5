"""Evaluation over the context length: retrieval measured, long prefills, perplexity, YaRN, the command line."""

import json

import pytest
import torch
from tiny_models import make_gpt2, make_gptj, make_student, make_teacher, perturb
from tiny_runs import make_teacher_directory, make_tokenizer, write_text
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

from linearize.cli import main
from linearize.errors import UserError
from linearize.evaluation import (
    ContextPlan,
    Trials,
    context_perplexity,
    load_stretches,
    measure_contexts,
    measure_retrieval,
    natural_prompts,
    natural_report,
    passkey_prompts,
    passkey_report,
    plan_contexts,
    wilson,
    with_yarn,
)
from linearize.evaluation.context_reading import answer_greedily, check_positions, end_tokens, piece_length, read
from linearize.evaluation.context_run import DEMO_TEXT
from linearize.evaluation.natural import Hay, read_documents
from linearize.evaluation.rope_scaling import parse_rope_scaling
from linearize.modeling.cache_names import either_name, named

TEXT = [" ".join(f"The cat {verb} in house {i} for hours." for verb in ("slept", "ran", "ate")) for i in range(60)]
SMOLLM_KEYS = {"passkey": (256, 512), "trials": Trials(4), "depths": 2}


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A stock Llama, a stock GPT-2 and a converted Llama, each with its tokenizer."""
    root = tmp_path_factory.mktemp("context")
    make_teacher_directory(root / "llama")
    make_teacher_directory(root / "gpt2", make=make_gpt2)
    assert main(["convert", str(root / "llama"), str(root / "student"), "--attention.window", "8"]) == 0
    return root


class Oracle(nn.Module):
    """Answers each known prompt, rightly or wrongly; its cache is the ids so far."""

    def __init__(self, tokenizer, prompts, wrong=False):
        super().__init__()
        self.embedding, self.config, self.tokenizer = nn.Embedding(len(tokenizer), 2), LlamaConfig(), tokenizer
        self.lengths = sorted(prompts)
        self.answers = {}
        for asked in prompts.values():
            for prompt in asked:
                answer = f" {prompt.answer if not wrong else 'no idea 0'}."
                ids = tokenizer(answer, add_special_tokens=False)["input_ids"]
                self.answers[tuple(prompt.input_ids.tolist())] = [*ids, tokenizer.eos_token_id]

    def get_input_embeddings(self):
        return self.embedding

    @either_name
    def forward(self, input_ids, past_key_values=None, use_cache=None, logits_to_keep=1):
        seen = input_ids if past_key_values is None else torch.cat([past_key_values, input_ids], 1)
        logits = torch.zeros(len(seen), 1, len(self.tokenizer))
        length = max((x for x in self.lengths if x <= seen.shape[1]), default=None)
        for row, ids in enumerate(seen.tolist()):
            if length is not None and tuple(ids[:length]) in self.answers:
                rest = self.answers[tuple(ids[:length])][len(ids) - length :]
                logits[row, 0, rest[0] if rest else 0] = 1.0
        return CausalLMOutputWithPast(logits=logits, **named(seen))


# --- measuring


@pytest.mark.parametrize("wrong, share", [(False, 1.0), (True, 0.0)])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_an_oracle_scores_all_or_nothing(tokenizer, wrong, share, batch_size):
    options = {"trials": Trials(6), "depths": 3}
    for prompts, report in (
        (passkey_prompts(tokenizer, (320, 400), **options), passkey_report(3, 0)),
        (natural_prompts(tokenizer, (420, 500), TEXT, **options), natural_report(3, 0)),
    ):
        oracle = Oracle(tokenizer, prompts, wrong)
        found = measure_retrieval(oracle, tokenizer, prompts, report, batch_size=batch_size)
        assert [result.score().accuracy for result in found.lengths] == [share, share]
        assert {score.accuracy for result in found.lengths for score in result.depths().values()} == {share}
        assert [len(result.answers) for result in found.lengths] == [6, 6]


def test_report_saves_every_finished_length(tokenizer, tmp_path):
    prompts = passkey_prompts(tokenizer, (320, 400), trials=Trials(6), depths=3)
    seen = []

    def stop_after_the_first(report):
        report.save(tmp_path)
        seen.append(len(report.lengths))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        oracle = Oracle(tokenizer, prompts)
        measure_retrieval(oracle, tokenizer, prompts, passkey_report(3, 0), after_length=stop_after_the_first)
    saved = json.loads((tmp_path / "passkey.json").read_text())
    assert seen == [1] and [entry["length"] for entry in saved["lengths"]] == [320]
    entry = saved["lengths"][0]
    assert (entry["trials"], entry["hits"], entry["accuracy"]) == (6, 6, 1.0)
    assert entry["low"] == pytest.approx(wilson(6, 6)[0]) and [d["trials"] for d in entry["depths"]] == [2, 2, 2]
    assert len(entry["answers"]) == 6 and {answer["hit"] for answer in entry["answers"]} == {True}
    assert {path.name for path in tmp_path.iterdir()} == {"passkey.json", "passkey.md", "passkey.png"}
    assert "| 320 | 6 | 6 | 100.0 | 61.0 to 100.0 |" in (tmp_path / "passkey.md").read_text()


def make_mistral():
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    return MistralForCausalLM(MistralConfig(vocab_size=97, num_hidden_layers=2, sliding_window=16, **shape)).eval()


def make_linear():
    student = make_student(make_teacher(), {"linear": {"type": "linear", "window": 5, "sinks": 2}})
    perturb(student)
    return student


def make_hybrid():
    mixers = {"linear": {"type": "linear", "window": 5, "sinks": 2}}
    return make_student(make_teacher(), mixers, ["linear", "softmax", "linear"])


@pytest.mark.parametrize("make", [make_teacher, make_gpt2, make_gptj, make_mistral, make_linear, make_hybrid])
@torch.no_grad()
def test_prefill_in_pieces_is_a_prefill_at_once(make):
    model = make()
    input_ids = torch.randint(3, 97, (2, 90), generator=torch.Generator().manual_seed(1))
    whole, _ = read(model, input_ids, 20, None)
    assert torch.equal(whole, read(model, input_ids, 20, 90)[0])
    reference = model(input_ids, use_cache=False).logits[:, -20:]
    for piece in (7, 32, 89):
        pieces, cache = read(model, input_ids, 20, piece)
        torch.testing.assert_close(pieces, whole, rtol=2e-4, atol=2e-4)
        assert cache.get_seq_length() == 90
    torch.testing.assert_close(whole, reference, rtol=2e-4, atol=2e-4)
    answers = answer_greedily(model, input_ids, 6, (), 32)
    generated = model.generate(input_ids, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert answers == generated[:, 90:].tolist()


@torch.no_grad()
def test_models_without_the_usual_cache_are_read_again():
    torch.manual_seed(0)
    model = MambaForCausalLM(MambaConfig(vocab_size=97, hidden_size=16, num_hidden_layers=2, state_size=4)).eval()
    input_ids = torch.randint(3, 97, (2, 20))
    answers = answer_greedily(model, input_ids, 3, (), piece_length(model))
    generated = model.generate(input_ids, max_new_tokens=3, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert answers == generated[:, 20:].tolist()


def test_pieces_only_where_they_change_nothing():
    assert piece_length(make_teacher()) == piece_length(make_linear()) == 2048
    dynamic = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    assert piece_length(make_teacher(rope_parameters=dynamic)) is None
    assert piece_length(MambaForCausalLM(MambaConfig(vocab_size=97, hidden_size=16, num_hidden_layers=1))) is None


@torch.no_grad()
def test_an_answer_ends_before_its_end_token(tokenizer):
    model = make_teacher()
    input_ids = torch.randint(3, 97, (1, 30), generator=torch.Generator().manual_seed(0))
    free = answer_greedily(model, input_ids, 8)[0]
    assert answer_greedily(model, input_ids, 8, {free[2]})[0] == free[: free.index(free[2])]
    model.generation_config.eos_token_id = [2, 5]
    assert end_tokens(model, tokenizer) == {2, 5, tokenizer.eos_token_id}


def test_learned_positions_end_and_rotary_ones_do_not():
    check_positions(make_teacher(), "--passkey", [100_000], 10)
    check_positions(make_gpt2(), "--passkey", [247], 10)
    with pytest.raises(UserError, match="a table that ends at 256: ask for at most 247"):
        check_positions(make_gpt2(), "--passkey", [248], 10)
    check_positions(make_gpt2(), "--context_perplexity", [256])
    check_positions(make_student(make_gptj()), "--passkey", [100_000], 10)
    with pytest.raises(UserError, match="a table that ends at 256: ask for at most 247"):  # the stock model's
        check_positions(make_gptj(), "--passkey", [248], 10)


# --- perplexity over the context length


@pytest.fixture(scope="module")
def long_text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "long.jsonl"
    lines = [json.dumps({"text": " ".join(TEXT[start : start + size])}) for start, size in ((0, 8), (10, 1), (20, 12))]
    path.write_text("\n".join(lines))
    return path


def test_all_lengths_score_the_same_tokens(tokenizer, long_text):
    lengths = (16, 64, 100)
    stretches = load_stretches([long_text], tokenizer, lengths, 10_000)
    assert stretches.scored == 8 and stretches.documents == 2
    count = len(stretches.contexts)
    for length in lengths[:-1]:
        shorter = stretches.inputs(0, count, length)
        assert torch.equal(shorter, stretches.inputs(0, count, 100)[:, -length:])
    text = [json.loads(line)["text"] for line in long_text.read_text().splitlines()]
    whole = tokenizer(text[0], verbose=False)["input_ids"]
    assert stretches.inputs(0, 1, 64)[0].tolist() == whole[-64:]
    assert stretches.inputs(2, 3, 100)[0].tolist() == whole[-108:-8]
    assert len(load_stretches([long_text], tokenizer, lengths, 30).contexts) == 3


@torch.no_grad()
def test_context_perplexity_is_that_of_the_last_tokens(tokenizer, long_text):
    model = make_teacher(vocab_size=len(tokenizer))
    stretches = load_stretches([long_text], tokenizer, (16, 64), 40)
    report = context_perplexity(model, stretches, (16, 64), batch_size=2)
    for found in report.lengths:
        rows = stretches.inputs(0, 5, found.length)
        losses = nn.functional.cross_entropy(
            model(rows).logits[:, -9:-1].flatten(0, 1), rows[:, -8:].flatten(), reduction="none"
        )
        assert found.nll == pytest.approx(losses.mean().item(), rel=1e-5) and len(found.stretch_nll) == 5
    assert report.table().rows[0][:2] == ["16", "8"] and report.table().rows[0][3] == "1.000"
    assert "5 stretches of 8 tokens from 2 documents" in report.table().title


def test_documents_must_be_long_enough(tokenizer, long_text):
    with pytest.raises(UserError, match="a context of 32k tokens, but the longest document of .* has"):
        load_stretches([long_text], tokenizer, (16, 32768), 100)
    with pytest.raises(UserError, match="at least 4 tokens"):
        load_stretches([long_text], tokenizer, (3, 16), 100)


# --- YaRN


def test_yarn_reaches_the_rotary_module(directory):
    plain = LlamaForCausalLM.from_pretrained(directory / "llama")
    config = with_yarn(plain.config, 4.0, "llama")
    assert plain.config.rope_parameters["rope_type"] == "default" and config.max_position_embeddings == 1024
    scaled = LlamaForCausalLM.from_pretrained(directory / "llama", config=config)
    before, after = (model.model.rotary_emb for model in (plain, scaled))
    assert after.rope_type == "yarn" and not torch.allclose(before.inv_freq, after.inv_freq)
    assert after.inv_freq[-1].item() == pytest.approx(before.inv_freq[-1].item() / 4)  # the slowest pair is stretched
    assert after.inv_freq[0].item() == pytest.approx(before.inv_freq[0].item())  # the fastest is not
    input_ids = torch.randint(3, 97, (1, 300))
    with torch.no_grad():
        assert not torch.allclose(plain(input_ids).logits, scaled(input_ids).logits, atol=1e-3)


def test_yarn_is_refused_where_it_has_no_meaning():
    for config, sentence in (
        (make_linear().config, "is a converted one"),
        (make_gpt2().config, "needs rotary positions"),
        (with_yarn(make_teacher().config, 2.0, "m"), "is scaled already .its rope_type is yarn"),
    ):
        with pytest.raises(UserError, match=sentence):
            with_yarn(config, 2.0, "m")


def test_yarn_factors():
    config = make_teacher().config
    assert parse_rope_scaling("yarn=4.0").choose(config, ()) == 4.0
    auto = parse_rope_scaling("yarn=auto")
    assert auto.choose(config, (128, 1024)) == 4.0 and auto.choose(config, (128,)) == 1.0
    with pytest.raises(UserError, match="needs a length"):
        auto.choose(config, ())
    for text in ("yarn", "yarn=0.5", "yarn=inf", "yarn=x", "linear=2", ""):
        with pytest.raises(UserError, match="--rope_scaling is .*yarn=FACTOR"):
            parse_rope_scaling(text)


# --- plan and command line


def test_plans_are_checked_as_a_whole():
    plan = plan_contexts("1k,512", None, "64", trials="20,1k=30", depths=4, rope_scaling="yarn=2")
    assert plan.lengths() == (512, 1024, 64) and plan.trials.of(1024) == 30 and plan.rope_scaling.factor == 2.0
    for options, sentence in (
        ({"trials": "3", "depths": 4}, "has only 3 trials"),
        ({"trials": "8,2k=9"}, "names the length 2k"),
        ({"depths": 0}, "--depths is 0"),
    ):
        with pytest.raises(UserError, match=sentence):
            plan_contexts("1k,512", **options)


def test_too_short_a_length_is_one_sentence(tokenizer):
    with pytest.raises(UserError, match="--passkey asks for 64 tokens, but the prompt's fixed parts alone take"):
        passkey_prompts(tokenizer, (64,))
    with pytest.raises(UserError, match="--natural asks for 64 tokens"):
        natural_prompts(tokenizer, (64,), TEXT)


@pytest.mark.parametrize("model", ["llama", "student"])
def test_evaluate_over_the_context_length(directory, tmp_path, capsys, model):
    command = ["evaluate", str(directory / model), "--passkey", "320,400", "--natural", "400", "--device", "cpu"]
    command += ["--trials", "4,400=6", "--depths", "2", "--batch_size", "4", "--output", str(tmp_path / "out")]
    command += ["--context_perplexity", "64,128,1k", "--max_tokens", "64"]
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert "Passkey retrieval" in shown and "Perplexity of the same tokens under longer contexts" in shown
    names = {path.name for path in (tmp_path / "out").iterdir()}
    kinds = ("json", "md", "png")
    assert names == {f"{part}.{kind}" for part in ("passkey", "natural", "context_perplexity") for kind in kinds}
    saved = json.loads((tmp_path / "out" / "passkey.json").read_text())
    assert [(entry["length"], entry["trials"]) for entry in saved["lengths"]] == [(320, 4), (400, 6)]
    first = (tmp_path / "out" / "passkey.png").read_bytes()
    assert first.startswith(b"\x89PNG") and len(first) > 5000
    contexts = json.loads((tmp_path / "out" / "context_perplexity.json").read_text())
    assert [entry["length"] for entry in contexts["lengths"]] == [64, 128, 1024] and contexts["scored"] == 32


def test_evaluate_takes_text_and_yarn(directory, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = write_text(tmp_path / "text.jsonl", documents=30)
    command = ["evaluate", str(directory / "llama"), "--text", str(text), "--natural", "512", "--device", "cpu"]
    command += ["--trials", "4", "--depths", "2", "--sequence_length", "32", "--max_tokens", "64"]
    assert main([*command, "--rope_scaling", "yarn=auto"]) == 0
    notes = json.loads((tmp_path / "evaluation" / "natural.json").read_text())["notes"]
    assert notes == ["RoPE is scaled by YaRN with a factor of 2, from a trained context of 256 tokens."]
    assert "scaled by YaRN" in capsys.readouterr().out
    assert {"evaluation.json", "natural.json", "natural.png"} <= {x.name for x in (tmp_path / "evaluation").iterdir()}
    short = ["evaluate", str(directory / "llama"), "--context_perplexity", "64", "--max_tokens", "32"]
    assert main([*short, "--device", "cpu", "--rope_scaling", "yarn=auto"]) == 0
    assert "leaves RoPE as it is" in capsys.readouterr().out


@pytest.mark.parametrize(
    "model, flags, sentence",
    [
        ("llama", ["--passkey", "1q"], "--passkey has the length '1q'"),
        ("llama", ["--passkey", "400", "--trials", "0"], "--trials is 0"),
        ("llama", ["--passkey", "400", "--trials", "4", "--depths", "5"], "--depths is 5"),
        ("llama", ["--passkey", "400", "--trials", "50,1k=9"], "names the length 1k"),
        ("llama", ["--passkey", "40"], "fixed parts alone take"),
        (
            "llama",
            ["--natural", "400", "--text", "nowhere.txt", "--sequence_length", "32"],
            "nowhere.txt does not exist",
        ),
        ("llama", ["--context_perplexity", "1k,100k"], "but the longest document"),
        ("llama", ["--passkey", "400", "--rope_scaling", "ntk=2"], "--rope_scaling is 'ntk=2'"),
        ("student", ["--passkey", "400", "--rope_scaling", "yarn=2"], "is a converted one"),
        ("gpt2", ["--passkey", "400", "--rope_scaling", "yarn=2"], "needs rotary positions"),
        ("gpt2", ["--passkey", "400"], "a table that ends at 256"),
        ("llama", ["--rope_scaling", "yarn=2"], "Nothing to measure"),
    ],
)
def test_bad_input_is_one_sentence_and_writes_nothing(
    directory, tmp_path, capsys, monkeypatch, model, flags, sentence
):
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    assert main(["evaluate", str(directory / model), "--device", "cpu", *flags]) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("linearize:")]
    assert len(said) == 1 and sentence in said[0]
    assert list(tmp_path.iterdir()) == []


def test_demo_text_is_there_and_long_enough(tokenizer):
    documents = list(read_documents([DEMO_TEXT]))
    assert len(documents) == 23 and len(Hay(documents, tokenizer, 10**9)) > 32_768


@pytest.mark.slow
def test_a_real_model_finds_the_key(smollm2):
    from linearize.conversion.students import load_model, load_tokenizer

    plan = ContextPlan(**SMOLLM_KEYS)
    report = measure_contexts(load_model(smollm2), load_tokenizer(smollm2), plan, batch_size=4)[0]
    assert [result.score().hits for result in report.lengths] == [4, 4]
