"""Gain-cell estimates against the published figures, their scaling, marks and errors; the GPU's step on a CPU."""

import json
from types import SimpleNamespace

import pytest
import torch
import yaml
from transformers import FalconConfig, GPT2Config, LlamaConfig, MambaConfig, MistralConfig, Qwen3NextConfig, T5Config

from linearize.cli import main
from linearize.conversion.gain_cells import load_cell
from linearize.errors import UserError
from linearize.hardware import estimate_hardware, hardware_report, measure_decode
from linearize.hardware import report as report_module
from linearize.hardware.estimate import COMPONENTS, constants
from linearize.hardware.gpu import GpuDecode, Measurement
from linearize.modeling.gain_cell import GainCell


def llama(head_dim=64, heads=12, key_value_heads=12, layers=2):
    return LlamaConfig(
        hidden_size=head_dim * heads,
        head_dim=head_dim,
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        num_hidden_layers=layers,
    )


def only_layer(config, window=1024, cell=None):
    (layer,) = estimate_hardware(config, window, cell).layers
    return layer


def figures(estimate):
    """Every figure of an estimate, by place."""

    def walk(value, place):
        if isinstance(value, dict) and value.keys() == {"value", "extrapolated"}:
            yield place, value
        elif isinstance(value, dict):
            for name, inner in value.items():
                yield from walk(inner, f"{place}.{name}" if place else name)
        elif isinstance(value, list):
            for inner in value:
                yield from walk(inner, place)

    return dict(walk(hardware_report("model", estimate).to_dict()["estimate"], ""))


def converted(mixer_types, **mixers):
    """What the estimate reads of a converted model's config."""
    return SimpleNamespace(
        model_type="linearized_gpt2",
        num_hidden_layers=len(mixer_types),
        num_attention_heads=12,
        hidden_size=768,
        mixer_types=mixer_types,
        mixers=mixers,
    )


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def call(no_gpu, capsys):
    """Run `linearize info`; returns the exit code, stdout and the lines on stderr."""

    def run(*arguments):
        capsys.readouterr()
        code = main(["info", *map(str, arguments)])
        printed = capsys.readouterr()
        return code, printed.out, printed.err.splitlines()

    return run


@pytest.fixture
def gpt2(tmp_path):
    GPT2Config().save_pretrained(tmp_path / "gpt2")
    return tmp_path / "gpt2"


def test_the_data_file_adds_up():
    data = constants()
    energy = data["energy_pj"]
    assert sum(energy[name] for name in COMPONENTS) == energy["head"] == 6150
    assert energy["head"] * data["published"]["heads"] == energy["layer"] == 73_800
    rows, columns = data["published"]["sub_array"]
    assert data["published"]["sub_arrays"] * rows * columns == 64 * 1024
    assert columns == GainCell().tile and "2409.19315" in data["source"]["paper"]


def test_gpt2_gives_the_published_figures_unmarked(no_gpu):
    found = estimate_hardware(GPT2Config())
    (layer,) = found.layers
    assert layer.energy_nj.value == 73.8 and layer.head_energy_nj.value == 6.15
    assert layer.latency_ns.value == 65 and layer.head_arrays.value == 16 and layer.layer_arrays.value == 2 * 12 * 16
    assert {name: figure.value for name, figure in layer.head_components_nj.items()} == {
        "scores": 1.12,
        "values": 0.7,
        "digital": 4.0,
        "dac": 0.33,
    }
    assert found.energy_nj.value == pytest.approx(12 * 73.8) and found.latency_ns.value == 12 * 65
    assert found.arrays.value == 12 * 384 and layer.layers == list(range(12)) and layer.reasons == []
    marks = figures(GPT2Config())
    assert len(marks) == 12 and not any(figure["extrapolated"] for figure in marks.values())


