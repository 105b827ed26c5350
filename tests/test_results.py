"""The figures of README and docs/ are those of the filed results, and what writes them there does what it says."""

from __future__ import annotations

import copy
import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from checkout import ROOT


def _load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


publish, judge = _load("publish"), _load("judge")
drawings, UNMEASURED = sys.modules["drawings"], sys.modules["tables"].UNMEASURED
ORIGIN = {
    "machine": "Chip 9, 2 cores", "cpu": "Chip(R) 9", "cores": 2, "threads": 2, "load": 0.3, "versions": {"torch": "2"},
    "commit": "0123456789abcdef", "date": "2026-01-02T03:04:05+00:00", "command": "inception-fast bench m",
}  # fmt: skip
README = "# R\n<!-- headline: begin -->\n<!-- headline: end -->\n<!-- article: begin -->\n<!-- article: end -->\n"
RESULTS = (
    "# A\n<!-- results: begin -->\nold\n<!-- results: end -->\n<!-- cpu-suite: begin -->\n<!-- cpu-suite: end -->\n"
    "B\n<!-- step: begin -->\n<!-- step: end -->\n<!-- aa: begin -->\n<!-- aa: end -->\n"
    "<!-- shares: begin -->\n<!-- shares: end -->\n"
    "<!-- claims: begin -->\n<!-- claims: end -->\n"
    "<!-- keras: begin -->\n<!-- keras: end -->\nC\n"
)


def bench_row(runtime: str, median: float | None, **fields: object) -> dict:
    ratio = None if median is None else median / 10
    row = {"model": "m", "batch": 1, "dtype": "float32", "runtime": runtime, "median_ms": median, "iqr_ms": 0.1}
    return row | {"rel_error": 2e-7, "ratio": ratio, "status": "ok", "note": "", "established": True} | fields


def bench(**origin: object) -> dict:
    rows = [
        bench_row("inception_fast", 10.0, established=None),
        bench_row("eager", 25.0),
        bench_row("openvino", 9.5, established=False),
        bench_row("onnxruntime", None, status="failed", note="no such op"),
    ]
    return {"provenance": ORIGIN | origin, "models": {}, "rows": rows}


def claims(**origin: object) -> dict:
    row = {"id": "a", "claim": "x | y", "source": "s", "stated": 28, "measured": 27.97, "unit": "%", "command": "c"}
    rows = [row | {"verdict": "confirmed"}, row | {"claim": "hidden", "verdict": "published"}]
    return {"provenance": ORIGIN | origin, "rows": rows}


@pytest.fixture
def house(tmp_path: Path) -> Path:
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text(README)
    (tmp_path / "docs" / "results.md").write_text(RESULTS)
    return tmp_path


def shown(house: Path) -> str:
    return (house / "docs" / "results.md").read_text()


def put(house: Path, document: dict, name: str = "in.json") -> Path:
    path = house / name
    path.write_text(json.dumps(document))
    return path


def test_pages_are_what_the_files_say(capsys: pytest.CaptureFixture[str]) -> None:
    assert publish.main(["--check"]) == 0, capsys.readouterr().out


