"""Windows and softmax layers by need: sizes, the greedy rule, what is measured, and whole runs with a selection."""

import itertools
import json

import pytest
import torch
import yaml
from tiny_models import make_gpt2, make_gptj, make_mistral, make_student, make_teacher
from tiny_runs import make_bert_directory, make_teacher_directory, tiny_config, write_text
from transformers import AutoModelForCausalLM, DynamicCache

import linearize
from linearize.cli import main
from linearize.config.record import read_record
from linearize.config.sizes import parse_budget, parse_bytes, parse_share
from linearize.data.sequences import TokenBlocks
from linearize.errors import UserError
from linearize.hardware.state_bytes import layer_bytes
from linearize.runs.engine import plan
from linearize.runs.settings import resolve_run
from linearize.stages import select_measure
from linearize.stages.select_measure import layer_tables, measured_pieces
from linearize.stages.select_place import largest, place

WINDOWS = [4, 8, 24]
SELECT = {"windows": WINDOWS, "tokens": 192, "sequence_length": 64}


# ---- sizes


def test_sizes_have_units():
    assert parse_bytes("7MB", "x") == 7_000_000 and parse_bytes("1.5 kib", "x") == 1536 and parse_bytes("3b", "x") == 3
    assert parse_budget("7MB").total(30) == 7_000_000 and parse_budget("240KB/layer").total(26) == 6_240_000
    assert parse_share("10%") == 0.1 and parse_share("2.5 %") == 0.025
    assert parse_share("101%") is parse_share("ten") is parse_share("10") is None


@pytest.mark.parametrize("text", ["7", "7XB", "MB", "", "-7MB", "7MB/model", "0B", "/layer", "1e3KB"])
def test_other_sizes_are_refused_in_a_sentence(text):
    with pytest.raises(UserError) as error:
        parse_budget(text)
    assert "state_budget is" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "value, kept",
    [(4, 4), ("4", 4), ("10%", "10%"), ([4], [4]), ("[4]", [4]), ("0,-1", [0, -1]), (-1, [-1]), ("", [])],
)
def test_softmax_layers_are_a_list_a_number_or_a_share(value, kept):
    config = {"model_name_or_path": "a/teacher", "stages": {}, "softmax_layers": value}
    assert resolve_run(config).softmax_layers == kept


@pytest.mark.parametrize("value", [0, "0", "few", 0.5, "0%", "200%"])
def test_other_softmax_layers_are_refused(value):
    with pytest.raises(UserError, match="softmax_layers is"):
        resolve_run({"model_name_or_path": "a/teacher", "stages": {}, "softmax_layers": value})


# ---- the greedy rule


def random_tables(seed: int, layers: int = 4, options: int = 4):
    generator = torch.Generator().manual_seed(seed)
    sizes = (torch.randperm(9, generator=generator)[:options].sort().values + 1).tolist()
    losses = torch.rand(layers, options, generator=generator).sort(dim=1, descending=True).values.tolist()
    return losses, sizes


def total(losses, options):
    return sum(row[option] for row, option in zip(losses, options, strict=True))


def hull_falls(row, sizes):
    """Falls of the steps along the lower convex hull, steepest first."""
    now, falls = 0, []
    while rest := [i for i in range(now + 1, len(sizes)) if row[i] < row[now]]:
        best = max(rest, key=lambda i: ((row[now] - row[i]) / (sizes[i] - sizes[now]), i))
        falls.append(row[now] - row[best])
        now = best
    return falls


@pytest.mark.parametrize("seed", range(6))
def test_the_rule_against_all_placements(seed):
    losses, sizes = random_tables(seed)
    everything = list(itertools.product(range(len(sizes)), repeat=len(losses)))
    spent = [sum(sizes[option] for option in options) for options in everything]
    step = max(fall for row in losses for fall in hull_falls(row, sizes))
    exact = 0
    for budget in range(len(losses) * sizes[0], len(losses) * sizes[-1] + 1):
        ours = place(losses, sizes, budget)
        assert sum(sizes[option] for option in ours) <= budget
        best = min(total(losses, x) for x, size in zip(everything, spent, strict=True) if size <= budget)
        assert best <= total(losses, ours) <= best + step
        # What the greedy rule spends without skipping a step is the best there is for as many bytes.
        exact += total(losses, ours) == pytest.approx(best)
    assert exact >= (len(losses) * (sizes[-1] - sizes[0])) // 3
    assert place(losses, sizes, len(losses) * sizes[-1]) == [len(sizes) - 1] * len(losses)


