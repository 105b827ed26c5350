"""The comparison: outputs first, speed only where they are right, every peer listed, files whole or absent."""

from __future__ import annotations

import copy
import json
import math
import re
import signal
from pathlib import Path

import pytest
import torch
from inception_fast.kernels import cpu
from PIL import Image
from torch import nn

import inception_fast
from inception_fast.cli import main
from inception_fast.measure import peers
from inception_fast.measure.compare import (
    BUDGET,
    WINOGRAD_SHARE,
    Case,
    Row,
    Subject,
    _timed,
    batches,
    calibrate,
    clouds,
    compare,
    relative_error,
    truth,
)
from inception_fast.measure.peers import Built, Compile, Eager, OnnxRuntime, OpenVino, TimeLimit, limited, named, quiet
from inception_fast.measure.timer import Plan
from inception_fast.models.blocks import SameMaxPool2d, SamePad2d

CONTRACT = {"model", "batch", "dtype", "runtime", "median_ms", "iqr_ms", "rel_error", "ratio"}
SHORT = Plan(seconds=1e-6, least=2, most=2, warmup=0, settle=0)


class Silent:
    def __init__(self):
        self.stages, self.fractions = [], []

    def stage(self, text):
        self.stages.append(text)

    def done(self, fraction):
        self.fractions.append(fraction)


class Peer:
    """A runtime that runs eagerly; `error` is added to its logits, `fails` is raised by its build."""

    package = "torch"

    def __init__(self, name="peer", error=0.0, fails=None, why=()):
        self.name, self.error, self.fails, self.why = name, error, fails, list(why)

    def reasons(self, dtype):
        return self.why

    def build(self, model, x, dtype, threads):
        if self.fails is not None:
            raise self.fails
        return Built(lambda x: lambda: model(x) + self.error, lambda y: y.float(), "as is")


