"""Prompts of the retrieval evaluations: lengths, trials, intervals, positions of the facts, scoring."""

import re

import pytest
import torch
from tiny_runs import make_tokenizer

from linearize.errors import UserError
from linearize.evaluation import (
    Trials,
    natural_prompts,
    passkey_prompts,
    wilson,
)
from linearize.evaluation.context_lengths import parse_lengths, parse_trials
from linearize.evaluation.labels import depth_label, length_label
from linearize.evaluation.natural import Hay, split_sentences
from linearize.evaluation.natural_facts import FACTS, NAMES, WHO
from linearize.evaluation.retrieval import is_hit, spread_depths

TEXT = [" ".join(f"The cat {verb} in house {i} for hours." for verb in ("slept", "ran", "ate")) for i in range(60)]


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


# --- lengths, trials, intervals


def test_lengths_and_trials():
    assert parse_lengths("1k, 512,32K,512", "--passkey") == (512, 1024, 32768)
    assert [length_label(n) for n in (512, 1000, 1024, 32768)] == ["512", "1,000", "1k", "32k"]
    trials = parse_trials("20,32k=200")
    assert (trials.of(1024), trials.of(32768)) == (20, 200)
    assert parse_trials("32k=200").of(512) == parse_trials(None).of(512) == 50


@pytest.mark.parametrize("text", ["1q", "", "1k,", "k", "-5", "0", "1.5k", "1k;2k"])
def test_malformed_lengths_are_one_sentence(text):
    with pytest.raises(UserError, match="--passkey has the length .*such as 512,1k,32k"):
        parse_lengths(text, "--passkey")


@pytest.mark.parametrize("text", ["", "many", "1k=", "=5", "0", "1k=0", "5,6", "1k=5,1024=6"])
def test_malformed_trials_are_one_sentence(text):
    with pytest.raises(UserError, match="--trials"):
        parse_trials(text)


def test_wilson_intervals():
    assert wilson(8, 10) == pytest.approx((0.490162, 0.943318), abs=1e-6)
    assert wilson(0, 10) == pytest.approx((0.0, 0.277533), abs=1e-6)
    assert wilson(50, 50) == pytest.approx((0.928652, 1.0), abs=1e-6)


def test_depths_are_spread_evenly():
    assert [share for _, share in spread_depths(5, 1)] == pytest.approx([0.1, 0.3, 0.5, 0.7, 0.9])
    places = spread_depths(50, 10)
    assert sorted(share for _, share in places) == pytest.approx([0.01 + 0.02 * i for i in range(50)])
    assert all(depth / 10 <= share < (depth + 1) / 10 for depth, share in places)
    counts = [sum(depth == wanted for depth, _ in spread_depths(7, 3)) for wanted in range(3)]
    assert counts == [3, 2, 2] and depth_label(1, 10) == "10-20%"


# --- prompts


def test_passkey_prompts_are_exact_in_tokens(tokenizer):
    prompts = passkey_prompts(tokenizer, (333, 1000), trials=Trials(6, {1000: 9}), depths=3)
    assert {length: len(asked) for length, asked in prompts.items()} == {333: 6, 1000: 9}
    for length, asked in prompts.items():
        for prompt in asked:
            assert prompt.input_ids.shape == (length,)
            text = tokenizer.decode(prompt.input_ids)
            assert text.count(f"\n{prompt.fact}\n") == 1 and text.endswith("\nWhat is the pass key? The pass key is")
            assert 1 <= int(prompt.answer) <= 50_000 and prompt.fact.count(prompt.answer) >= 2
            assert tokenizer.decode(prompt.input_ids[prompt.position :]).startswith(f"\n{prompt.fact}")


def test_passkey_positions_follow_the_depth(tokenizer):
    asked = passkey_prompts(tokenizer, (900,), trials=Trials(20), depths=10)[900]
    ordered = sorted(asked, key=lambda prompt: prompt.position)
    assert [prompt.depth for prompt in ordered] == sorted(prompt.depth for prompt in asked)
    gaps = [b.position - a.position for a, b in zip(ordered, ordered[1:], strict=False)]
    digits = max(len(prompt.answer) for prompt in asked) - min(len(prompt.answer) for prompt in asked)
    assert max(gaps) - min(gaps) <= 2 * 2 * digits + 1  # evenly, but for rounding and for longer and shorter keys


def test_prompts_begin_with_bos_where_the_tokenizer_puts_one():
    from tokenizers.processors import TemplateProcessing

    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    assert tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id == 1
    for prompts in (passkey_prompts(tokenizer, (400,)), natural_prompts(tokenizer, (400,), TEXT)):
        for prompt in prompts[400]:
            assert prompt.input_ids.shape == (400,) and (prompt.input_ids == 1).nonzero().tolist() == [[0]]


