"""lm-eval on a live tiny model with tasks of local files, and what a user reads when a task cannot run."""

import json
import string
import sys

import pytest
import torch
from tiny_models import make_gpt2, make_student
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from linearize.errors import UserError
from linearize.evaluation import measure_speed, run_tasks
from linearize.evaluation.arms import context_tokens
from linearize.evaluation.context_reading import check_positions
from linearize.modeling import LinearizedLlamaConfig, LinearizedLlamaForCausalLM


@pytest.fixture(scope="module")
def tokenizer():
    """One token a character."""
    characters = ["<pad>", "<s>", "</s>", *string.printable]
    vocabulary = {character: i for i, character in enumerate(characters)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


@pytest.fixture(scope="module")
def student(tokenizer):
    torch.manual_seed(0)
    config = LinearizedLlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        mixers={"linear": {"type": "linear", "window": 4, "sinks": 1}},
    )
    return LinearizedLlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A multiple-choice and a generation task on a file of this machine."""
    folder = tmp_path_factory.mktemp("tasks")
    lines = [
        {"question": f"{a} + {b} =", "choices": ["1", "2", "3"], "label": a % 3} for a in range(4) for b in (1, 2)
    ]
    (folder / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    common = f"""
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder / "data.jsonl"}}}}}
test_split: test
doc_to_text: "{{{{question}}}}"
metadata: {{version: 1.0}}
"""
    choice = "task: tiny_choice\noutput_type: multiple_choice\ndoc_to_choice: choices\ndoc_to_target: label\n"
    choice += "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
    write = "task: tiny_write\noutput_type: generate_until\ndoc_to_target: '{{choices[label]}}'\n"
    write += "generation_kwargs: {until: [' '], max_gen_toks: 3}\n"
    write += "metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]\n"
    (folder / "tiny_choice.yaml").write_text(choice + common)
    (folder / "tiny_write.yaml").write_text(write + common)
    return folder


def test_local_tasks_run_offline(student, tokenizer, tasks, tmp_path):
    path = tmp_path / "scores" / "tasks.json"
    report = run_tasks(
        student,
        tokenizer,
        ["tiny_choice", "tiny_write"],
        include_path=tasks,
        limit=6,
        batch_size=4,
        output_path=path,
    )
    found = {(score.task, score.metric): score for score in report.scores}
    assert set(found) == {("tiny_choice", "acc"), ("tiny_write", "exact_match")}
    accuracy = found["tiny_choice", "acc"]
    assert 0 <= accuracy.value <= 1 and accuracy.samples == 6 and accuracy.stderr is not None
    saved = json.loads(path.read_text())
    assert saved["scores"][0]["task"] == "tiny_choice" and "lm_eval_version" in saved["record"]
    assert "| tiny_choice | acc |" in report.markdown()


def test_unknown_task_is_one_sentence(student, tokenizer, tasks, monkeypatch):
    import lm_eval.tasks

    class FewTasks(lm_eval.tasks.TaskManager):
        """Without the harness's thousands, which take 7 s to read."""

        def __init__(self, include_path, include_defaults=True):
            super().__init__(include_path=include_path, include_defaults=False)

    monkeypatch.setattr(lm_eval.tasks, "TaskManager", FewTasks)
    with pytest.raises(UserError, match="Unknown task 'tiny_choise': close names are tiny_choice"):
        run_tasks(student, tokenizer, ["tiny_choise"], include_path=tasks)


def test_missing_folder_and_no_task(student, tokenizer, tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        run_tasks(student, tokenizer, ["tiny_choice"], include_path=tmp_path / "nowhere")
    with pytest.raises(UserError, match="No task"):
        run_tasks(student, tokenizer, [])


def test_data_that_cannot_be_had(student, tokenizer, tasks, tmp_path):
    text = (tasks / "tiny_choice.yaml").read_text().replace(str(tasks / "data.jsonl"), str(tmp_path / "gone.jsonl"))
    (tmp_path / "lost.yaml").write_text(text.replace("tiny_choice", "lost_choice"))
    with pytest.raises(UserError, match="data of lost_choice cannot be loaded"):
        run_tasks(student, tokenizer, ["lost_choice"], include_path=tmp_path)


def test_no_network_is_one_sentence(student, tokenizer, tasks, tmp_path, monkeypatch):
    import datasets

    def unreachable(*args, **kwargs):
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(UserError, match="check the network"):
        run_tasks(student, tokenizer, ["tiny_choice"], include_path=tasks)


def test_without_lm_eval_the_extra_is_named(student, tokenizer, monkeypatch):
    for name in [name for name in sys.modules if name == "lm_eval" or name.startswith("lm_eval.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UserError, match=r"pip install 'linearize\[eval\]'"):
        run_tasks(student, tokenizer, ["piqa"])


def test_a_context_that_landmarks_take_part_of(tokenizer, tasks, monkeypatch):
    """Learned positions hold fewer tokens with landmarks: what the harness cuts to, what is timed and asked for."""
    import lm_eval.models.huggingface

    student = make_student(make_gpt2(n_positions=64), {"mixer": {"type": "landmark", "block_size": 8}})
    longest = student.config.longest_text
    assert longest < 64
    assert context_tokens(student.config) == context_tokens(student.config, "mixed") == longest
    assert context_tokens(student.config, "teacher") == context_tokens(make_gpt2(n_positions=64).config) == 64
    measure_speed(student)  # prompt and answer fill the context
    measure_speed(student, arm="teacher")
    check_positions(student, "--passkey", [longest])
    with pytest.raises(UserError, match=f"ask for at most {longest}"):
        check_positions(student, "--passkey", [longest + 1])
    cuts = []

    class Harness(lm_eval.models.huggingface.HFLM):
        def __init__(self, **arguments):
            cuts.append(arguments["max_length"])
            raise KeyboardInterrupt

    monkeypatch.setattr(lm_eval.models.huggingface, "HFLM", Harness)
    for arm in ("mixed", "teacher"):
        with pytest.raises(KeyboardInterrupt):
            run_tasks(student, tokenizer, ["tiny_choice"], include_path=tasks, arm=arm)
    assert cuts == [longest, 64]