def test_bytes_go_where_they_take_most_away():
    losses = [[1.0, 0.9, 0.1], [1.0, 0.5, 0.4], [0.2, 0.2, 0.3]]
    # A layer may skip an option that lies above its hull, and none gets bytes that take nothing away.
    assert place(losses, [1, 2, 3], 9) == [2, 2, 0]
    assert place(losses, [1, 2, 3], 4) == [0, 1, 0]
    assert place(losses, [1, 2, 3], 6) == [2, 1, 0]
    assert place(losses, [1, 2, 3], 3) == [0, 0, 0]
    assert largest([0.1, 0.5, 0.5, 0.4], 2) == [1, 2] and largest([0.3, 0.3, 0.3], 1) == [0]


# ---- what is measured


def pieces(length: int = 40):
    return torch.randint(3, 97, (3, length), generator=torch.Generator().manual_seed(3))


def test_pieces_are_neighbouring_sequences_over_all_of_the_text():
    rows = TokenBlocks(torch.arange(12 * 16).view(12, 16))
    found = measured_pieces(rows, 96, 48)
    assert found.tolist() == [list(range(48)), list(range(96, 144))]
    assert measured_pieces(rows, 1, 20).tolist() == [list(range(20))]
    assert len(measured_pieces(rows, 10**6, 48)) == 4
    padded = TokenBlocks(torch.arange(12 * 16).view(12, 16), lengths=torch.full((12,), 10))
    assert measured_pieces(padded, 1, 20).tolist() == [[*range(10), *range(16, 26)]]
    with pytest.raises(UserError, match="do not fill one measured piece of 256"):
        measured_pieces(rows, 10**6, 256)


@pytest.mark.parametrize("make", [make_teacher, make_mistral, make_gpt2, make_gptj])
@pytest.mark.parametrize("kind", ["linear", "cosine", "salient"])
def test_the_tables_are_those_of_models_with_one_window(make, kind):
    """Against students of their own, one layer converted and the others softmax, by logits and queries and keys."""
    teacher, ids = make(), pieces()
    settings, arm, kept = {"type": kind, "window": 24, "sinks": 2}, "softmax", [0, 0, 0]
    if kind == "salient":
        settings, arm, kept = {**settings, "kept_tokens": 5}, "mixed", [0, 4, 7]
    student = make_student(teacher, {"it": settings})
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    tables = layer_tables(student, ids, WINDOWS, kept, batch_size=2)
    assert (tables.tokens, tables.sequence_length, tables.windows) == (120, 40, WINDOWS)
    layers = teacher.config.num_hidden_layers
    with torch.no_grad():
        target = teacher(ids).logits.double().log_softmax(-1)
        for layer, (option, window) in itertools.product(range(layers), enumerate(WINDOWS)):
            types = ["it" if i == layer else "softmax" for i in range(layers)]
            own = {"window": window, "kept_tokens": kept[option]} if kind == "salient" else {"window": window}
            one = make_student(teacher, {"it": {**settings, **own}}, types)
            one.set_arm(arm)
            ours = one(ids).logits.double().log_softmax(-1)
            divergence = (target.exp() * (target - ours)).sum(-1).mean()
            assert tables.divergence[layer][option] == pytest.approx(float(divergence), rel=1e-3, abs=1e-7)
            caught = []
            one.set_arm("teacher")
            one.mixer_attentions()[0].observer = lambda *call, caught=caught, **context: caught.append(call)
            one(ids)
            attention, query, key, value, output, _ = caught[0]
            error = (attention.mix(query, key, value, arm=arm) - output).square().sum() / output.square().sum()
            assert tables.error[layer][option] == pytest.approx(float(error), rel=1e-3, abs=1e-9)
    # The model is as it was.
    assert [a.arm for a in student.mixer_attentions()] == ["mixed"] * layers
    assert all(
        a.mixer.window == 24 and getattr(a.mixer, "kept_tokens", 5) == 5 and a.observer is None
        for a in student.mixer_attentions()
    )
    assert all("forward" not in vars(layer) for layer in student.decoder_layers())
    assert all(torch.equal(before[name], tensor) for name, tensor in student.state_dict().items())


