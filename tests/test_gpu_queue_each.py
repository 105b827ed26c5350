"""Tests on the device one by one: what traps, dies or hangs costs its form, and the rest goes on."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from queue_modules import loaded

# Two functions over the same forms: "dies" ends the process, "hangs" never returns, "trap" fails and takes the GPU
# with it, "wrong" fails alone.
SUITE = """
import os, sys, time, types
import pytest

@pytest.mark.parametrize("size", (1, 2))
@pytest.mark.parametrize("form", ("good", "dies", "hangs", "wrong", "trap"))
def test_first(form, size):
    if form == "dies":
        os._exit(11)
    if form == "hangs":
        time.sleep(60)
    if form == "trap":
        def lost():
            raise RuntimeError("CUDA error: unspecified launch failure")
        sys.modules["torch"] = types.SimpleNamespace(
            cuda=types.SimpleNamespace(is_initialized=lambda: True, synchronize=lost)
        )
        lost()
    assert form != "wrong", "3 of 9 differ"

@pytest.mark.parametrize("form", ("good", "dies", "hangs", "trap"))
def test_second(form):
    pass

def test_last():
    pytest.skip("not here")
"""


@pytest.fixture(scope="module")
def queue() -> Iterator[dict[str, Any]]:
    with loaded("each", "journal", "trusted", "work", "measure", "networks") as modules:
        yield modules


def suite(folder: Path, text: str, *options: str) -> list[str]:
    (folder / "test_it.py").write_text(text)
    plain = ["-p", "no:cacheprovider", "-c", "/dev/null", "--rootdir", str(folder)]
    return [sys.executable, "-m", "pytest", "-q", *plain, *options, str(folder / "test_it.py")]


def test_what_ends_a_process_costs_its_form_alone(queue: dict[str, Any], tmp_path: Path) -> None:
    *_, rows = queue["each"].each(suite(tmp_path, SUITE, "--forms"), {}, patience=1.5)
    found = {row["test"].split("::")[-1]: row["status"] for row in rows}
    assert found == {
        "test_first[good-1]": "ok", "test_first[good-2]": "ok", "test_second[good]": "ok", "test_last": "skipped",
        "test_first[wrong-1]": "failed", "test_first[wrong-2]": "failed",
        "test_first[dies-1]": "ended", "test_first[dies-2]": "left out", "test_second[dies]": "left out",
        "test_first[hangs-1]": "hung", "test_first[hangs-2]": "left out", "test_second[hangs]": "left out",
        "test_first[trap-1]": "ended", "test_first[trap-2]": "left out", "test_second[trap]": "left out",
    }  # fmt: skip
    notes = {row["test"].split("::")[-1]: row.get("note", "") for row in rows}
    assert "3 of 9 differ" in notes["test_first[wrong-1]"] and "exit code 11" in notes["test_first[dies-1]"]
    assert notes["test_last"] == "Skipped: not here", "the reason alone, without the path of its file"
    assert "the GPU context is lost: CUDA error" in notes["test_first[trap-1]"]
    assert queue["trusted"].right_forms(rows) == {"good"}
    skipped = [{"test": f"test_first[{form}-9]", "status": "skipped"} for form in ("good", "none")]
    assert queue["trusted"].right_forms([*rows, *skipped]) == {"good"}, "no room for a shape is nothing wrong"
    judged = queue["work"].judged(rows)
    assert judged["status"] == "failed" and judged["rows"] == rows and "1 hung" in judged["note"]
    assert queue["work"].judged([row for row in rows if row["status"] in ("ok", "skipped")])["status"] == "ok"
    assert queue["work"].judged([])["note"] == "no test ran"


def test_without_forms_a_function_is_left_out_alone(queue: dict[str, Any], tmp_path: Path) -> None:
    *_, rows = queue["each"].each(suite(tmp_path, SUITE, "-k", "dies or last"), {}, patience=1.5)
    found = {row["test"].split("::")[-1]: row["status"] for row in rows}
    assert found["test_first[dies-2]"] == "left out" and found["test_second[dies]"] == "ok"


# A process that is killed while it writes: the verdict of the first test, the beginning of the second.
TORN = """
import os, journal, pytest

@pytest.mark.parametrize("form", ("one", "between", "two"))
def test_torn(form, request):
    status = {"one": "failed", "two": "begun", "between": ""}[form]
    file = request.config.getoption("journal")
    if status and not file.with_name(form).exists():
        file.with_name(form).touch()
        text = file.read_text()
        whole = text if form == "one" else text[: text.rstrip().rfind("\\n") + 1]
        file.write_text(whole + journal.line(request.node.nodeid, status)[:20])
        os._exit(9)