def test_prompts_depend_on_seed_and_length_alone(tokenizer):
    for make in (passkey_prompts, lambda *args, **options: natural_prompts(*args, TEXT, **options)):
        options = {"trials": Trials(6), "depths": 3}
        one, again = make(tokenizer, (500,), **options), make(tokenizer, (400, 500), **options)
        assert [p.answer for p in one[500]] == [p.answer for p in again[500]]
        assert all(torch.equal(a.input_ids, b.input_ids) for a, b in zip(one[500], again[500], strict=True))
        other = make(tokenizer, (500,), seed=1, **options)
        assert [p.answer for p in one[500]] != [p.answer for p in other[500]]


def test_sentences_keep_every_word():
    text = "“Come in,” said Mr. Elton. She did!  Then?\n\nA new paragraph\nwith a break. End"
    sentences = split_sentences(text)
    assert [s.strip() for s in sentences] == [
        "“Come in,” said Mr. Elton.",
        "She did!",
        "Then?",
        "A new paragraph",
        "with a break.",
        "End",
    ]
    assert "".join(sentences) == f"\n\n{text}"


def test_natural_prompts_hide_a_fact_between_sentences(tokenizer):
    asked = natural_prompts(tokenizer, (600,), TEXT, trials=Trials(16), depths=4)[600]
    places = set()
    for prompt in asked:
        text = tokenizer.decode(prompt.input_ids)
        assert prompt.input_ids.shape == (600,) and text.endswith(prompt.question)
        before, after = text.split(f" {prompt.fact}")
        assert before.endswith((".", "?", "!")) and after.startswith((" The cat", "\n\n"))
        assert re.search(r"hours\.\n\nQuestion: ", text)
        places.add(before.partition("\n\n")[2][:40])
    assert len(places) == 16
    ordered = sorted(asked, key=lambda prompt: prompt.position)
    assert all(
        abs(a - b) <= 1 for a, b in zip([p.depth for p in ordered], sorted(p.depth for p in asked), strict=True)
    )


def test_natural_answers_are_not_in_the_text(tokenizer):
    text = [" ".join(NAMES["person"][:-1] + NAMES["place"][:-1]) + ". " + TEXT[0]] * 30
    for prompt in natural_prompts(tokenizer, (400,), text, trials=Trials(40))[400]:
        if prompt.kind == "name":
            assert prompt.answer in (NAMES["person"][-1], NAMES["place"][-1])
        assert prompt.answer in prompt.fact and prompt.answer not in prompt.question


def test_short_text_is_repeated_with_one_warning(tokenizer, caplog):
    prompts = natural_prompts(tokenizer, (600, 700), TEXT[:2], trials=Trials(4), depths=2)
    assert all(len(p.input_ids) == length for length, asked in prompts.items() for p in asked)
    assert len(caplog.records) == 1 and "it is repeated" in caplog.records[0].getMessage()
    caplog.clear()
    natural_prompts(tokenizer, (600,), TEXT, trials=Trials(4), depths=2)
    assert not caplog.records


def test_hay_goes_on_at_the_beginning(tokenizer):
    hay = Hay(["One cat. Two cats.", "Three cats."], tokenizer, 1000)
    ids, ends = hay.stretch(0, len(hay) + 2)
    assert tokenizer.decode(ids).endswith("Three cats.\n\nOne cat.") and ends[-1] == len(ids)
    with pytest.raises(UserError, match="there is none"):
        Hay([], tokenizer, 10)


def words(text):
    return re.findall(r"[a-z{}]+", text.lower())


def test_questions_are_worded_differently():
    """No question repeats three words in a row of its fact, nor most of its words."""
    assert len(FACTS) >= 12 and {fact.answer for fact in FACTS} == {"number", "person", "place"}
    for fact in FACTS:
        for asked in (fact.question, fact.cue):
            told, question = words(fact.fact), words(asked)
            runs = {tuple(told[i : i + 3]) for i in range(len(told) - 2)}
            assert not runs & {tuple(question[i : i + 3]) for i in range(len(question) - 2)}, fact
            small = {"the", "of", "in", "to", "a", "for", "by", "is", "was", "did", "that", "which", "it", "{who}"}
            assert len((set(question) - small) & set(told)) <= 1, fact
            assert "{answer}" not in asked
        assert fact.fact.count("{answer}") == 1 and "{who}" in fact.fact and "{who}" in fact.question
    assert not set(WHO) & {name for names in NAMES.values() for name in names}


def test_scoring():
    assert is_hit(" 4172. The 9", "4172", "number") and is_hit("is 04172", "4172", "number")
    assert not is_hit(" 41 72", "4172", "number") and not is_hit("none", "4172", "number")
    assert not is_hit("locker 9, not 4172", "4172", "number")
    assert is_hit("It was OTTILIE, I think", "Ottilie", "name") and not is_hit("Ottiliens", "Ottilie", "name")