def test_longer_windows_lose_less_and_the_whole_text_nothing():
    tables = layer_tables(make_student(make_teacher(), {"it": {"type": "linear", "sinks": 0}}), pieces(), [2, 12, 40])
    for table in (tables.divergence, tables.error):
        for row in table:
            assert row[0] > row[1] > 1e-6 and row[2] == pytest.approx(0, abs=1e-6)


# ---- runs


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    root = tmp_path_factory.mktemp("inputs")
    make_teacher_directory(root / "teacher", num_hidden_layers=4)
    write_text(root / "text.jsonl")
    return root


@pytest.fixture
def config(inputs, tmp_path):
    settings = tiny_config(inputs / "teacher", inputs / "text.jsonl", tmp_path / "out", inputs / "cache")
    return {**settings, "select": SELECT, "state_budget": "12KB/layer", "evaluation": None}


@pytest.fixture
def measurements(monkeypatch):
    """Counts the measured passes."""
    counted = []

    def measure(*args, **kwargs):
        counted.append(args)
        return layer_tables(*args, **kwargs)

    monkeypatch.setattr(select_measure, "layer_tables", measure)
    return counted


def only(config: dict, *names: str) -> dict:
    """The settings with these stages alone."""
    return {**config, "stages": {name: config["stages"][name] for name in names}}


def flags(inputs, out, *more):
    given = {
        "--data": inputs / "text.jsonl",
        "--data.sequence_length": 32,
        "--data.validation_documents": 6,
        "--data.cache_dir": inputs / "cache",
        "--dtype": "float32",
        "--device": "cpu",
        "--attention.sinks": 2,
        "--select.windows": "4,8,24",
        "--select.tokens": 192,
        "--select.sequence_length": 64,
    }
    words = [str(word) for name, value in given.items() if name not in more for word in (name, value)]
    return ["select", str(inputs / "teacher"), "--output_dir", str(out), *words, *more]


def state_of(model, tokens: int) -> list[int]:
    """Bytes that the cache layers hold after a prefill."""
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(torch.randint(3, 97, (1, tokens)), past_key_values=cache, use_cache=True)
    return [layer.nbytes() if hasattr(layer, "nbytes") else 0 for layer in cache.layers]