def test_last():
    pass
"""


def test_a_torn_line_costs_no_verdict(queue: dict[str, Any], tmp_path: Path) -> None:
    *_, rows = queue["each"].each(suite(tmp_path, TORN), {}, patience=20.0)
    found = {row["test"].split("::")[-1]: row["status"] for row in rows}
    assert found.pop("test_torn[one]") == "ended"
    assert found == dict.fromkeys(("test_torn[between]", "test_torn[two]", "test_last"), "ok")
    assert "exit code 9" in rows[0]["note"] and queue["work"].judged(rows)["status"] == "failed"


def test_a_suite_that_cannot_be_read_has_no_rows(queue: dict[str, Any], tmp_path: Path) -> None:
    *_, rows = queue["each"].each(suite(tmp_path, "import nothing_of_this_name"), {}, patience=1.5)
    assert rows == [] and queue["work"].judged(rows)["status"] == "failed"


def test_kernels_of_a_wrong_form_are_not_run(queue: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """By nothing that asks which configurations there are, the model and the self-check among them."""
    from inception_fast.kernels.cuda import convolve, pair, pooled, tune
    from inception_fast.kernels.spec import ConvSpec, PairSpec, PoolSpec

    from hopper_library import stub
    from inception_fast.engine import gpu_walk
    from inception_fast.engine.gpu_hopper import Hopper

    walking = Hopper(stub(), torch.device("cpu"), always=True)
    spec = ConvSpec(1, 17, 17, 64, 64, 1, 7, padding=(0, 0, 3, 3), dtype="bfloat16")
    both = PairSpec(spec, ConvSpec(1, 17, 17, 64, 64, 7, 1, padding=(3, 3, 0, 0), dtype="bfloat16"))
    every, pairs = convolve.able(stub(), spec), pair.able(stub(), both)
    behind = spec, PoolSpec(1, 17, 17, 64, 3, 3, (2, 2), dtype="bfloat16")
    maxima = pooled.able(stub(), *behind)
    one, other = every[0].form, pairs[-1].form
    with queue["trusted"].only({one, other}):
        assert {config.form for config in convolve.able(stub(), spec)} == {one}
        assert {cut.config.form for cut in tune.proposals(stub(), spec)} == {one}
        assert convolve.predicted(stub(), spec).config.form == one
        assert {config.form for config in pair.able(stub(), both)} == {other}
        assert pooled.able(stub(), *behind) == () and len(maxima) == 1
        assert not gpu_walk.possible(walking, [])
    with queue["trusted"].only({maxima[0].form}):
        assert pooled.able(stub(), *behind) == maxima
    with queue["trusted"].only({one, "walk"}):
        assert gpu_walk.possible(walking, [])
    with queue["trusted"].only(None):
        assert convolve.able(stub(), spec) == every and pair.able(stub(), both) == pairs
        assert pooled.able(stub(), *behind) == maxima
        assert gpu_walk.possible(walking, [])
    work = queue["work"]
    monkeypatch.setattr(work, "no_hopper", lambda: "")
    monkeypatch.setattr(work, "right", set)
    refused = work.hopper("1", "bfloat16", report=lambda rows: None)
    assert refused == {"status": "failed", "note": "no form of the kernels came out right"}


def test_a_wrong_result_is_told_in_places(queue: dict[str, Any]) -> None:
    wanted = torch.ones(2, 8, 4, 4, dtype=torch.float64)
    y = wanted.float()
    y[1, 3:5, 2, 1], y[1, 4, 2, 1] = 1.5, float("nan")
    about = {"layer": "l"}
    rows, calls = queue["measure"].checked({"cuda": lambda: lambda: y}, about, wanted, lambda runtime: 1e-2)
    assert calls == {} and rows["cuda"]["status"] == "wrong" and rows["cuda"]["rel_error"] is None
    assert rows["cuda"]["note"] == (
        "2 of 256 elements of (2, 8, 4, 4) beyond 0.01, in 1..1 of 2, 3..4 of 8, 2..2 of 4, 1..1 of 4; "
        "first (1, 3, 2, 1) is 1.5 for 1, worst (1, 4, 2, 1) is nan for 1"
    )


def test_a_kernel_that_hangs_ends_its_process_in_time(queue: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    codes: list[int] = []
    monkeypatch.setattr(queue["networks"].os, "_exit", codes.append)
    with queue["networks"].ended_after(30.0):
        pass
    with queue["networks"].ended_after(0.01):
        import time

        time.sleep(0.3)
    assert codes == [queue["journal"].ENDED]