def net() -> nn.Sequential:
    torch.manual_seed(0)
    body = (nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return nn.Sequential(*body, nn.Dropout(0.5), nn.Linear(8, 5)).eval()


@pytest.fixture
def subject() -> Subject:
    model = net()
    x = torch.randn(3, 3, 12, 12)
    calibrate(model, x)
    inputs = batches(x, 1)
    return Subject(model, inputs, truth(model, inputs))


@pytest.fixture
def ours_is(monkeypatch):
    """Replaces the engine by a function of the model."""

    def replace(function):
        monkeypatch.setattr(inception_fast, "optimize", lambda model, example, dtype=None: function(model))

    return replace


def rows_of(subject, *rivals, dtype="float32", limit=60.0, watch=None):
    return compare(Case("net", 1, dtype), subject, rivals, 1, SHORT, limit, watch or Silent())


def test_equal_outputs_are_timed(subject, ours_is):
    ours_is(lambda model: model)
    watch = Silent()
    ours, peer = rows_of(subject, Peer(), watch=watch)
    assert (ours.runtime, ours.ratio, ours.status) == ("inception_fast", 1.0, "ok")
    assert peer.ratio == pytest.approx(peer.median_ms / ours.median_ms) and peer.note == "as is"
    assert 0 < ours.median_ms and 0 <= ours.iqr_ms and ours.rounds == peer.rounds == 2
    assert max(ours.rel_error, peer.rel_error) <= 1e-6
    assert watch.fractions == sorted(watch.fractions) and watch.fractions[-1] == 1.0
    assert any("timing inception_fast, peer" in stage for stage in watch.stages)


def test_rows_say_how_far_the_cores_were(subject, ours_is, monkeypatch):
    ours_is(lambda model: model)
    seen = iter([30.04, None, 50.0])
    monkeypatch.setattr(cpu, "handover_ns", lambda: next(seen))
    plan = Plan(seconds=1e-6, least=3, most=3, warmup=0, settle=0)
    rows = compare(Case("net", 1, "float32"), subject, [Peer(), Peer("broken", fails=OSError())], 2, plan, 60, Silent())
    assert [row.handover_ns for row in rows] == [40.0, 40.0, None]
    assert all(row.handover_ns is None for row in rows_of(subject, Peer())), "one thread has no other"


@pytest.mark.parametrize(
    "fault, said",
    [
        (lambda y: y * (1 + 2 * BUDGET["float32"]), "speed not shown"),
        (lambda y: y[:, :4], r"output shape \(1, 4\); allowed: \(1, 5\)"),
        (lambda y: y * math.nan, "not finite"),
        (lambda y: torch.where(y == y.max(), math.inf, y), "not finite"),
    ],
)
def test_no_speed_of_a_wrong_output(subject, ours_is, fault, said):
    ours_is(lambda model: lambda x: fault(model(x)))
    (row,) = rows_of(subject, Peer())
    assert row.status == "wrong" and row.median_ms is row.iqr_ms is row.ratio is None
    assert re.search(said, row.note)
    json.dumps(row.as_json(), allow_nan=False)


def test_a_network_that_torch_rounds_badly_may_be_rounded_so(subject, ours_is):
    norm = nn.BatchNorm1d(5, affine=False)
    norm.running_mean = 0.97 * subject.truth[0][0].float()  # leaves three hundredths of a value, and all of its error
    model = nn.Sequential(subject.model, norm).eval()
    subject = Subject(model, subject.batches[:1], truth(model, subject.batches[:1]))
    rounded, scale = copy.deepcopy(model).bfloat16(), subject.truth[0].abs().max()
    ours_is(lambda model: lambda x: rounded(x.bfloat16()).float())
    ours, bad, good = rows_of(subject, Peer("bad", error=scale), Peer("good"), dtype="bfloat16")
    assert ours.status == good.status == "ok" and ours.rel_error > BUDGET["bfloat16"] and bad.status == "wrong"
    ours_is(lambda model: lambda x: rounded(x.bfloat16()).float() + scale)
    assert rows_of(subject, dtype="bfloat16")[0].status == "wrong"


def test_every_photo_is_checked_not_only_the_timed_one(subject, ours_is):
    last = subject.batches[-1]
    ours_is(lambda model: lambda x: model(x) + (1.0 if torch.equal(x, last) else 0.0))
    assert rows_of(subject)[0].status == "wrong"


def test_a_wrong_peer_is_listed_without_a_speed(subject, ours_is):
    ours_is(lambda model: model)
    ours, bad, good = rows_of(subject, Peer("bad", error=1.0), Peer("good"))
    assert ours.status == good.status == "ok" and good.median_ms is not None
    assert bad.status == "wrong" and bad.median_ms is None and bad.rel_error > 0.1


def test_peers_that_do_not_run_are_listed_with_the_reason(subject, ours_is):
    ours_is(lambda model: model)
    rivals = (Peer("absent", why=["it is not installed"]), Peer("broken", fails=RuntimeError("no\n such op")))
    _, absent, broken = rows_of(subject, *rivals)
    assert (absent.status, absent.note) == ("unavailable", "it is not installed")
    assert (broken.status, broken.note) == ("failed", "RuntimeError: no such op")


def test_who_fails_while_timed_costs_the_others_nothing(subject, ours_is):
    """And where that is ours, nothing is timed."""

    def failing(model, calls):
        left = iter(range(calls))

        def call(x):
            if next(left, None) is None:
                raise RuntimeError("out of\n memory")
            return model(x)

        return call

    class Tired(Peer):
        def build(self, model, x, dtype, threads):
            return super().build(failing(model, len(subject.batches) + 1), x, dtype, threads)

    ours_is(lambda model: model)
    ours, tired, good = rows_of(subject, Tired("tired"), Peer("good"))
    assert (tired.status, tired.note) == ("failed", "while timed: RuntimeError: out of memory")
    assert tired.median_ms is None and ours.rounds == good.rounds == 2 and good.ratio is not None
    ours_is(lambda model: failing(model, len(subject.batches) + 1))
    (row,) = rows_of(subject, Peer())
    assert row.status == "failed" and row.median_ms is None


def test_a_slow_build_is_given_up(subject, ours_is):
    class Slow(Peer):
        def build(self, model, x, dtype, threads):
            while True:
                try:
                    torch.zeros(1)
                except Exception:  # the habit of libraries that the limit must survive
                    continue

    ours_is(lambda model: model)
    _, slow = rows_of(subject, Slow("slow"), limit=0.2)
    assert slow.status == "failed" and "gave up after 0.2 s" in slow.note


def test_an_interrupt_is_not_taken_for_a_failing_peer(subject, ours_is):
    ours_is(lambda model: model)
    with pytest.raises(KeyboardInterrupt):
        rows_of(subject, Peer(fails=KeyboardInterrupt()))


def test_a_refusal_of_ours_is_no_failure_and_a_crash_is(subject, ours_is):
    def refuse(model):
        raise ValueError("dtype bfloat16; allowed: float32")

    ours_is(refuse)
    (row,) = rows_of(subject, Peer(), dtype="bfloat16")
    assert (row.status, row.note) == ("unavailable", "dtype bfloat16; allowed: float32")

    for error in (RuntimeError("out of arena"), TypeError("run() takes a pointer")):

        def crash(model, error=error):
            raise error

        ours_is(crash)
        (row,) = rows_of(subject, Peer())
        assert (row.status, row.note) == ("failed", f"{type(error).__name__}: {error}")


def test_a_build_without_our_kernels_says_so(subject, monkeypatch):
    missing = inception_fast.Unavailable("the native module is not built")
    monkeypatch.setattr(inception_fast, "backend_status", lambda: {"cpu": missing})
    (row,) = rows_of(subject, Peer())
    assert (row.status, row.note) == ("unavailable", "the native module is not built")


def test_a_ratio_is_established_only_beyond_the_noise():
    def established(mine, theirs):
        rows = [Row("m", 1, "float32", name) for name in ("inception_fast", "peer")]
        return _timed(rows, {"inception_fast": mine, "peer": theirs})[1].established

    steady = [1.0, 1.01] * 10
    assert established(steady, [x * 1.2 for x in steady]) is True
    assert established(steady, [x / 1.2 for x in steady]) is True
    assert established(steady, steady[::-1]) is False
    assert established([1.0, 1.5] * 10, [1.1, 1.6] * 10) is False  # always slower, by less than equal code differs
    assert established(steady[:3], [9.0] * 3) is False  # three rounds prove nothing


def test_calibration_keeps_activations_and_rounding_in_bounds():
    torch.manual_seed(0)
    deep = nn.Sequential()
    for _ in range(40):
        deep.extend([nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8, momentum=0.3), nn.ReLU()])
    deep.extend([nn.AdaptiveAvgPool2d(1), nn.Flatten()])
    x = torch.randn(2, 8, 9, 9)
    raw = truth(deep.eval(), [x])[0]
    calibrate(deep, x)
    (settled,) = truth(deep, [x])
    assert not deep.training and not any(m.training for m in deep.modules())
    assert deep[1].momentum == 0.3
    assert raw.abs().max() < 1e-6 < 0.5 < settled.abs().mean() < 5
    assert relative_error(deep(x).detach(), settled) <= 2e-6


