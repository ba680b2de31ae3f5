"""Chats: shapes of rows, markers written in messages, and the tokens that answers are made of."""

import json

import numpy as np
import pytest
import torch
from data_toys import CHATML, CHATML_GENERATION, make_config, make_tokenizer, write_jsonl
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
from transformers import PreTrainedTokenizerFast

from linearize.config.settings import DataConfig
from linearize.data import documents as data_documents
from linearize.data import prepare_data
from linearize.data.rows import prepare_rows
from linearize.errors import UserError

TURNS = [("user", "tea?"), ("assistant", "yes "), ("user", "milk?"), ("assistant", "no")]
# Templates of reasoning models: thoughts of earlier turns are left out, and a prompt for an answer may open one.
CHATML_THINKING = CHATML.replace(
    "{{ m['content'] }}",
    "{% if m['role'] == 'assistant' and not loop.last %}{{ m['content'].split('</think>')[-1] }}"
    "{% else %}{{ m['content'] }}{% endif %}",
)
CHATML_OPENS_THOUGHTS = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>{% endif %}")


def messages(turns=TURNS):
    return [{"role": role, "content": content} for role, content in turns]


def tokens(records, tokenizer, format="chat", completion_only=True):
    """The documents' ids and what is learned of each, as text."""
    if isinstance(records, dict):
        records = [records]
    segments = list(
        data_documents.tokenize_records(
            [(f"line {i}", record) for i, record in enumerate(records, 1)],
            tokenizer,
            format,
            completion_only=completion_only,
        )
    )
    whole = [segment.ids.tolist() for segment in segments]
    learned = [
        tokenizer.decode(s.ids if s.supervised is None else s.ids[s.supervised], clean_up_tokenization_spaces=False)
        for s in segments
    ]
    return whole, learned


def chat_tokenizer(template, **options):
    tokenizer = make_tokenizer(**options)
    tokenizer.chat_template = template
    return tokenizer


def sentencepiece_like():
    """Whole words with the space before them, as Llama-2's: a token may begin with the prompt's last space."""
    words = ["<unk>", "</s>", "\u2581", "\u2581yes", "\u2581tea?", "\u2581Q:", "\u2581B:", "\u2581no"]
    letters = [*"abcdefghijklmnopqrstuvwxyzQB:?.</>"]
    core = Tokenizer(
        models.Unigram([(word, -1.0) for word in words] + [(letter, -5.0) for letter in letters], unk_id=0)
    )
    core.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    core.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.Fuse()])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", unk_token="<unk>")
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'assistant' %} {{ m.content }}</s>"
        "{% else %}Q: {{ m.content }} B:{% endif %}{% endfor %}"
    )
    return tokenizer


# ---- which tokens are answers


@pytest.mark.parametrize("trim", [True, False])
@pytest.mark.parametrize("template", [CHATML, CHATML_GENERATION])
def test_answers_that_touch_spaces(template, trim):
    tokenizer = chat_tokenizer(template)
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim)
    (ids,), (learned,) = tokens({"messages": messages()}, tokenizer)
    assert learned == "yes <|im_end|>\nno<|im_end|>\n"
    assert tokenizer.decode(ids) == tokenizer.apply_chat_template(messages(), tokenize=False)


def test_an_answers_first_token_may_hold_the_space_before_it():
    tokenizer = sentencepiece_like()
    _, (learned,) = tokens({"messages": messages([("user", "tea?"), ("assistant", "yes")])}, tokenizer)
    assert learned.strip() == "yes</s>"


def test_a_template_that_leaves_thoughts_out_gives_each_answer_a_document():
    tokenizer = chat_tokenizer(CHATML_THINKING)
    turns = [("user", "a"), ("assistant", "hm</think>b"), ("user", "c"), ("assistant", "so</think>d")]
    whole, learned = tokens({"messages": messages(turns)}, tokenizer)
    assert learned == ["hm</think>b<|im_end|>\n", "so</think>d<|im_end|>\n"]
    start = "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(whole[0]) == start + "hm</think>b<|im_end|>\n"
    assert tokenizer.decode(whole[1]).startswith(start + "b<|im_end|>\n")
    # One document where nothing is left out; all of a chat at once where all of it is learned.
    plain = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"), ("user", "e")]
    assert tokens({"messages": messages(plain)}, tokenizer)[1] == ["b<|im_end|>\nd<|im_end|>\n"]
    assert len(tokens({"messages": messages(turns)}, tokenizer, completion_only=False)[0]) == 1