@pytest.mark.parametrize(("head_dim", "parts"), [(32, 1), (64, 1), (80, 2), (128, 2), (192, 3)])
def test_head_dimensions_are_counted_in_sub_arrays(head_dim, parts):
    layer = only_layer(llama(head_dim))
    energy = {name: figure.value for name, figure in layer.head_components_nj.items()}
    assert layer.head_arrays.value == 16 * parts and layer.layer_arrays.value == 2 * 12 * 16 * parts
    assert energy["scores"] == pytest.approx(1.12 * parts) and energy["values"] == pytest.approx(0.7 * parts)
    assert energy["digital"] == 4 * head_dim / 64 and energy["dac"] == pytest.approx(0.33 * head_dim / 64)
    assert layer.latency_ns.value == 65
    assert layer.energy_nj.extrapolated == layer.head_arrays.extrapolated == (head_dim != 64)


def test_half_the_window_halves_arrays_and_their_energy_alone(no_gpu):
    layer = only_layer(llama(), window=512)
    assert layer.head_arrays.value == 8
    assert {name: figure.value for name, figure in layer.head_components_nj.items()} == {
        "scores": 0.56,
        "values": 0.35,
        "digital": 4.0,
        "dac": 0.33,
    }
    assert layer.latency_ns.value == 65 and layer.reasons == ["window 512 (published: 1,024)"]


def test_grouped_heads_share_arrays_and_take_turns():
    grouped, single = only_layer(llama(key_value_heads=3)), only_layer(llama())
    assert grouped.layer_arrays.value * 4 == single.layer_arrays.value
    assert grouped.energy_nj.value == single.energy_nj.value
    assert grouped.latency_ns.value == single.latency_ns.value
    assert grouped.energy_nj.extrapolated and grouped.latency_ns.extrapolated and grouped.layer_arrays.extrapolated
    report = hardware_report("model", llama(key_value_heads=3))
    assert constants()["grouped_heads"] in report.notes()
    assert constants()["grouped_heads"] not in hardware_report("model", llama()).notes()


@pytest.mark.parametrize(
    ("cell", "marked"),
    [
        (GainCell(), False),
        (GainCell(output_grid="published"), False),
        (GainCell(leak=0.0), True),
        (GainCell().linear(), True),
        (GainCell(tile=32), True),
    ],
)
def test_another_cell_marks_every_figure(no_gpu, cell, marked):
    layer = only_layer(GPT2Config(), cell=cell)
    assert layer.head_arrays.value == 1024 // cell.tile
    report = hardware_report("gpt2", GPT2Config(), cell=cell).to_dict()["estimate"]
    assert report["energy_nj"]["extrapolated"] is marked and report["latency_ns"]["extrapolated"] is marked
    assert bool(layer.reasons) is marked


def test_other_numbers_of_heads_mark_the_latency_alone(no_gpu):
    marks = {name: figure["extrapolated"] for name, figure in figures(llama(heads=25, key_value_heads=25)).items()}
    assert {name for name, marked in marks.items() if marked} == {"latency_ns", "layers.latency_ns"}


def test_a_converted_model_brings_window_and_cell_along():
    cell = GainCell(tile=32)
    near = {"type": "gain_cell", "window": 256, "cell": cell.to_dict()}
    far = {"type": "gain_cell", "window": 1024, "cell": GainCell().to_dict()}
    config = converted(["near", "softmax", "far", "near", "linear"], near=near, far=far, linear={"type": "linear"})
    found = estimate_hardware(config, 512, GainCell(leak=0.0))
    assert found.gain_cell_layers
    assert [(layer.layers, layer.window, layer.cell["tile"]) for layer in found.layers] == [
        ([0, 3], 256, 32),
        ([2], 1024, 64),
    ]
    first, second = found.layers
    assert found.energy_nj.value == pytest.approx(2 * first.energy_nj.value + 73.8)
    assert found.latency_ns.value == 3 * 65 and found.energy_nj.extrapolated
    assert not second.energy_nj.extrapolated


def test_other_converted_models_are_estimated_as_if_converted():
    config = converted(["linear", "softmax"], linear={"type": "linear", "window": 64})
    found = estimate_hardware(config, 512)
    assert not found.gain_cell_layers and found.layers[0].layers == [0, 1] and found.layers[0].window == 512