def test_a_run_with_a_budget(config, tmp_path, measurements, capsys):
    config = {**only(config, "transfer"), "softmax_layers": 1, "evaluation": {"max_tokens": 256}}
    result = linearize.run(config)
    shown = capsys.readouterr().out
    out, final = tmp_path / "out", tmp_path / "out" / "final"
    student = linearize.load_student(final, dtype=torch.float32)
    kept, names = student.config.mixer_types, student.config.mixers
    stored = json.loads((out / "selection.json").read_text())
    windows = stored["placement"]["windows"]
    assert kept == ["softmax" if window is None else f"linear_{window}" for window in windows]
    assert {name: names[name]["window"] for name in names} == {f"linear_{w}": w for w in windows if w is not None}
    assert all(settings["sinks"] == 2 for settings in names.values()) and kept.count("softmax") == 1
    # The bytes are the cache's own, and on average at most what was asked for.
    held = state_of(student, 64)
    assert sum(held) == stored["placement"]["state_bytes"] == result.record["selection"]["state_bytes"]
    assert sum(held) / 3 <= 12_000 < sum(held) / 3 + layer_bytes(student.config, kept.index("softmax"), 24)
    sentence = f"softmax layers: {kept.index('softmax')}; {sum(held):,} bytes of state"
    assert sentence in shown and sentence in (final / "README.md").read_text()
    assert any(sentence in note for note in result.report.notes)
    assert "](selection.png)" in (final / "README.md").read_text()
    for folder in (out, final):
        assert (folder / "selection.png").read_bytes().startswith(b"\x89PNG")
    assert len(measurements) == 1
    # Its own config and no other resumes it, and nothing is measured again; nor by a run that went on from it.
    longer = {**config["stages"], "finetune": {"kind": "train", "max_steps": 1, "tokens_per_step": 32}}
    resumed = linearize.run({**config, "resume_from_checkpoint": True, "stages": longer})
    assert len(measurements) == 1 and resumed.record["selection"] == result.record["selection"]
    assert AutoModelForCausalLM.from_pretrained(final).config.mixer_types == kept
    with pytest.raises(UserError, match="holds a run with other settings .state_budget"):
        linearize.run({**config, "resume_from_checkpoint": True, "state_budget": "13KB/layer"})
    with pytest.raises(UserError, match="is converted already, and its layers have their attention"):
        linearize.run({**config, "model_name_or_path": str(final), "output_dir": str(tmp_path / "again")})


def test_select_writes_what_run_and_convert_take(inputs, tmp_path, measurements, capsys):
    out = tmp_path / "chosen"
    assert main(flags(inputs, out, "--state_budget", "36KB", "--softmax_layers", "25%")) == 0
    shown = capsys.readouterr().out
    assert "Selection" in shown and "4 layers x 3 windows on 192 tokens in pieces of 64" in shown
    chosen = yaml.safe_load((out / "selection.yaml").read_text())
    assert set(chosen) == {"model_name_or_path", "revision", "dtype", "sliding_window", "mixer_types", "mixers"}
    assert chosen["mixer_types"].count("softmax") == 1 and chosen["dtype"] == "float32"
    # Another budget or ranking places anew from the tables that are there.
    assert main(flags(inputs, out, "--state_budget", "48KB")) == 0
    other = yaml.safe_load((out / "selection.yaml").read_text())
    assert "softmax" not in other["mixer_types"] and len(measurements) == 1
    stored = json.loads((out / "selection.json").read_text())
    ranked = flags(inputs, out, "--state_budget", "48KB", "--select.ranking", "error")
    assert main(ranked) == 0 and len(measurements) == 1
    placement = json.loads((out / "selection.json").read_text())["placement"]
    assert placement["ranking"] == "error"
    sizes = [layer_bytes_of(inputs, window) for window in WINDOWS]
    expected = place(stored["tables"]["error"], sizes, 48_000)
    assert placement["windows"] == [WINDOWS[option] for option in expected]
    # Other text does not.
    capsys.readouterr()
    write_text(tmp_path / "other.jsonl", seed=5)
    changed = flags(inputs, out, "--state_budget", "48KB", "--data", str(tmp_path / "other.jsonl"))
    assert main(changed) == 2 and "was measured with other text" in capsys.readouterr().err
    assert main([*changed, "--overwrite"]) == 0 and len(measurements) == 2
    # What was written is what both commands take.
    assert (
        main(["convert", str(inputs / "teacher"), str(tmp_path / "converted"), "--config", f"{out}/selection.yaml"])
        == 0
    )
    written = yaml.safe_load((out / "selection.yaml").read_text())
    converted = linearize.load_student(tmp_path / "converted")
    assert converted.config.mixer_types == written["mixer_types"] and converted.dtype == torch.float32
    assert read_record(tmp_path / "converted")["recipe"]["mixer_types"] == written["mixer_types"]
    # The bytes of a total are at most that total.
    assert sum(state_of(converted, 64)) <= 48_000


def layer_bytes_of(inputs, window: int) -> int:
    student = linearize.convert(inputs / "teacher", {"type": "linear", "window": window, "sinks": 2})
    return layer_bytes(student.config, 0, 64, dtype=torch.float32)


