"""Bad input of `linearize glue`: one sentence and exit code 2, before anything is written."""

import pytest
from glue_toys import examples, make_inputs, write_rows, write_task
from tiny_runs import make_teacher_directory

from linearize.cli import main


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("glue"))


BAD_FILES = {
    "columns": ("mrpc/train.jsonl", '{"sentence1": "a", "label": 1}\n', "has no column sentence2, but MRPC needs"),
    "label": ("rte/validation.jsonl", None, "but a label of RTE is 0 (entailment), 1 (not_entailment)"),
    "similarity": ("stsb/train.jsonl", None, "but a label of STS-B is a number from 0 to 5"),
    "text": ("sst2/train.jsonl", '{"sentence": 5, "label": 1}\n', "The column sentence in line 1"),
    "empty": ("sst2/train.csv", "sentence,label\n", "holds no examples"),
    "fields": ("sst2/train.csv", "sentence,label\na,1\nb\n", "There are not 2 fields in line 3"),
    "twice": ("sst2/train.csv", "sentence,label\na,1\n", "keep one of them"),
    "encoding": ("sst2/train.csv", b"sentence,label\n\xff\xfe,1\n", "is not UTF-8 text"),
    "json": ("sst2/train.jsonl", "{\n", "is not valid JSON"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_bad_file_is_one_sentence(case, inputs, tmp_path, capsys):
    place, content, sentence = BAD_FILES[case]
    name = place.partition("/")[0]
    write_task(tmp_path, name)
    if content is None:
        rows = examples(name, 6)
        rows[3]["label"] = -1 if name == "rte" else 5.5
        write_rows(tmp_path / place, rows)
    else:
        if case != "twice" and place.endswith(".csv"):
            (tmp_path / name / "train.jsonl").unlink()
        (tmp_path / place).write_bytes(content if isinstance(content, bytes) else content.encode())
    check_sentence(["--tasks", name, "--data.dataset", str(tmp_path)], sentence, inputs, tmp_path, capsys)


def check_sentence(flags, sentence, inputs, tmp_path, capsys):
    base = ["--models", str(inputs / "teacher"), "--device", "cpu", "--output_dir", str(tmp_path / "out")]
    base += ["--data.dataset", str(inputs / "files"), "--data.sequence_length", "32"]
    capsys.readouterr()
    assert main(["glue", *base, *flags]) == 2
    error = capsys.readouterr().err
    assert sentence in error and "Traceback" not in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "flags, sentence",
    [
        (["--tasks", "cola,snli"], "Unknown task 'snli' in tasks: known are cola, sst2"),
        (["--tasks", "sst2,SST-2"], "names sst2 twice"),
        (["--seeds", "0,0"], "names a seed twice"),
        (["--seeds", "-1"], "must not be negative"),
        (["--names", "a,b"], "names has 2 entries for 1 models"),
        (["--names", "a/b"], "is no file name"),
        (["--models", "x/one", "--models", "y/one"], "Two models are called one"),
        (["--models", "{root}/nowhere"], "nowhere"),
        (["--models", "{root}/llama"], "is no encoder"),
        (["--data.dataset", "./nowhere"], "There is no folder ./nowhere"),
        (["--data.dataset", "{root}/empty"], "There is no training file of CoLA"),
        (["--data.dataset", "{root}/train_only", "--tasks", "mnli"], "There is no validation file of MNLI"),
        (["--data.sequence_length", "128"], "has 64 positions"),
        (["--data.max_examples", "0"], "at least 1"),
        (["--training.learning_rates", "fast"], "training.learning_rates is 'fast'"),
        (["--training.warmup_ratio", "2"], "between 0 and 1"),
        (["--training.epochs", "0"], "must be positive"),
        (["--report_to", "nobody"], "unknown tracker"),
    ],
)
def test_bad_input_is_one_sentence(flags, sentence, inputs, tmp_path, capsys):
    if "{root}/llama" in flags:
        make_teacher_directory(tmp_path / "llama")
    (tmp_path / "empty").mkdir()
    write_rows(tmp_path / "train_only" / "mnli" / "train.jsonl", examples("mnli", 6))
    flags = [flag.format(root=tmp_path) for flag in flags]
    check_sentence(flags, sentence, inputs, tmp_path, capsys)