def test_a_run_is_filed_and_shown(house: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = put(house, bench())
    assert publish.main([str(source)], house) == 0
    filed = house / "benchmarks" / "results" / "chip-r-9-2-cores" / "2026-01-02-bench.json"
    assert filed.read_text() == source.read_text() and str(filed.relative_to(house)) in capsys.readouterr().out
    text = shown(house)
    assert "| `m` | 1 | float32 | **10.00** | 25.00 (2.50x) | 9.50 (~0.95x) | failed | 2.0e-07 |" in text
    assert "onnxruntime, float32: failed: no such op" in text and "commit 0123456789;" in text
    assert str(filed.relative_to(house)) in text and text.count(UNMEASURED) == 6 and "old" not in text
    assert text.startswith("# A\n") and text.endswith("\nC\n")
    assert publish.main(["--check"], house) == 0
    assert publish.main([str(source)], house) == 0 and len(list(filed.parent.iterdir())) == 1


def test_drift_is_seen(house: Path) -> None:
    assert publish.main(["--check"], house) == 1
    assert publish.main([str(put(house, bench()))], house) == 0
    assert publish.main(["--check"], house) == 0
    page = house / "docs" / "results.md"
    page.write_text(page.read_text().replace("25.00", "26.00"))
    assert publish.main(["--check"], house) == 1 and "26.00" in page.read_text()


def test_the_newest_run_speaks_for_a_case_and_older_ones_for_the_rest(house: Path) -> None:
    old = bench()
    old["rows"] += [bench_row("inception_fast", 77.0, batch=8)]
    new = bench(date="2026-01-02T09:00:00+00:00")
    new["rows"][0]["median_ms"] = 5.0
    assert publish.main([str(put(house, old, "a.json")), str(put(house, new, "b.json"))], house) == 0
    names = sorted(p.name for p in (house / "benchmarks" / "results").glob("*/*"))
    assert names == ["2026-01-02-bench-2.json", "2026-01-02-bench.json"]
    text = shown(house)
    assert "**5.00**" in text and "**10.00**" not in text and "| `m` | 8 | float32 | **77.00** |" in text
    assert text.index("**5.00**") < text.index("**77.00**")


def networks(**origin: object) -> dict:
    """Two networks, one of them with tiles, on one image and eight."""
    rows = [
        bench_row("inception_fast", 10.0, model="inception_v3", established=None),
        bench_row("inception_fast+winograd", 5.0, model="inception_v3"),
        bench_row("layers", 9.0, model="inception_v3"),
        bench_row("eager", 25.0, model="inception_v3"),
        bench_row("openvino", 9.5, model="inception_v3", established=False),
        bench_row("onnxruntime", None, model="inception_v3", status="failed"),
        bench_row("inception_fast", 77.0, model="inception_v3", batch=8, established=None),
        bench_row("eager", 78.0, model="inception_v3", batch=8),
        bench_row("inception_fast", 4.0, model="inception_v1", established=None),
        bench_row("eager", 40.0, model="inception_v1"),
    ]
    return {"provenance": ORIGIN | origin, "models": {}, "rows": rows}


V1, V3 = (
    "| `inception_v1` | float32 | 4.0 ms | - | eager, 40.0 ms | 4.00 | - |",
    "| `inception_v3` | float32 | 10.0 ms | 5.0 ms | openvino, 9.5 ms | ~0.95 | 1.90 |",
)


def test_readme_has_one_image_beside_the_fastest_peer(house: Path) -> None:
    """Layers of ours are no peer, networks stand in the order of their papers, and the picture has their numbers."""
    assert publish.main([str(put(house, networks()))], house) == 0
    text = (house / "README.md").read_text()
    assert f"{V1}\n{V3}\n\nOne image on 2 threads, Chip 9, 2 cores;" in text and "77" not in text
    link = "(benchmarks/results/chip-r-9-2-cores/2026-01-02-bench.json)"
    assert link in text and f"(../{link[1:]}" in shown(house) and link not in shown(house)
    picture = house / "docs" / "speed.svg"
    numbers = drawings.kept(picture)
    assert numbers == {
        "inception_v1 float32": {"inception_fast": 10.0, "eager": 1.0},
        "inception_v3 float32": {
            "inception_fast": 2.5, "inception_fast+winograd": 5.0, "layers": 2.778, "eager": 1.0, "openvino": 2.632,
        },
    }  # fmt: skip
    assert ">openvino</text>" in picture.read_text() and "2.6" in picture.read_text()
    assert publish.main(["--check"], house) == 0
    picture.write_text(picture.read_text().replace("2.632", "2.633"))
    assert publish.main(["--check"], house) == 1
    assert publish.main([], house) == 0 and drawings.kept(picture) == numbers


@pytest.mark.parametrize(
    "other",
    [
        {"cpu": "Chip(R) 8", "date": "2026-01-01T00:00:00+00:00"},
        {"command": "inception-fast bench inception_v3 --image-size 96"},
        {"command": "inception-fast bench inception_v3 --threads=1", "threads": 1},
        {"date": "2026-01-01T00:00:00+00:00"},
    ],
    ids=["another machine, earlier", "another size", "one thread", "earlier"],
)
def test_readme_has_the_newest_of_one_machine_as_it_is_used(house: Path, other: dict) -> None:
    document = networks(**({"date": "2026-01-03T00:00:00+00:00"} | other))
    document["rows"][0]["median_ms"] = 3.0
    assert publish.main([str(put(house, networks(), "a.json")), str(put(house, document, "b.json"))], house) == 0
    text = (house / "README.md").read_text()
    assert V1 in text and V3 in text


def test_readme_has_no_row_without_a_peer(house: Path) -> None:
    """A newer run of ours alone leaves the older one's row."""
    alone = networks(date="2026-01-03T00:00:00+00:00")
    alone["rows"] = [
        bench_row("inception_fast", 3.0, model="inception_v3"),
        bench_row("layers", 4.0, model="inception_v3"),
    ]
    assert publish.main([str(put(house, networks(), "a.json")), str(put(house, alone, "b.json"))], house) == 0
    text = (house / "README.md").read_text()
    assert V3 in text and "2026-01-03" not in text


@pytest.mark.parametrize("name", drawings.PICTURES)
def test_a_picture_is_drawn_from_the_numbers_that_it_keeps(name: str, tmp_path: Path) -> None:
    numbers = drawings.kept(ROOT / name)
    figure = drawings.PICTURES[name].figure(numbers)
    drawings.draw(figure, numbers, tmp_path / "again.svg")
    assert drawings.kept(tmp_path / "again.svg") == numbers
    shown, again = (
        (path.read_text().count("<text"), path.read_text().count("<path"))
        for path in (ROOT / name, tmp_path / "again.svg")
    )
    assert shown == again and min(shown) > 10


def test_a_training_step_is_shown_with_its_memory(house: Path) -> None:
    row = {"model": "m", "batch": 4, "size": 96, "dtype": "float32", "noise": 0.01, "peak_bytes": 2_000_000}
    rows = [
        row | {"runtime": "inception_fast", "median_ms": 10.0, "ratio": 1.0, "p_value": None},
        row | {"runtime": "eager", "median_ms": 12.0, "ratio": 1.2, "p_value": 0.001, "peak_bytes": 3_000_000},
        row | {"runtime": "compile", "median_ms": 10.05, "ratio": 1.005, "p_value": 0.001},
        row | {"runtime": "other", "median_ms": 9.0, "ratio": 0.9, "p_value": 0.3},
        row | {"runtime": "off", "median_ms": 5.0, "ratio": 0.5, "p_value": 0.01, "status": "wrong", "loss_error": 0.7},
    ]
    assert publish.main([str(put(house, {"provenance": ORIGIN, "rows": rows}))], house) == 0
    part = shown(house).split("<!-- step: begin -->")[1].split("<!-- step: end -->")[0]
    assert "| `m` | 4 of 96x96 | float32 | inception_fast | **10.00** | 2 |" in part
    assert "eager | 12.00 (1.20x) | 3 |" in part and "2026-01-02-step.json" in part
    assert "off | wrong | 2 |" in part and "- off, float32: wrong: its loss is off by 7.0e-01" in part
    assert "compile | 10.05 (~1.00x)" in part and "other | 9.00 (~0.90x)" in part


@pytest.mark.parametrize(
    ("noise", "p_value", "said"),
    [(0.01, 0.015, "1.10x"), (0.119, 0.015, "~1.10x"), (0.01, 0.039, "~1.10x")],
    ids=["beyond both", "ours is noisier", "chance"],
)
def test_a_training_step_is_judged_as_every_benchmark(house: Path, noise: float, p_value: float, said: str) -> None:
    row = {"model": "m", "batch": 4, "size": 96, "dtype": "float32", "noise": 0.01, "peak_bytes": 2_000_000}
    rows = [
        row | {"runtime": "inception_fast", "median_ms": 10.0, "ratio": 1.0, "p_value": None, "noise": noise},
        row | {"runtime": "eager", "median_ms": 11.0, "ratio": 1.1, "p_value": p_value},
    ]
    assert publish.main([str(put(house, {"provenance": ORIGIN, "rows": rows}))], house) == 0
    assert f"eager | 11.00 ({said}) |" in shown(house)


def test_shares_are_shown_by_the_number_of_threads(house: Path) -> None:
    row = {"model": "m", "batch": 4, "dtype": "float32", "winograd": False, "balance": 0.5, "work_ms": 1.0}
    rows = [row | {"shared_by": n, "speedup": n * 0.75, "critical_ms": 8 / n} for n in (1, 4, 32)]
    rows += [other | {"winograd": True, "speedup": 1.26} for other in rows]
    assert publish.main([str(put(house, {"provenance": ORIGIN, "tier": "avx2", "rows": rows}))], house) == 0
    part = shown(house).split("<!-- shares: begin -->")[1].split("<!-- shares: end -->")[0]
    assert "| model | images | format | 4 threads | 32 threads |" in part and "one thread; avx2." in part
    assert "| `m` | 4 | float32 | 3.0 | 24.0 |" in part and "| `m` | 4 | float32, Winograd | 1.3 | 1.3 |" in part
    assert "2026-01-02-shares.json" in part


def test_keras_has_a_table_of_its_own(house: Path) -> None:
    """Beside the cases of another run, whose name without the suffix and whose times differ."""
    document = bench(date="2026-01-03T03:04:05+00:00")
    for row in document["rows"]:
        row["model"] = "m in Keras"
    document["rows"][0]["median_ms"] = 7.0
    assert publish.main([str(put(house, bench())), str(put(house, document, "b.json"))], house) == 0
    plain, keras = shown(house).split("<!-- keras: begin -->")
    assert "| `m` | 1 | float32 | **10.00** |" in plain and "7.00" not in plain and "2026-01-02-bench.json" in plain
    assert "| `m` | 1 | float32 | **7.00** |" in keras and "10.00" not in keras and "2026-01-03-bench.json" in keras


def test_a_run_without_a_peer_hides_no_peer(house: Path) -> None:
    """A newer run that does not name the peer ahead leaves the older run's table where it is."""
    new = bench(date="2026-01-02T09:00:00+00:00")
    new["rows"] = [bench_row("inception_fast", 5.0, established=None), bench_row("eager", 25.0)]
    assert publish.main([str(put(house, bench(), "a.json")), str(put(house, new, "b.json"))], house) == 0
    text = shown(house)
    assert "**5.00**" in text and "9.50 (~0.95x)" in text
    full = bench(date="2026-01-02T10:00:00+00:00")
    full["rows"][0]["median_ms"] = 4.0
    assert publish.main([str(put(house, full, "c.json"))], house) == 0
    text = shown(house)
    assert "**4.00**" in text and "**5.00**" not in text and "**10.00**" not in text


@pytest.mark.parametrize("runtime", ["openvino", "inception_fast"])
def test_a_failure_hides_no_time(house: Path, runtime: str) -> None:
    """Of a peer that is not installed any more, or of ours; a later run with all times stands alone."""
    new, later = bench(date="2026-01-02T09:00:00+00:00"), bench(date="2026-01-02T10:00:00+00:00")
    row = next(row for row in new["rows"] if row["runtime"] == runtime)
    row.update(median_ms=None, ratio=None, status="failed", note="gone")
    later["rows"][0]["median_ms"] = 4.0
    assert publish.main([str(put(house, bench(), "a.json")), str(put(house, new, "b.json"))], house) == 0
    text = shown(house)
    assert "**10.00** | 25.00 (2.50x) | 9.50 (~0.95x)" in text and f"{runtime}, float32: failed: gone" in text
    assert publish.main([str(put(house, later, "c.json"))], house) == 0
    text = shown(house)
    assert "**4.00** | 25.00 (2.50x) | 9.50 (~0.95x)" in text and "**10.00**" not in text and "gone" not in text


def test_other_threads_and_image_sizes_are_other_cases(house: Path) -> None:
    single, small = bench(threads=1, date="2026-01-03T00:00:00+00:00"), bench(date="2026-01-04T00:00:00+00:00")
    small["provenance"]["command"] += " --image-size 96"
    plain = bench() | {"models": {"m": {"image_size": 299}}}
    documents = plain, single | {"models": plain["models"]}, small | {"models": {"m": {"image_size": 96}}}
    for number, document in enumerate(documents):
        assert publish.main([str(put(house, document, f"{number}.json"))], house) == 0
    text = shown(house)
    assert text.count("| `m` | 1 | float32 | **10.00** |") == 2 and "threads 1," in text and "threads 2," in text
    assert text.count("| `m` 96x96 | 1 | float32 | **10.00** |") == 1


def suite(**origin: object) -> dict:
    pair = {"pair": "p", "count": 1, "separate_us": 120.0, "fused_us": 100.0, "onednn_us": 150.0, "fused": True}
    mixed = {"batch": 1, "dtype": "bfloat16", "mixed_us": 130.0}
    return {
        "provenance": ORIGIN | origin,
        "tier": "avx2",
        "peak_gflops": {"float32": 500.0},
        "rows": [row | {"peak_share": 0.8 if row["median_ms"] else None} for row in bench()["rows"]],
        "pairs": [
            pair | {"batch": 4, "dtype": "float32"},
            pair | {"batch": 4, "dtype": "float32", "fused_us": 150.0},
            pair | mixed,
            pair | mixed | {"fused": False},
        ],
    }


def test_a_suite_is_shown_with_its_share_of_the_peak(house: Path) -> None:
    assert publish.main([str(put(house, suite()))], house) == 0
    text = shown(house)
    assert "| `m` | 1 | float32 | **10.00** | 25.00 (2.50x) | 9.50 (~0.95x) | failed | 80 % |" in text
    assert "500 in float32, avx2" in text and "2026-01-02-cpu-suite.json" in text
    assert "2 asymmetric pairs, 4 images, float32: two convolutions take 0.80 to 1.20 times" in text
    assert "that of the form that plans take.\n" in text, "an older file has no mixed calls"
    assert "form that plans take, whose first call after one of oneDNN's takes 1.08 to 1.30 times.\n" in text
    assert text.count(UNMEASURED) == 6


@pytest.mark.parametrize("make", [bench, suite])
def test_tables_say_how_far_the_cores_were(house: Path, make: Callable[[], dict]) -> None:
    document = make()
    assert publish.main([str(put(house, document))], house) == 0 and "another saw after" not in shown(house)
    for row, ns in zip(document["rows"], (163.9, 25.2, None), strict=False):
        row["handover_ns"] = ns
    document["provenance"]["date"] = "2026-01-03T03:04:05+00:00"
    assert publish.main([str(put(house, document))], house) == 0
    assert "What one core writes, another saw after 25 to 164 ns, by the medians of the rows." in shown(house)


def test_a_study_of_false_alarms_is_shown(house: Path) -> None:
    document = {"provenance": ORIGIN, "runs": 100, "false_alarms": 2, "allowed_percent": 5.0, "rows": [{"ratio": 1.0}]}
    assert publish.main([str(put(house, document))], house) == 0
    assert "100 times: 2 false alarms, where 5 in 100 are allowed." in shown(house)
    busy = document | {"provenance": ORIGIN | {"load": 7.5}}
    assert publish.main([str(put(house, busy))], house) == 2


def test_a_comparison_is_filed_with_its_losses(house: Path) -> None:
    """On a busy machine too: it ends where it ends. What was filed reads as what was written."""
    from inception_fast.claims.training import read_comparisons

    losses = [2.5, 1.25, 1 / 3]
    rows = [
        {"model": label, "seed": seed, "step": step, "loss": loss, "accuracy": 0.5, "seconds": 1.0}
        for label in ("smoothing 0", "smoothing 0.1")
        for seed in (0, 1)
        for step, loss in enumerate(losses, 1)
    ]
    document = {"provenance": ORIGIN | {"load": 9.0}, "about": {"name": "label_smoothing"}, "runs": [], "rows": rows}
    assert publish.main([str(put(house, document))], house) == 0
    (filed,) = (house / "benchmarks" / "results").glob("*/2026-01-02-training-label-smoothing.json")
    assert len(filed.read_text()) < len(json.dumps(document)) / 1.5
    read = read_comparisons(filed.parent)["label_smoothing"]
    assert [row["loss"] for row in read["rows"]] == [2.5, 1.25, 0.333333] * 4
    assert [(row["model"], row["seed"], row["step"]) for row in read["rows"]] == [
        (row["model"], row["seed"], row["step"]) for row in rows
    ]
    runs = [{"model": label, "seed": 9} for label in ("smoothing 0", "smoothing 0.1")]
    newer = document | {"provenance": ORIGIN | {"date": "2026-01-02T04:00:00+00:00"}, "runs": runs}
    assert publish.main([str(put(house, newer))], house) == 0 and len(list(filed.parent.iterdir())) == 2
    assert read_comparisons(filed.parent)["label_smoothing"]["runs"] == newer["runs"]
    rows[0]["step"] = 7
    assert publish.main([str(put(house, document))], house) == 2


def test_claims_are_shown_without_the_published(house: Path) -> None:
    assert publish.main([str(put(house, claims()))], house) == 0
    text = shown(house)
    assert "| x \\| y | 28 | 28 | % | confirmed |" in text and "hidden" not in text
    assert "2026-01-02-claims.json" in text


def test_readme_has_the_claims_that_it_began_with(house: Path) -> None:
    document = claims()
    document["rows"].append(document["rows"][0] | {"id": publish.ARTICLE[0], "claim": "first"})
    assert publish.main([str(put(house, document))], house) == 0
    text = (house / "README.md").read_text()
    assert "| first | 28 | 28 | % | confirmed |" in text and "x \\| y" not in text
    rows = json.loads((ROOT / "benchmarks/results/amd-epyc-2-cores/2026-11-29-claims.json").read_text())["rows"]
    assert set(publish.ARTICLE) <= {row["id"] for row in rows}


def test_claims_judged_again_say_so(house: Path) -> None:
    note = {"date": "2026-02-03T04:05:06+00:00", "commit": "fedcba9876543210", "rows": ["a"]}
    assert publish.main([str(put(house, claims(judged=note)))], house) == 0
    assert "Judged again by later rules, 2026-02-03, commit fedcba9876: `a`." in shown(house)


def test_filed_verdicts_on_trainings_are_those_of_the_rules(capsys: pytest.CaptureFixture[str]) -> None:
    assert judge.main(["--check"]) == 0, "run python benchmarks/judge.py, then benchmarks/publish.py"
    assert "2026-" in capsys.readouterr().out


def test_a_verdict_by_other_rules_is_put_right(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = ROOT / "benchmarks" / "results" / "amd-epyc-2-cores"
    folder = tmp_path / "chip"
    folder.mkdir()
    for name in ("2026-11-25-training-residual.json", "2026-11-26-claims.json"):
        (folder / name).write_text((source / name).read_text())
    path = folder / "2026-11-26-claims.json"
    right = json.loads(path.read_text())
    wrong = copy.deepcopy(right)
    wrong["provenance"]["judged"]["rows"] = ["a"]
    next(row for row in wrong["rows"] if row["id"] == "residual")["measured"] = 99.0
    path.write_text(json.dumps(wrong))
    assert judge.main(["--check"], tmp_path) == 1 and "residual to change" in capsys.readouterr().out
    assert json.loads(path.read_text()) == wrong
    assert judge.main([], tmp_path) == 0 and judge.main(["--check"], tmp_path) == 0
    found = json.loads(path.read_text())
    assert found["rows"] == right["rows"] and found["provenance"]["judged"]["rows"] == ["a", "residual"]


def broken(key: str, value: object) -> dict:
    document = copy.deepcopy(bench())
    document[key] = value
    return document


@pytest.mark.parametrize(
    "document, said",
    [
        (bench(command="inception-fast bench m --quick"), "a run with --quick; allowed: full ones"),
        (bench(load=7.5), "load 7.5 on 2 cores; allowed: an idle machine"),
        (broken("rows", []), "no rows with their provenance"),
        (broken("provenance", {"machine": "x"}), "its provenance lacks cpu, cores"),
        ({"rows": [{"model": "m"}]}, "allowed: what inception-fast bench, claims or compare"),
    ],
)
def test_what_proves_nothing_is_not_filed(
    house: Path, capsys: pytest.CaptureFixture[str], document: dict, said: str
) -> None:
    assert publish.main([str(put(house, document))], house) == 2
    assert said in capsys.readouterr().err
    assert shown(house) == RESULTS and not (house / "benchmarks").exists()


@pytest.mark.parametrize("page", ["README.md", "docs/results.md"])
def test_markers_must_be_there(house: Path, page: str) -> None:
    (house / page).write_text("nothing")
    assert publish.main([], house) == 2


@pytest.mark.parametrize("content", ["", "[]", "{}", "\udcff"], ids=["empty", "list", "object", "bytes"])
def test_a_damaged_part_is_made_again(tmp_path: Path, content: str) -> None:
    """As a power cut leaves it: --resume measures that part again."""
    from inception_fast.measure.results import Parts

    parts = Parts(tmp_path, {"commit": "a"}, True)
    parts.save("one", 1)
    assert parts.load("one") == 1
    (tmp_path / "one.json").write_bytes(content.encode(errors="surrogateescape"))
    assert parts.load("one") is None