def test_a_run_from_a_written_selection(inputs, config, tmp_path, capsys):
    mixers = {"far": {"type": "linear", "window": 16}, "near": {"type": "linear", "window": 4, "sinks": 2}}
    named = {"mixer_types": ["near", "softmax", "far", "near"], "mixers": mixers}
    rest = {name: config[name] for name in ("model_name_or_path", "dtype", "device", "output_dir", "data")}
    settings = {**rest, **named, "stages": only(config, "transfer")["stages"], "evaluation": {"max_tokens": 256}}
    table = plan(settings).tables()[0]
    assert ["attention", "2 layers near, 1 layers softmax, 1 layers far"] in table.rows
    result = linearize.run(settings)
    student = linearize.load_student(result.final)
    assert student.config.mixer_types == named["mixer_types"] and student.config.mixers["near"]["sinks"] == 2
    assert [a.mixer.window for a in student.mixer_attentions()] == [4, 16, 4]
    assert result.report.control.startswith("control: softmax window 4 + 2 sinks, 16 + 4 sinks")
    assert linearize.run({**settings, "resume_from_checkpoint": True}).final == result.final
    with pytest.raises(UserError, match="mixer_types says what the layers have"):
        linearize.run({**settings, "attention": {"window": 3}})
    with pytest.raises(UserError, match="uses middle, which mixers does not describe"):
        linearize.run({**settings, "output_dir": str(tmp_path / "x"), "mixer_types": ["middle"] * 4})


def test_softmax_layers_by_number_alone_keep_the_window(config, measurements):
    config = {**only(config), "state_budget": None, "softmax_layers": 2}
    assert ["selection", "2 softmax layers by their divergence"] in plan(config).tables()[0].rows
    result = linearize.run(config)
    types = linearize.load_student(result.final).config.mixer_types
    tables = json.loads((result.output_dir / "selection.json").read_text())["tables"]
    assert tables["windows"] == [8]
    worst = sorted(range(4), key=lambda layer: -tables["divergence"][layer][0])[:2]
    assert types == ["softmax" if layer in worst else "linear_8" for layer in range(4)]


def test_a_run_onto_cosine_attention_with_a_budget(config):
    attention = {"type": "cosine", "window": 8, "sinks": 2}
    config = {**only(config, "calibrate", "transfer"), "attention": attention}
    config |= {"state_budget": "28KB", "softmax_layers": [1]}
    result = linearize.run(config)
    student = linearize.load_student(result.final, dtype=torch.float32)
    assert student.config.mixer_types[1] == "softmax" and result.record["calibration"]["sequences"] > 0
    assert {settings["type"] for settings in student.config.mixers.values()} == {"cosine"}
    held = state_of(student, 64)
    assert sum(held) == result.record["selection"]["state_bytes"] <= 28_000
    assert {name.removeprefix("cosine_") for name in student.config.mixers} <= set(map(str, WINDOWS))


