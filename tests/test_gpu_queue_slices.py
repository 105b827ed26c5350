"""What the measuring queue does first, in which slices, and how it goes on from results that are filed."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from checkout import ROOT
from inception_fast.cli import build_parser
from queue_modules import FOLDER, loaded

SHORT = 400.0
FIRST = "inception_v3"


@pytest.fixture(scope="module")
def queue() -> Iterator[dict[str, Any]]:
    with loaded("store", "catalogue", "run", "work") as modules:
        yield modules


def test_two_short_slices_answer_every_kind_of_question(queue: dict[str, Any]) -> None:
    """By the estimates: are the kernels right, how are they cut, how fast are the networks beside their peers."""
    catalogue = queue["catalogue"]
    slices = queue["store"].plan_slices([job for job in catalogue.jobs() if not job.asked], SHORT)
    first, second, third = ([job.name for job in part] for part in slices[:3])
    assert {f"exact/{name}" for name in catalogue.TESTS} <= set(first)
    assert {f"sanitizer/{tool}/few" for tool in catalogue.TOOLS} <= set(first)
    assert max(first.index(f"exact/{name}") for name in catalogue.TESTS) < min(
        i for i, name in enumerate(first) if name.startswith("tiles/")
    )
    large = [f"{model}/{catalogue.LARGE}/bfloat16" for model in catalogue.MODELS]
    cuts = [f"tiles/{name}/cuda" for name in (f"{FIRST}/32/bfloat16", *large)]
    networks = [f"network/{FIRST}/{n}/bfloat16" for n in catalogue.BATCHES]
    assert set(cuts) <= set(first) and {*networks, *(f"network/{name}/tuned" for name in large)} <= set(second)
    assert {f"walk/{model}/1/bfloat16" for model in catalogue.MODELS} <= {*second, *third}
    assert {f"tiles/{FIRST}/128/bfloat16", f"profile/{FIRST}/128/bfloat16/tuned"} <= set(third)
    for part in slices:
        assert queue["store"].planned_seconds(part) <= SHORT


def documented(queue: dict[str, Any]) -> str:
    """The command of the docstring that goes on from filed results."""
    text = queue["run"].__doc__
    return str(text[text.index("    R=") : text.index("and each slice after")])


def test_the_documented_command_goes_on_from_what_is_filed(queue: dict[str, Any]) -> None:
    """As it is written, but for --dry-run: what is new again, the networks, then what nobody has run; each fits."""
    command = documented(queue).rstrip().replace("python3", shlex.quote(sys.executable)) + " --dry-run"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    slices = done.stdout.split("slice ")[1:]
    names = [[line.split()[0] for line in part.splitlines()[1:]] for part in slices]
    cuts = [f"tiles/{name}/bfloat16/cuda" for name in (f"{FIRST}/32", f"{FIRST}/128", "inception_v4/128")]
    assert names[0][:6] == ["build", "machine", "exact/hopper_device", *cuts]
    networks = {f"network/{FIRST}/{n}/bfloat16" for n in (32, 128, 1, 256, 8)} | {"network/inception_v4/128/bfloat16"}
    again = {f"walk/{FIRST}/1/bfloat16", f"profile/{FIRST}/128/bfloat16/tuned"}
    assert networks | again <= {name for part in names[:3] for name in part}
    left = {name for part in names for name in part}
    assert not left & {
        "exact/norm",
        "exact/pool",
        "exact/hopper_device/few",
        "hopper/128/bfloat16",
        "counters/v3_192/fused",
    }
    assert not left & {f"sanitizer/{tool}/few" for tool in queue["catalogue"].TOOLS}
    assert all(float(part.split()[2]) <= SHORT for part in slices)


@pytest.fixture
def filed(tmp_path: Path) -> Path:
    file = tmp_path / "former.json"
    machine = {"status": "ok", "machine": {"name": "a GPU", "date": "2026-01-02", "sources": "ab", "cores": 4}}
    network = {"status": "ok", "rows": [{"runtime": "ours"}], "tries": 1}
    results = {"machine": machine, "network/m/1/x": network, "exact/norm": {"status": "failed", "tries": 2}}
    file.write_text(json.dumps({"results": results}))
    return file


def test_results_that_are_asked_for_again_do_not_count(queue: dict[str, Any], filed: Path, tmp_path: Path) -> None:
    """Of a former file; those of this slice do, and say no longer whose they are."""
    store, job = queue["store"], queue["store"].Job
    jobs = [job(name, 1, 2) for name in ("exact/norm", "network/m/1/x")]
    kept = store.Store(tmp_path / "kept", [filed])
    assert [kept.wants(one) for one in jobs] == [False, False]
    assert kept.summary()["status"]["network/m/1/x"]["of"] == {"name": "a GPU", "date": "2026-01-02", "sources": "ab"}
    out = tmp_path / "again"
    again = store.Store(out, [filed], again=["exact/*", "network/*"])
    assert [again.wants(one) for one in jobs] == [True, True]
    again.put(jobs[1], {"status": "ok"})
    assert again.results["network/m/1/x"] == {"status": "ok", "tries": 1}
    assert not store.Store(out, [filed], again=["network/*"]).wants(jobs[1])
    with pytest.raises(
        ValueError, match=r"--again layers/\*: no earlier result of that name; allowed: machine, network"
    ):
        store.Store(tmp_path / "none", [filed], again=["layers/*"])
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("other", [{"name": "another GPU"}, {"driver_version": "581"}, {"sources": "cd"}, {}])
def test_what_another_machine_measured_before_is_its_own(
    queue: dict[str, Any], tmp_path: Path, other: dict[str, str]
) -> None:
    """In a folder that slices on several machines went on in; a slice without a GPU between them hides nothing."""
    store, job = queue["store"], queue["store"].Job
    first = {"name": "a GPU", "driver_version": "580", "sources": "ab", "date": "2026-01-02"}
    machines = [{"status": "ok", "machine": first}, {"status": "failed"}, {"status": "ok", "machine": first | other}]
    for number, machine in enumerate(machines):
        slice_ = store.Store(tmp_path)
        for name, result in (("build", {"status": "ok"}), ("machine", machine), (f"layers/{number}", {"status": "ok"})):
            slice_.put(job(name, 1, 2), result)
    apart = {"name": "a GPU", "sources": "ab", "date": "2026-01-02"}
    of = {name: result.get("of") for name, result in store.Store(tmp_path).results.items()}
    old = apart if other else None
    assert of == {"build": None, "machine": None, "layers/0": old, "layers/1": old, "layers/2": None}
    assert slice_.summary()["machine"] == first | other


def test_a_wrong_pattern_is_named_before_anything_runs(filed: Path) -> None:
    command = [sys.executable, str(FOLDER / "run.py"), "--dry-run", "--earlier", str(filed), "--again", "exact/conv"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "--again exact/conv: no earlier result" in done.stderr


@pytest.mark.parametrize(
    ("options", "said"), [(["--only", "netwrok/*"], "--only netwrok/*: no job"), (["--merge"], "File exists: '")]
)
def test_a_wrong_call_is_named_before_anything_runs(filed: Path, options: list[str], said: str) -> None:
    """A pattern of jobs without one, and a file in place of the folder for results."""
    command = [sys.executable, str(FOLDER / "run.py"), "--out", str(filed), *options]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and said in done.stderr


def test_a_network_waits_for_its_tiles(queue: dict[str, Any], tmp_path: Path) -> None:
    """Where the tiles do not fit the slice it does not fail for want of them; and the machine is asked anew."""
    job, ran = queue["store"].Job, list[str]()
    sizes = {"build": 10, "machine": 10, "tiles/m/1/x": 100, "network/m/1/x/tuned": 10, "network/m/1/x": 10}
    jobs = [job(name, seconds, 200) for name, seconds in sizes.items()]

    def run(one: Any, store: Any, limit: float) -> dict[str, Any]:
        ran.append(one.name)
        return {"status": "ok"}

    store = queue["store"].Store(tmp_path)
    left = queue["run"].run_slice(jobs, store, 99, run, lambda: 0.0)
    assert ran == ["build", "machine", "network/m/1/x"]
    assert [one.name for one in left] == ["tiles/m/1/x", "network/m/1/x/tuned"]
    ran.clear()
    assert queue["run"].run_slice(jobs, store, 200, run, lambda: 0.0) == []
    assert ran == ["build", "machine", "tiles/m/1/x", "network/m/1/x/tuned"]
    cuts = queue["store"].Store(tmp_path / "cuts")
    assert queue["run"].waits(jobs[3], cuts)
    some = {"status": "failed", "rows": [{"row": []}]}
    for tries, waits in enumerate((True, False)):
        cuts.put(jobs[2], some)
        assert queue["run"].waits(jobs[3], cuts) is waits, tries
    del cuts.results["tiles/m/1/x"]
    assert queue["run"].waits(jobs[3], cuts)
    cuts.put(job("tiles/m/1/x/cuda", 1, 2), {"status": "ok"})
    assert not queue["run"].waits(jobs[3], cuts), "cuts of the CUDA kernels alone are measured tiles as well"


def test_a_profile_is_a_row_a_layer(queue: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """By the command line, whose file it reads; a command that fails says why."""
    work, commands = queue["work"], list[list[str]]()
    layers = [{"layer": "stem", "ms": 0.5}, {"layer": "head", "ms": 0.25}]
    document = {
        "call_ms": 1.0,
        "steps_ms": 0.75,
        "peak_share": 0.5,
        "peak": {},
        "kinds": {},
        "rows": layers,
        "gpu": "g",
    }

    def ran(command: list[str]) -> dict[str, Any]:
        commands.append(command)
        (Path(command[command.index("--out") + 1]) / "profile.json").write_text(json.dumps(document))
        return {"status": "ok", "note": "written"}

    monkeypatch.setattr(work, "ran", ran)
    found = work.profile("inception_v3", "32", "bfloat16")
    assert found["status"] == "ok" and [row.get("layer") for row in found["rows"]] == [None, "stem", "head"]
    assert found["rows"][0]["steps_ms"] == 0.75 and all(row["batch"] == 32 for row in found["rows"])
    (command,) = commands
    assert command[1:4] == ["-P", "-m", "inception_fast"]
    asked = build_parser().parse_args(command[4:])
    assert (asked.command, asked.model, asked.device, asked.batch, asked.dtype) == (
        "profile", "inception_v3", "cuda", 32, "bfloat16",
    )  # fmt: skip
    monkeypatch.setattr(work, "keep", lambda home: str(home))
    homes = list[str]()
    monkeypatch.setattr(work, "ran", lambda command, HOME="": homes.append(HOME) or ran(command))
    assert work.profile("inception_v3", "32", "bfloat16", "tuned")["status"] == "ok"
    assert Path(homes[0]).name == "home", "the caches of what was measured, not the user's"
    monkeypatch.setattr(work, "ran", lambda command: {"status": "failed", "note": "no GPU", "log": "no GPU"})
    assert work.profile("inception_v3", "32", "bfloat16") == {"status": "failed", "note": "no GPU", "log": "no GPU"}