def test_a_prompt_that_opens_a_thought_is_no_part_of_the_answer_that_lacks_it():
    tokenizer = chat_tokenizer(CHATML_OPENS_THOUGHTS)
    assert tokens({"messages": messages()}, tokenizer)[1] == ["yes <|im_end|>\nno<|im_end|>\n"]


# ---- markers written in messages


@pytest.mark.parametrize("template", [CHATML, CHATML_GENERATION])
@pytest.mark.parametrize("completion_only", [True, False])
def test_only_the_template_writes_special_tokens(template, completion_only):
    tokenizer = chat_tokenizer(template)
    turns = [("user", "what is </s>?"), ("assistant", "an <|im_end|> of a text <s>"), ("user", "<|im_end|>")]
    (ids,), (learned,) = tokens({"messages": messages(turns)}, tokenizer, completion_only=completion_only)
    rendered = tokenizer.apply_chat_template(messages(turns), tokenize=False)
    assert tokenizer.decode(ids) == rendered
    special = [i for i in ids if i < 4]
    assert special == [2, 3] * 3  # <|im_start|>, <|im_end|>
    assert learned == ("an <|im_end|> of a text <s><|im_end|>\n" if completion_only else rendered)
    # What stands around a marker is tokenised as it always is.
    harmless = [(role, text.replace("<", "(").replace(">", ")")) for role, text in turns]
    (other,), _ = tokens({"messages": messages(harmless)}, tokenizer, completion_only=completion_only)
    assert len(other) == len(ids) and sum(a != b for a, b in zip(ids, other, strict=True)) <= 8


def test_markers_and_a_tokenizer_that_writes_a_space_before_a_text():
    tokenizer = sentencepiece_like()
    turns = [("user", "a </s> b"), ("assistant", "yes")]
    (ids,), (learned,) = tokens({"messages": messages(turns)}, tokenizer)
    # A marker whose pieces are in the vocabulary under the same name would be that token: not so here.
    assert learned.strip() == "yes</s>"
    plain = [("user", "a b"), ("assistant", "yes")]
    (short,), _ = tokens({"messages": messages(plain)}, tokenizer)
    assert ids[:3] == short[:3] and ids[-4:] == short[-4:]


def test_a_special_token_that_takes_the_spaces_beside_it():
    tokenizer = chat_tokenizer(CHATML.replace("<|im_end|>\n", "<|stop|>  "))
    tokenizer.add_special_tokens({"additional_special_tokens": [AddedToken("<|stop|>", rstrip=True, special=True)]})
    with_marker, without = messages([("user", "</s>"), ("user", "b")]), messages([("user", "a"), ("user", "b")])
    (ids,), _ = tokens({"messages": with_marker}, tokenizer, completion_only=False)
    (expected,), _ = tokens({"messages": without}, tokenizer, completion_only=False)
    stop = tokenizer.convert_tokens_to_ids("<|stop|>")
    assert ids.count(stop) == 2 and ids[ids.index(stop) :] == expected[expected.index(stop) :]


@pytest.mark.parametrize("format", ["text", "instruction", "completion"])
def test_markers_in_other_rows_are_text(format):
    tokenizer = make_tokenizer(bos=True)
    row = {
        "text": {"text": "an old price <s>12</s>"},
        "instruction": {"instruction": "strike <s>12</s>", "output": "</s>"},
        "completion": {"prompt": "strike <s>12</s>", "completion": "</s>"},
    }[format]
    (ids,), _ = tokens(row, tokenizer, format)
    assert (ids.count(0), ids.count(1)) == (1, 1)
    assert tokenizer.decode(ids).count("</s>") == (2 if format == "text" else 3)


def test_markers_in_an_encoders_sentences_are_text(tmp_path):
    tokenizer = make_tokenizer(bos=True)
    tokenizer.pad_token = "</s>"
    path = write_jsonl(
        tmp_path / "a.jsonl", [{"text": f"The <s> number {i} is so old. And more of it."} for i in range(40)]
    )
    config = DataConfig(dataset=path, sequence_length=64, cache_dir=str(tmp_path / "cache"))
    train, _ = prepare_rows(config, tokenizer)
    assert all(int((train[i]["input_ids"] == 0).sum()) == 1 for i in range(len(train)))