def test_a_run_onto_salient_attention_with_a_budget(config):
    attention = {"type": "salient", "sinks": 2}
    config = {**only(config), "attention": attention, "state_budget": "28KB"}
    result = linearize.run({**config, "softmax_layers": [1]})
    student = linearize.load_student(result.final, dtype=torch.float32)
    selection = result.record["selection"]
    assert sum(state_of(student, 64)) == selection["state_bytes"] <= 28_000
    for layer, (window, kept) in enumerate(zip(selection["windows"], selection["kept"], strict=True)):
        settings = student.config.mixer(layer)
        assert (settings is None) == (window is None) == (kept is None) == (layer == 1)
        assert settings is None or (settings.window, settings.kept_tokens) == (window, kept)
        assert settings is None or (window + kept in WINDOWS and kept in (0, (window + kept) // 2))
    assert "windows + kept tokens: " in (result.output_dir / "selection.yaml").read_text().splitlines()[0]


def test_an_untrained_conversion_stands_for_its_teacher(inputs, tmp_path, capsys):
    student = tmp_path / "student"
    assert main(["convert", str(inputs / "teacher"), str(student), "--attention.sinks", "2"]) == 0
    command = flags(inputs, tmp_path / "chosen", "--state_budget", "48KB")
    command[1] = str(student)
    for word in ("--attention.sinks", "2"):
        command.remove(word)
    assert main(command) == 2 and "give the teacher to linearize select" in capsys.readouterr().err
    record = read_record(student)
    (student / "linearize.json").write_text(
        json.dumps({**record, "teacher": str(inputs / "teacher"), "teacher_on_hub": True})
    )
    assert main(command) == 0
    assert yaml.safe_load((tmp_path / "chosen" / "selection.yaml").read_text())["mixers"]["linear_4"]["sinks"] == 2


@pytest.mark.parametrize(
    "more, says",
    [
        (["--state_budget", "1KB"], "4 layers with a window of 4 keep"),
        (["--state_budget", "1KB/layer"], "raise it, keep more softmax_layers, or offer shorter select.windows"),
        (["--state_budget", "1GB"], "softmax attention itself keeps"),
        (["--state_budget", "7"], "a size is a number with a unit"),
        (["--softmax_layers", "4"], "softmax_layers asks for 4 layers, but of layers 0 to 3 one at least"),
        (["--softmax_layers", "100%"], "softmax_layers asks for 4 layers"),
        (["--softmax_layers", "[7]", "--state_budget", "48KB"], "softmax_layers names layer 7"),
        (["--softmax_layers", "0,1,2,3", "--state_budget", "48KB"], "names every layer"),
        (["--softmax_layers", "[1]"], "There is nothing to select"),
        (["--state_budget", "48KB", "--attention.type", "landmark", "--attention.sinks", "null"], "unknown"),
        (["--state_budget", "48KB", "--select.windows", "64"], "cannot tell a window of 64"),
        (["--state_budget", "48KB", "--select.windows", "0"], "select.windows is [0]"),
        (["--state_budget", "48KB", "--select.sequence_length", "512"], "the teacher's context is 256 tokens"),
        (["--state_budget", "48KB", "--select.ranking", "depth"], "one of divergence, error"),
        (["--softmax_layers", "1", "--attention.window", "0"], "attention.window is 0"),
    ],
)
def test_what_cannot_be_placed_is_refused(inputs, tmp_path, capsys, more, says, monkeypatch):
    monkeypatch.setattr("linearize.conversion.students.convert", None)  # before anything is loaded
    assert main(flags(inputs, tmp_path / "chosen", *more)) == 2
    error = capsys.readouterr().err
    assert says.lower() in error.lower() and error.count("\n") == 1
    assert not (tmp_path / "chosen").exists()


@pytest.mark.parametrize("kind", ["landmark", "gain_cell"])
def test_mechanisms_without_a_softmax_window_are_refused(config, kind):
    with pytest.raises(UserError, match=f"{kind} attention has no softmax window"):
        plan({**config, "attention": {"type": kind}})


def test_encoders_and_text_are_asked_for(tmp_path, inputs, capsys):
    make_bert_directory(tmp_path / "bert")
    text = ["--data", str(inputs / "text.jsonl"), "--output_dir", str(tmp_path / "x"), "--state_budget", "48KB"]
    assert main(["select", str(tmp_path / "bert"), *text]) == 2
    assert "is an encoder, which keeps no state" in capsys.readouterr().err
    assert main(["select", str(inputs / "teacher"), *text[2:]]) == 2
    assert "There is no text to measure on" in capsys.readouterr().err


@pytest.mark.parametrize("setting", [["--softmax_layers", "2"], ["--softmax_layers", "50%"]])
def test_convert_measures_nothing(inputs, tmp_path, capsys, setting):
    assert main(["convert", str(inputs / "teacher"), str(tmp_path / "x"), *setting]) == 2
    assert "as many layers as measuring is to choose" in capsys.readouterr().err and not (tmp_path / "x").exists()
