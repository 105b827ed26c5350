"""The profile: every step once, shares that add up, work and traffic as the specs say, a measured peak."""

from __future__ import annotations

import json

import pytest
import torch
from inception_fast.kernels.spec import ConvSpec
from torch import nn

from inception_fast.cli import main
from inception_fast.engine import optimize, slices
from inception_fast.measure import roofline
from inception_fast.measure.profiler import profile
from inception_fast.measure.roofline import Peak, measure_peak

CONTRACT = {"layer", "kind", "ms", "flops", "bytes", "gflops", "share", "peak_share"}
PEAK = Peak(1e12, 1e11, "nothing", "float32", 1)


def net() -> nn.Module:
    torch.manual_seed(0)
    body = (nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 8, 1), nn.ReLU())
    return nn.Sequential(*body).eval()


def test_work_and_traffic_by_hand():
    x = torch.randn(2, 8, 6, 6)
    found = profile(optimize(net(), x), x, PEAK, rounds=3)
    convs = [layer for layer in found.layers if layer.kind == "conv"]
    first, last = ConvSpec(2, 6, 6, 8, 16, 3, 3, padding=(1, 1, 1, 1)), ConvSpec(2, 3, 3, 16, 8, 1, 1)
    assert [(c.flops, c.bytes) for c in convs] == [(s.flops(), s.bytes()) for s in (first, last)]
    assert [layer.kind for layer in found.layers if layer.kind != "import"] == ["conv", "pool", "conv"]
    assert sum(layer.share for layer in found.layers) == pytest.approx(1)
    assert found.steps_ms == pytest.approx(sum(k["ms"] for k in found.by_kind().values()))
    for layer in convs:
        assert layer.gflops == pytest.approx(layer.flops / layer.ms / 1e6)
        assert layer.peak_share == pytest.approx(layer.gflops / 1000)
        assert layer.roof_share == pytest.approx(1e3 * PEAK.roof(layer.flops, layer.bytes) / layer.ms)
    assert found.rounds == 3 and found.call_ms > 0 and not found.fallbacks


@pytest.mark.parametrize("batch", [4, 7])
def test_slices_have_rows_of_the_whole_batch(monkeypatch: pytest.MonkeyPatch, batch: int):
    monkeypatch.setattr(slices, "ARENA_LIMIT", 12_000)
    x = torch.randn(batch, 8, 12, 12)
    fast = optimize(net(), x)
    assert fast.report().counts["slices"] > 1
    found = profile(fast, x, PEAK, rounds=2)
    assert {layer.shape[0] for layer in found.layers} == {batch}
    first = next(layer for layer in found.layers if layer.kind == "conv")
    assert first.flops == ConvSpec(batch, 12, 12, 8, 16, 3, 3, padding=(1, 1, 1, 1)).flops()


def test_what_runs_through_torch_is_named():
    module = nn.Sequential(nn.Conv2d(3, 4, 1), nn.GELU(), nn.Conv2d(4, 4, 1)).eval()
    x = torch.randn(1, 3, 4, 4)
    found = profile(optimize(module, x), x, PEAK, rounds=1)
    assert len(found.fallbacks) == 1
    assert [layer.kind for layer in found.layers].count("conv") == 2


def test_only_native_modules_have_steps():
    x = torch.randn(1, 8, 6, 6)
    with pytest.raises(ValueError, match="backend 'torch'; allowed: the native CPU kernels"):
        profile(optimize(net(), x, backend="torch"), x, PEAK)
    with pytest.raises(ValueError, match="rounds 0; allowed: 1 or more"):
        profile(optimize(net(), x), x, PEAK, rounds=0)


def test_the_roof_is_the_dearer_of_work_and_traffic():
    assert PEAK.roof(10**12, 0) == 1 and PEAK.roof(0, 10**11) == 1 and PEAK.roof(10**12, 3 * 10**11) == 3


def test_the_peak_is_measured():
    peak = measure_peak("float32", seconds=0.01)
    assert 1e8 < peak.flops < 1e15 and 1e7 < peak.bytes < 1e13 and peak.threads == torch.get_num_threads()
    assert "matrix product" in peak.by or "registers" in peak.by
    with pytest.raises(ValueError, match="dtype 'int8'; allowed: float32, bfloat16"):
        measure_peak("int8")


def test_memory_is_read_beyond_the_caches(monkeypatch):
    for level, found in ((32 << 20, roofline.READ), (1 << 28, 1 << 30)):
        monkeypatch.setattr(roofline, "caches", lambda level=level: {"L1": 1 << 15, "L3": level})
        assert roofline._bytes_read() == found
    monkeypatch.setattr(roofline, "caches", dict)
    assert roofline._bytes_read() == roofline.READ


@pytest.mark.alone
def test_the_command(tmp_path, capsys):
    base = ["profile", "inception_v1", "--image-size", "64", "--rounds", "2", "--threads", "1"]
    assert main([*base, "--out", str(tmp_path), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document == json.loads((tmp_path / "profile.json").read_text())
    assert len(document["rows"]) > 40 and all(row.keys() >= CONTRACT for row in document["rows"])
    assert document["input"] == [1, 3, 64, 64] and 0 < document["peak_share"] < 1.5
    bars = [event for event in json.loads((tmp_path / "trace.json").read_text())["traceEvents"] if event["ph"] == "X"]
    assert [bar["name"] for bar in bars] == [row["layer"] for row in document["rows"]]
    assert document["provenance"]["command"].startswith("inception-fast profile inception_v1")
    assert main([*base, "--top", "3"]) == 0
    out = capsys.readouterr().out
    assert "the dearest 3 of" in out and "% of the peak" in out and "conv" in out


def test_the_peak_is_the_best_before_and_after(tmp_path, monkeypatch, capsys):
    """Measured once, while others compute, it was a fraction of what layers then reached: 438 % of it."""
    peaks = [Peak(1e9, 5e9, "slow", "float32", 1), Peak(4e9, 2e9, "fast", "float32", 1)]
    monkeypatch.setattr(roofline, "measure_peak", lambda dtype: peaks.pop(0))
    assert main(["profile", "inception_v1", "--image-size", "64", "--rounds", "1", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert not peaks and {k: document["peak"][k] for k in ("flops", "bytes", "by")} == {
        "flops": 4e9, "bytes": 5e9, "by": "fast",
    }  # fmt: skip
    for row in document["rows"]:
        assert row["peak_share"] == pytest.approx(row["gflops"] / 4)
        assert row["roof_share"] == pytest.approx(max(row["flops"] / 4e9, row["bytes"] / 5e9) / (row["ms"] / 1e3))


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["nothing"], "unknown model 'nothing'; allowed: inception_resnet_v1, "),
        (["inceptoin_v1"], "unknown model 'inceptoin_v1' (did you mean inception_v1 or "),
        (["inception_v3", "--image-size", "20"], "allowed: 75x75 or larger"),
        (["inception_v3", "--dtype", "int8"], "'int8' is not known; allowed: float32, bfloat16, float16"),
    ],
)
def test_wrong_requests_get_one_line(capsys, arguments, said):
    assert main(["profile", *arguments]) == 2
    err = capsys.readouterr().err
    assert said in err and len(err.splitlines()) == 1