def test_clouds_are_always_the_same_and_of_unit_strength():
    like = torch.zeros(1, 3, 75, 80)
    sky = clouds(like)
    assert sky.shape == (4, 3, 75, 80) and torch.equal(sky, clouds(like))
    assert sky.std().item() == pytest.approx(1.0) and (sky[0] - sky[1]).abs().max() > 0.5


def test_batches_take_turns():
    photos = torch.arange(3.0).view(3, 1, 1, 1).expand(3, 3, 2, 2)
    assert [b[:, 0, 0, 0].tolist() for b in batches(photos, 1)] == [[0], [1], [2]]
    assert [b[:, 0, 0, 0].tolist() for b in batches(photos, 2)] == [[0, 1], [2, 0]]
    assert [b[:, 0, 0, 0].tolist() for b in batches(photos, 4)] == [[0, 1, 2, 0]]
    assert len(batches(photos, 1, most=2)) == 2 and all(b.is_contiguous() for b in batches(photos, 2))


def test_relative_error():
    reference = torch.tensor([[1.0, -4.0]], dtype=torch.float64)
    assert relative_error(torch.tensor([[1.0, -4.0]]), reference) == 0.0
    assert relative_error(torch.tensor([[2.0, -4.0]]), reference) == 0.25
    assert math.isnan(relative_error(torch.tensor([[math.nan, 0.0]]), reference))


def test_peers_by_name():
    assert [peer.name for peer in named(["openvino", "eager"])] == ["openvino", "eager"]
    with pytest.raises(ValueError, match="unknown runtime 'tvm'; allowed: eager, compile, onnxruntime, openvino"):
        named(["tvm"])


@pytest.mark.parametrize("runtime", [OnnxRuntime(), OpenVino()], ids=lambda r: r.name)
@pytest.mark.parametrize("size", [(28, 27), (14, 7)], ids=str)
def test_peers_take_same_padding(runtime, size):
    """A pad and a pool whose paddings depend on the image size: (0, 1) and (1, 1) among them."""
    if runtime.reasons("float32"):
        pytest.skip("; ".join(runtime.reasons("float32")))
    net = nn.Sequential(SamePad2d(3, 2), nn.Conv2d(3, 4, 3, 2), SameMaxPool2d(3, 2)).eval()
    x = torch.randn(2, 3, *size) - 10  # below zero, so that zeros in place of the pool's padding would show
    with torch.inference_mode(), quiet():
        built = runtime.build(net, x, "float32", 1)
        assert relative_error(built.result(built.bind(x)()), net.double()(x.double())) <= BUDGET["float32"]