@pytest.mark.parametrize(
    ("config", "shape", "layers"),
    [
        (MistralConfig(num_hidden_layers=2), (32, 8, 128), 2),
        (FalconConfig(num_hidden_layers=2), (71, 1, 64), 2),
        (FalconConfig(num_hidden_layers=2, new_decoder_architecture=True, num_kv_heads=71), (71, 71, 64), 2),
        (Qwen3NextConfig(num_hidden_layers=4), (16, 2, 256), 1),
    ],
)
def test_shapes_of_stock_models(config, shape, layers):
    found = estimate_hardware(config)
    assert (found.heads, found.key_value_heads, found.head_dim) == shape
    assert len(found.layers[0].layers) == layers


def test_models_without_this_attention_are_refused():
    latent = SimpleNamespace(model_type="latent", num_attention_heads=2, kv_lora_rank=512)
    for config, says in [
        (MambaConfig(), "no attention heads"),
        (T5Config(), "an encoder and a decoder"),
        (latent, "caches a latent"),
        (Qwen3NextConfig(num_hidden_layers=1, layer_types=["linear_attention"]), "no attention layers"),
    ]:
        with pytest.raises(UserError, match=says):
            estimate_hardware(config)


@pytest.mark.parametrize(("window", "tile"), [(1000, 64), (0, 64), (-64, 64), (64, 128)])
def test_a_window_must_fit_the_tile(window, tile):
    with pytest.raises(UserError, match=f"window is {window} tokens, .* tile, {tile}"):
        estimate_hardware(GPT2Config(), window, GainCell(tile=tile))


def test_cells_by_name_and_from_files(tmp_path):
    assert load_cell("silicon_cmos") == GainCell() and load_cell("silicon_cmos_linear") == GainCell().linear()
    file = tmp_path / "cell.yaml"
    file.write_text(yaml.safe_dump(GainCell(tile=32, leak=0.0).to_dict()))
    assert load_cell(file) == GainCell(tile=32, leak=0.0)
    file.write_text("output_levels: 16\n")
    assert load_cell(file) == GainCell(output_levels=16)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("- 1", "settings as names with values"),
        ("tile: [", "not a valid YAML file"),
        ("tilee: 64", "unknown key tilee"),
        ("tilee: 64\n1: 2", "cannot be used"),
        ("tile: 0", "tile is 0"),
        ("polynomial: [1, 2]", "polynomial"),
        ("leak: fast", "leak is 'fast'"),
    ],
)
def test_a_bad_cell_file_is_named_in_one_sentence(gpt2, tmp_path, call, text, says):
    (tmp_path / "cell.yaml").write_text(text)
    code, out, errors = call(gpt2, "--hardware", "gain-cell", "--cell", tmp_path / "cell.yaml")
    assert code == 2 and not out and len(errors) == 1
    assert "cell.yaml" in errors[0] and says in errors[0]


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--hardware", "abacus"], "must be one of gain-cell"),
        (["--hardware", "gain-cell", "--window", "1000"], "multiple of the cell's tile, 64"),
        (["--hardware", "gain-cell", "--cell", "missing.yaml"], "one of silicon_cmos, silicon_cmos_linear"),
        (["--window", "512"], "give --hardware gain-cell too"),
        (["--cell", "silicon_cmos"], "give --hardware gain-cell too"),
        ([], "holds no converted model"),
    ],
)
def test_bad_flags_end_with_one_sentence(gpt2, call, flags, says):
    code, out, errors = call(gpt2, *flags)
    assert code == 2 and not out and len(errors) == 1 and says in errors[0]


def test_flags_do_not_silently_lose_to_a_models_own_cells(gpt2, call, monkeypatch):
    own = converted(["cells"], cells={"type": "gain_cell", "window": 1024, "cell": GainCell().to_dict()})
    monkeypatch.setattr("linearize.cli.info.read_config", lambda source: own)
    assert call(gpt2, "--hardware", "gain-cell")[0] == 0
    code, _, errors = call(gpt2, "--hardware", "gain-cell", "--window", "512")
    assert code == 2 and "their own window and cell" in errors[0]