# ---- shapes of rows


def test_contents_in_parts_are_joined():
    tokenizer = chat_tokenizer(CHATML)
    parts = [{"type": "text", "text": "ye"}, {"type": "text", "text": "s "}]
    rows = messages()
    rows[1]["content"] = parts
    assert tokens({"messages": rows}, tokenizer) == tokens({"messages": messages()}, tokenizer)


def test_a_missing_content_is_no_none():
    tokenizer = chat_tokenizer(CHATML)
    rows = [*messages(), {"role": "assistant", "content": None}]
    assert "None" not in tokens({"messages": rows}, tokenizer, completion_only=False)[1][0]


def test_sharegpt_rows_are_chats(tmp_path):
    tokenizer = chat_tokenizer(CHATML)
    names = {"user": "human", "assistant": "gpt"}
    chat = [{"from": names[role], "value": text} for role, text in TURNS]
    path = write_jsonl(tmp_path / "a.jsonl", [{"conversations": chat, "id": i} for i in range(3)])
    same = write_jsonl(tmp_path / "b.jsonl", [{"messages": messages()}] * 3)
    options = {"sequence_length": 8, "validation_documents": 0}
    made, expected = (prepare_data(make_config(tmp_path, p, **options), tokenizer)[0] for p in (path, same))
    assert torch.equal(made[:]["labels"], expected[:]["labels"])
    with_system = {"conversations": chat, "system": "Be brief."}
    (ids,), _ = tokens(with_system, tokenizer)
    assert tokenizer.decode(ids).startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\ntea?")


def test_prompt_and_completion_rows(tmp_path):
    tokenizer = chat_tokenizer(CHATML, bos=True)
    source = data_documents.Source("data", "", lambda: iter([("", {"prompt": "a", "completion": "b"})]))
    assert data_documents.resolve_format(source, "auto", "text", "messages") == "completion"
    whole, learned = tokens({"prompt": "tea? ", "completion": "yes"}, tokenizer, "completion")
    assert tokenizer.decode(whole[0]) == "<s>tea? yes</s>" and learned == ["yes</s>"]
    for template in (CHATML, CHATML_GENERATION):
        tokenizer.chat_template = template
        row = {"prompt": messages()[:3], "completion": messages()[3:]}
        whole, learned = tokens(row, tokenizer, "completion")
        assert tokenizer.decode(whole[0]) == tokenizer.apply_chat_template(messages(), tokenize=False)
        assert learned == ["no<|im_end|>\n"]
    with pytest.raises(UserError, match="prompt or the completion in line 1 is a list"):
        tokens({"prompt": "a", "completion": messages()}, tokenizer, "completion")
    rows = [{"prompt": "tea? ", "completion": "yes"}] * 8
    config = make_config(tmp_path, write_jsonl(tmp_path / "a.jsonl", rows), sequence_length=8, validation_documents=0)
    train, _ = prepare_data(config, tokenizer)
    assert (train[:]["labels"] == -100).any() and (train[:]["labels"] != -100).any()


# ---- text that JSON can write and no tokenizer takes


@pytest.mark.parametrize("kind", ["jsonl", "json"])
def test_half_a_surrogate_pair_is_mended_and_told(tmp_path, caplog, kind):
    lines = [json.dumps({"text": f"kettle {i}"}) for i in range(4)] + [
        '{"text": "steam \\ud83d rises \\ud83d\\ude00"}'
    ]
    path = tmp_path / f"a.{kind}"
    path.write_text("\n".join(lines) if kind == "jsonl" else f"[{', '.join(lines)}]")
    tokenizer = make_tokenizer()
    train, _ = prepare_data(make_config(tmp_path, str(path), validation_documents=0, sequence_length=8), tokenizer)
    assert "steam \ufffd rises \U0001f600" in tokenizer.decode(np.asarray(train.input_ids).ravel())
    (told,) = [record.message for record in caplog.records if "surrogate" in record.message]
    assert ("line 5 of" if kind == "jsonl" else "record 5 of") in told


def test_half_a_surrogate_pair_in_a_message(tmp_path):
    row = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b \\udc00"}]}'
    (tmp_path / "a.jsonl").write_text(row + "\n")
    config = make_config(tmp_path, str(tmp_path / "a.jsonl"), validation_documents=0, sequence_length=4)
    train, _ = prepare_data(config, chat_tokenizer(CHATML))
    assert len(train)