def test_a_peer_that_is_not_installed_says_so(monkeypatch):
    monkeypatch.setattr(peers, "version", lambda package: None if package == "onnx" else "1.0")
    assert OnnxRuntime().reasons("float32") == ["onnx is not installed"]
    assert OpenVino().reasons("float32") == [] and "bfloat16" in OnnxRuntime().reasons("bfloat16")[0]


@pytest.mark.parametrize("runtime", [Eager(), OnnxRuntime(), OpenVino(), Compile()], ids=lambda r: r.name)
def test_real_peers_agree_on_a_small_net(runtime, subject):
    if runtime.reasons("float32"):
        pytest.skip("; ".join(runtime.reasons("float32")))
    with torch.inference_mode(), quiet():
        built = runtime.build(subject.model, subject.batches[0], "float32", 1)
        for x, reference in zip(subject.batches, subject.truth, strict=True):
            assert relative_error(built.result(built.bind(x)()), reference) <= BUDGET["float32"]


def test_eager_in_half_precision_is_within_its_budget(subject):
    with torch.inference_mode():
        built = Eager().build(subject.model, subject.batches[0], "bfloat16", 1)
        error = relative_error(built.result(built.bind(subject.batches[0])()), subject.truth[0])
    assert BUDGET["float32"] < error <= BUDGET["bfloat16"] and built.note in ("NCHW", "channels_last")


def test_the_limit_leaves_no_alarm_behind():
    before = signal.getsignal(signal.SIGALRM)
    with limited(30.0):
        pass
    with pytest.raises(TimeLimit), limited(0.05):
        while True:
            pass
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0) and signal.getsignal(signal.SIGALRM) is before


def bench(tmp_path: Path, *extra: str) -> int:
    short = ("--image-size", "64", "--quick", "--threads", "1")
    return main(["bench", "inception_v1", *short, "--out", str(tmp_path / "out"), *extra])


def test_bench_end_to_end(tmp_path, capsys):
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    threads = torch.get_num_threads()
    assert bench(tmp_path, "--against", "eager", "--batch", "1,2", "--dtype", "float32,bfloat16") == 0
    assert torch.get_num_threads() == threads
    out, err = capsys.readouterr()
    assert "inception_v1" in out and "eager" in out and "bench.json" in out and "timing" in err
    document = json.loads((tmp_path / "out" / "bench.json").read_text())
    assert all(set(row) >= CONTRACT for row in document["rows"])
    ours = [row for row in document["rows"] if row["runtime"] == "inception_fast" and row["dtype"] == "float32"]
    theirs = [row for row in document["rows"] if row["runtime"] == "eager" and row["dtype"] == "float32"]
    assert [row["batch"] for row in ours] == [row["batch"] for row in theirs] == [1, 2]
    assert all(row["ratio"] == 1.0 and row["rel_error"] <= 1e-5 for row in ours)
    for mine, peer in zip(ours, theirs, strict=True):
        assert peer["ratio"] == pytest.approx(peer["median_ms"] / mine["median_ms"])
    assert {"machine", "cpu", "threads", "versions", "commit", "date", "command"} <= set(document["provenance"])
    assert document["provenance"]["threads"] == 1 and "--quick" in document["provenance"]["command"]
    assert document["provenance"]["images"] == ["china.jpg", "flower.jpg"]
    assert document["models"]["inception_v1"]["params"] == 6_624_904
    with Image.open(tmp_path / "out" / "bench.png") as picture:
        picture.load()
        assert picture.format == "PNG" and min(picture.size) >= 300
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["bench.json", "bench.png"]