def test_info_prints_the_published_figures(gpt2, call):
    code, out, errors = call(gpt2, "--hardware", "gain-cell")
    assert code == 0 and not errors
    assert all(
        text in out for text in ("73.80", "885.6", "4,608", "Nature Computational Science 5, 813", "projections")
    )
    assert "No GPU was measured" in out and report_module.MARK not in out


def test_info_marks_what_it_extrapolates(gpt2, call):
    code, out, _ = call(gpt2, "--hardware", "gain-cell", "--window", "512", "--cell", "silicon_cmos_linear")
    assert code == 0 and f"62.88 {report_module.MARK}" in out
    assert f"{report_module.MARK} Extrapolated: window 512 (published: 1,024); a cell with another polynomial" in out
    assert "ceil(D / 64) x window / tile" in out


def test_info_as_json(gpt2, call):
    code, out, _ = call(gpt2, "--hardware", "gain-cell", "--window", "512", "--json")
    described = json.loads(out)
    assert code == 0 and described["gpu"] == []
    (layer,) = described["estimate"]["layers"]
    assert layer["energy_nj"] == {"value": 62.88, "extrapolated": True} and layer["window"] == 512
    assert layer["cell"] == GainCell().to_dict() and described["notes"]


@pytest.mark.parametrize("key_value_heads", [4, 2])
def test_the_gpu_step_sees_the_whole_cache_in_rotating_inputs(key_value_heads):
    seen = []

    def measure(calls):
        for call in calls:
            seen.append(call.args[1].data_ptr())
            query, key, value = (x.double() for x in call.args)
            key, value = (x.repeat_interleave(4 // key_value_heads, 1) for x in (key, value))
            weights = (query @ key.transpose(-1, -2) / 8**0.5).softmax(-1)
            torch.testing.assert_close(call().double(), weights @ value, atol=2e-3, rtol=0)  # float16 outputs near 1
        return Measurement(seconds=2e-6, joules=3e-6)

    step_bytes = 2 * 2 * key_value_heads * 16 * 8 * 2
    found = measure_decode(
        (2, 4, key_value_heads, 16, 8),
        device=torch.device("cpu"),
        name="a machine",
        l2_bytes=step_bytes,
        measure=measure,
    )
    assert len(set(seen)) == len(seen) == 3, "three times the cache"
    assert (found.batch, found.window, found.dtype, found.device) == (2, 16, "float16", "a machine")
    assert found.step_ns == pytest.approx(2000) and found.token_ns == pytest.approx(1000)
    assert found.token_nj == pytest.approx(1500)


@pytest.mark.parametrize(("energy", "says"), [(7e3, "idle power included"), (None, "nvidia-ml-py")])
def test_a_visible_gpu_stands_beside_the_estimate(monkeypatch, energy, says):
    asked = []

    def measure(*shape):
        asked.append(shape)
        return [GpuDecode("a GPU", "float16", shape[-1], 64, 22_400.0, 350.0, energy)]

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(report_module, "measure_gpu", measure)
    report = hardware_report("gpt2", GPT2Config())
    assert asked == [(12, 12, 64, 1024)]
    (table,) = [table for table in report.tables() if table.header[1] == "sequences"]
    assert table.rows[0] == ["gain cells, window 1,024", "1", "65", "65", "73.80"]
    assert table.rows[1][:4] == ["a GPU, window 1,024", "64", "22400", "350.0"]
    assert says in report.notes()[-1] and report.to_dict()["gpu"][0]["token_nj"] == energy


def test_layers_of_several_kinds_get_a_table_each_and_a_sum(no_gpu):
    kinds = {
        name: {"type": "gain_cell", "window": window, "cell": GainCell().to_dict()}
        for name, window in (("near", 512), ("far", 1024))
    }
    report = hardware_report("mixed", converted(["near", "far", "softmax"], **kinds))
    titles = [table.title for table in report.tables()]
    assert len(titles) == 3 and "layers 0, window 512" in titles[0] and titles[2] == "All these layers"
    assert "Counted are the model's 2 gain-cell layers of 3 layers." in report.notes()
