"""The kernel benchmark: its files on a CPU, and the arithmetic of bars, errors and roofline on made-up records."""

import csv
import importlib
import json
import math
import sys
from pathlib import Path

import pytest
import torch

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture(scope="module")
def scripts():
    """The scripts' folder on the path, as when one of them runs."""
    sys.path.insert(0, str(SCRIPTS))
    yield importlib.import_module
    sys.path.remove(str(SCRIPTS))


@pytest.fixture
def benchmark(scripts):
    return scripts("benchmark_kernels")


def run_smoke(benchmark, folder, *arguments, names="SDPA,chunked,fla,Flex"):
    base = ["--preset", "smoke", "--device", "cpu", "--output", str(folder), "--only", names, "--commit", "abc"]
    return benchmark.main([*base, *arguments])


def test_writes_every_file_and_names_what_is_missing(benchmark, tmp_path):
    page = tmp_path / "docs" / "results_kernels.md"
    run_smoke(benchmark, tmp_path / "out", "--lengths", "64", "--page", str(page))
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    with open(tmp_path / "out" / "results.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(results["records"])
    ran = {r["contender"] for r in results["records"] if "ms" in r}
    assert {"SDPA flash", "ours: hybrid, chunked PyTorch", "SDPA flash, KV cache"} <= ran
    skipped = {r["contender"]: r["skipped"] for r in results["records"] if "skipped" in r}
    absent = {"fla chunk_linear_attn", "fla chunk_simple_gla", "SDPA cuDNN", "FlexAttention, block window"}
    assert absent <= set(skipped) and all(skipped.values())
    text = page.read_text()
    assert results["command"] in text and str(tmp_path) not in text
    for name in absent | ran:
        assert name in text
    for copy in ("results/kernels.png", "results/kernels.json"):
        assert (page.parent / copy).stat().st_size > 0 and copy in text
    assert (tmp_path / "out" / "kernels.png").read_bytes().startswith(b"\x89PNG")


def test_report_alone_measures_nothing(benchmark, tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark.report, "plot", lambda *_: None)
    run_smoke(benchmark, tmp_path, "--lengths", "64", names="SDPA flash")
    before = (tmp_path / "table.md").read_text()
    (tmp_path / "table.md").unlink()
    monkeypatch.setattr(benchmark, "Benchmark", None)
    benchmark.main(["--report", str(tmp_path)])
    assert (tmp_path / "table.md").read_text() == before


def test_runs_are_joined(benchmark, tmp_path):
    for name, length, ms in (("a", 64, 1.0), ("a", 128, 1.0), ("b", 64, 2.0)):
        path = tmp_path / name / "results.json"
        path.parent.mkdir(exist_ok=True)
        old = json.loads(path.read_text())["records"] if path.exists() else []
        rows = [*old, record(benchmark.report, "SDPA flash", length, ms=ms)]
        path.write_text(json.dumps({"command": f"run {name}", "machine": {"commit": name}, "records": rows}))
    joined = benchmark.join_runs([tmp_path / "a", tmp_path / "b"])
    assert [(r["length"], r["ms"]) for r in joined["records"]] == [(64, 2.0), (128, 1.0)]
    assert joined["command"] == "run a\nrun b" and joined["machine"]["commit"] == "a, b"


def test_slow_peers_and_limits_are_reasons(benchmark, tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "SLOW_MS", 0.0)
    monkeypatch.setattr(benchmark.report, "plot", lambda *_: None)
    records = run_smoke(benchmark, tmp_path, names="SDPA flash")["records"]
    forward = [r for r in records if r["mode"] == "forward"]
    assert "ms" in forward[0] and "already" in forward[1]["skipped"]
    records = run_smoke(benchmark, tmp_path, "--limit_seconds", "0", names="SDPA flash")["records"]
    assert all("limit" in r["skipped"] for r in records if r["mode"] == "forward")


def record(report, name, length, mode="forward", op="hybrid", **figures):
    common = {"contender": name, "op": op, "ours": name.startswith("ours"), "mode": mode, "length": length, "sinks": 0}
    return common | report.BAR_SHAPE | figures


def test_gate_ratios(benchmark):
    """Each arm over the same call without gate and unrotated maps: same mode and key heads."""
    report, maps = benchmark.report, benchmark.MAPS
    records = [
        record(report, maps, 8192, ms=1.0, graph_ms=0.5),
        record(report, f"{maps}, gate", 8192, ms=1.1),
        record(report, f"{maps}, gate", 8192, "forward+backward", ms=7.0),
        record(report, benchmark.IN_PLACE, 8192, "decode", ms=2.0),
        record(report, f"{benchmark.IN_PLACE}, gate", 8192, "decode", ms=2.5) | {"groups": 8},
    ]
    rows = benchmark.gate_table(records).splitlines()
    assert rows[2:] == [f"| {maps}, gate | forward | 32 | 1.100 |  | 1.15 |"]


def test_bars(scripts):
    report = scripts("kernel_report")
    ours, fla = "ours: hybrid, features", "fla chunk_linear_attn"
    records = [
        record(report, ours, 8192, ms=0.34, graph_ms=0.33),
        record(report, fla, 8192, op="linear", ms=0.66, graph_ms=0.7),
        record(report, ours, 2048, ms=0.1),
        record(report, ours, 32768, skipped="out of memory"),
        record(report, ours, 8192, "forward+backward", ms=1.0, peak_mib=100.0, error_output=math.nan),
        record(report, fla, 8192, "forward+backward", op="linear", ms=2.0, peak_mib=200.0),
        record(report, "ours: hybrid, chunked PyTorch", 8192, ms=99.0),
        record(report, "ours: hybrid, features, 4 sinks", 32768, "decode", drift=2e-3),
    ]
    judged = [b for b in report.judge(records) if b["contender"].startswith("ours: hybrid")]
    bars = {(b["mode"], b["length"], b["what"], b["bar"]): b for b in judged}
    assert bars["forward", 8192, "ms", "0.35"]["met"] is True
    against = bars["forward", 8192, "ms", "0.5 x fla chunk_linear_attn"]
    assert (against["limit"], against["met"], against["graph_met"]) == (0.33, False, True)
    assert bars["forward", 2048, "ms", "SDPA flash"]["met"] is None
    assert "SDPA flash" in bars["forward", 2048, "ms", "SDPA flash"]["why"]
    assert bars["forward", 32768, "ms", "1.3"]["why"] == "out of memory"
    both = "forward+backward"
    assert bars[both, 8192, "peak MiB", "0.5 x fla chunk_linear_attn"]["met"] is True
    assert bars[both, 8192, "ms", "0.65 x fla chunk_linear_attn"]["limit"] == 1.3
    assert bars[both, 8192, "error of the output", "0.005"]["met"] is False
    assert bars[both, 32768, "error of the output", "0.005"]["why"] == "not measured"
    assert [b["met"] for b in bars.values() if b["mode"] == "decode"] == [False]
    assert "**no**" in report.bars_table(list(bars.values()))


@pytest.mark.parametrize(("head_axis", "block"), [(1, 2**20), (1, 1), (2, 1)])
def test_relative_errors(scripts, monkeypatch, head_axis, block):
    peers, measures = scripts("kernel_peers"), scripts("kernel_measures")
    monkeypatch.setattr(measures, "ERROR_TOKENS", block)
    order = (1, 4, 6, 3) if head_axis == 1 else (1, 6, 4, 3)
    query, key = torch.randn(order), torch.randn(order).narrow(head_axis, 0, 2).contiguous()
    tensors = {"query": query, "key": key, "scale": torch.rand(4) + 1}

    def exact(t):
        whole = t["key"].repeat_interleave(2, dim=head_axis)
        return t["query"] * whole.sin() * t["scale"].view((1, -1, 1, 1) if head_axis == 1 else (1, 1, -1, 1))

    case = peers.Case(tensors, lambda t: exact(t) * 1.001, exact, head_axis=head_axis)
    assert measures.relative_errors(case) == pytest.approx(
        dict.fromkeys(["output", "query", "key", "scale"], 1e-3), rel=1e-2
    )


@pytest.mark.parametrize("length", [40, 192])
def test_plain_linear_is_masked_multiplication(scripts, length):
    query, key, value = torch.randn(3, 1, 2, length, 5, dtype=torch.float64)
    expected = (query @ key.mT).tril() @ value
    torch.testing.assert_close(scripts("kernel_peers").plain_linear(query, key, value), expected)


def test_roofline_counts(scripts):
    measures, peers = scripts("kernel_measures"), scripts("kernel_peers")
    shape = peers.Shape(8192)
    tensor = 2 * 32 * 8192 * 128  # bytes of one bf16 tensor
    assert measures.count_bytes("hybrid", "forward", shape, by_maps=False) == 6 * tensor
    assert measures.count_bytes("hybrid", "forward", shape, by_maps=True) == 4 * tensor
    assert measures.count_bytes("cosine", "forward+backward", shape, by_maps=False) == (4 + 4 + 3) * tensor
    grouped = peers.Shape(8192, groups=8)
    assert measures.count_bytes("hybrid", "forward", grouped, by_maps=False) == 3 * tensor + 3 * tensor / 4
    rows, square = 32 * 8192, 128 * 128
    window, within, state = 2 * 128 * 256, 2 * 64 * 256, 4 * square
    assert measures.count_flops("hybrid", "forward", shape, False) == rows * (window + within + state)
    assert measures.count_flops("cosine", "forward", shape, False) == rows * (within + state)
    maps = measures.count_flops("hybrid", "forward", shape, True) - rows * (window + within + state)
    assert maps == 2 * rows * 2 * 128 * 64  # queries and keys, D x f each


def test_reasons_are_short_and_carry_no_paths(benchmark):
    error = ImportError("cannot import name 'x' from 'fla' (/some/where/fla/__init__.py)\nmore")
    assert benchmark.one_line(error) == "cannot import name 'x' from 'fla'"
    assert benchmark.one_line(ValueError()) == "ValueError"


def test_labels_spread_as_little_as_can_be(scripts):
    spread = scripts("kernel_report").spread
    assert spread([0.0, 10.0], 1.0) == [0.0, 10.0]
    assert spread([0.0, 0.0, 0.0], 1.0) == pytest.approx([-1.0, 0.0, 1.0])


def naive_fla(query, key, value, scale, normalize=False):
    """What fla's ops compute, `(B, T, H, D)`, and a state that nobody reads."""
    weights = scale * torch.einsum("bthd,bshd->bhts", query, key).tril()
    if normalize:
        weights = weights / weights.sum(-1, keepdim=True)
    return torch.einsum("bhts,bshd->bthd", weights, value), None


@pytest.mark.parametrize("groups", [4, 2])
def test_fla_rows_compute_what_their_references_do(scripts, monkeypatch, groups):
    peers, measures = scripts("kernel_peers"), scripts("kernel_measures")
    monkeypatch.setattr(peers, "fla_op", lambda module, name: naive_fla)
    inputs = peers.draw(peers.Shape(128, 16, 16, heads=4, groups=groups), "cpu", torch.float32, seed=0)
    for contender in peers.CONTENDERS:
        if contender.name.startswith("fla"):
            case = contender.build(inputs)
            assert max(measures.relative_errors(case).values()) < 1e-4
            assert ("repeated" in case.note) == (groups == 2)


def test_the_salient_row_at_a_models_heads(scripts, benchmark):
    """Its error against the chunked path in float64, and shapes with the op's own window."""
    peers, measures = scripts("kernel_peers"), scripts("kernel_measures")
    assert {(s.heads, s.groups, s.dim) for s in benchmark.model_shapes()} == {(32, 32, 128), (32, 8, 128), (9, 3, 64)}
    assert {(s.length, s.batch, s.window) for s in benchmark.model_shapes()} == {
        (1024, 8, 224),
        (8192, 1, 224),
        (32768, 1, 224),
    }
    inputs = peers.draw(peers.Shape(64, 16, 16, heads=2, groups=1, window=8), "cpu", torch.float32, seed=0)
    (contender,) = (c for c in peers.CONTENDERS if c.name == "ours: salient, chunked PyTorch")
    assert max(measures.relative_errors(contender.build(inputs)).values()) < 1e-5


def test_only_ops_whose_flops_are_counted_are_on_the_roofline(scripts):
    report = scripts("kernel_report")
    figures = {"ms": 1.0, "heads": 32, "by_maps": False, "bytes_per_number": 2}
    rows = [record(report, f"ours: {op}", 2048, op=op, **figures) for op in ("hybrid", "salient", "landmark")]
    rates = {"copy_tb_per_s": 3.0, "product_tflop_per_s": 700.0}
    table = report.roofline_table(rows, rates)
    assert "ours: hybrid" in table and "salient" not in table and "landmark" not in table