@pytest.mark.parametrize("size", [(80, 60), (1, 1)])
def test_bench_on_the_users_flat_photo_as_json(tmp_path, capsys, size):
    Image.new("RGB", size, "teal").save(tmp_path / "mine.png")
    assert bench(tmp_path, "--against", "none", "--image", str(tmp_path / "mine.png"), "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert document == json.loads((tmp_path / "out" / "bench.json").read_text())
    assert [row["runtime"] for row in document["rows"]] == ["inception_fast"]
    assert document["provenance"]["images"] == [str(tmp_path / "mine.png")]


def test_winograd_is_a_row_beside_the_exact_one(tmp_path, capsys):
    pytest.importorskip("sklearn")
    assert bench(tmp_path, "--against", "none", "--winograd", "--dtype", "float32,bfloat16", "--json") == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    found = [(row["dtype"], row["runtime"], row["status"]) for row in rows]
    both = ("inception_fast", "inception_fast+winograd")
    assert found == [
        *zip(["float32"] * 2, both, ["ok"] * 2, strict=True),
        *zip(["bfloat16"] * 2, both, ["ok"] * 2, strict=True),
    ]
    for exact, tiled in (rows[:2], rows[2:]):
        dtype = exact["dtype"]
        assert not exact["note"] and tiled["note"].endswith("of 39 convolutions")
        assert 0 < exact["rel_error"] and 0 < tiled["rel_error"] <= WINOGRAD_SHARE[dtype] * BUDGET[dtype]
    assert rows[0]["rel_error"] != rows[1]["rel_error"]


def test_layers_are_rows_beside_the_plan(tmp_path, capsys):
    pytest.importorskip("sklearn")
    flags = ["--against", "none", "--winograd", "--layers", "--dtype", "float32,bfloat16", "--json"]
    assert bench(tmp_path, *flags) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    names = ["inception_fast", "inception_fast+winograd", "layers", "layers+winograd"]
    assert [row["runtime"] for row in rows] == names * 2 and {row["status"] for row in rows} == {"ok"}
    assert {row["note"] for row in rows if row["runtime"].startswith("layers")} == {"57 swapped, 0 left"}
    errors = [row["rel_error"] for row in rows[2:4]]
    assert (
        0 < errors[0] <= BUDGET["float32"] and errors[0] != errors[1] <= WINOGRAD_SHARE["float32"] * BUDGET["float32"]
    )


@torch.inference_mode()
def test_the_networks_that_are_timed_have_parameters_that_count_versions():
    net = peers._cast(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), "bfloat16", torch.channels_last)
    assert not any(tensor.is_inference() for tensor in (*net.parameters(), *net.buffers()))
    assert net[0].weight.dtype is torch.bfloat16 and net[0].weight.is_contiguous(memory_format=torch.channels_last)


def test_bench_is_red_when_ours_is_wrong(tmp_path, capsys, ours_is):
    ours_is(lambda model: lambda x: model(x) + 1.0)
    assert bench(tmp_path, "--against", "eager") == 1
    assert "speed not shown" in capsys.readouterr().out
    rows = json.loads((tmp_path / "out" / "bench.json").read_text())["rows"]
    assert [(row["status"], row["median_ms"]) for row in rows] == [("wrong", None)]
    assert not (tmp_path / "out" / "bench.png").exists()


def test_bench_of_a_format_we_lack(tmp_path, capsys, ours_is):
    def refuse(model):
        raise ValueError("dtype bfloat16; allowed: float32")

    ours_is(refuse)
    assert bench(tmp_path, "--against", "eager", "--dtype", "bfloat16") == 2
    out, err = capsys.readouterr()
    assert "not supported by this build or machine" in out
    assert err.splitlines()[-1] == "inception-fast: error: nothing ran; dtype bfloat16; allowed: float32"


def test_bench_of_float16_is_refused_at_once(tmp_path, capsys):
    assert bench(tmp_path, "--dtype", "float32,float16") == 2
    out, err = capsys.readouterr()
    assert out == "" and not (tmp_path / "out").exists()
    assert err.count("\n") == 1 and "'float16' is not known; allowed: float32, bfloat16 (" in err


def test_quick_leaves_out_only_the_slowest_builder():
    from inception_fast.cli import build_parser
    from inception_fast.cli.bench import _peers

    def chosen(*extra):
        return [peer.name for peer in _peers(build_parser().parse_args(["bench", "inception_v3", *extra]))]

    assert chosen() == ["eager", "compile", "onnxruntime", "openvino"]
    assert chosen("--quick") == ["eager", "onnxruntime", "openvino"]
    assert chosen("--quick", "--against", "compile") == ["compile"] and chosen("--against", "none") == []
    assert chosen("--winograd", "--against", "none") == ["inception_fast+winograd"]
    assert chosen("--layers", "--against", "none") == ["layers"]
    both = ["inception_fast+winograd", "layers", "layers+winograd"]
    assert chosen("--layers", "--winograd", "--against", "none") == both


def test_bench_without_a_model_says_so(capsys):
    assert main(["bench"]) == 2 and "--cpu-suite" in capsys.readouterr().err
    for flag in (["--batch", "2"], ["--dtype", "bfloat16"]):
        assert main(["bench", "--cpu-suite", *flag]) == 2 and "drop --batch and --dtype" in capsys.readouterr().err
