"""The native driver: plans against a scalar truth, under the sanitizers, and with the kernels spoilt on purpose."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import cache as cached
from pathlib import Path

import pytest
from inception_fast.kernels import cpu

from checkout import ROOT
from inception_fast.measure import cache
from inception_fast.measure.driver import build_driver
from native.mutants import MUTANTS, Mutant
from native.training_mutants import TRAINING_MUTANTS

KERNELS = ROOT / "kernels" / "cpu"
pytestmark = pytest.mark.timeout(900)


def drive(driver: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(driver), *arguments], capture_output=True, text=True, timeout=600)


def expect_right(driver: Path, *arguments: str) -> None:
    done = drive(driver, *arguments)
    assert done.returncode == 0, done.stdout + done.stderr[-6000:]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a build without optimisation, whose objects the mutants borrow."""
    folder = tmp_path_factory.mktemp("plain")
    build_driver(ROOT, folder, optimize="-O0")
    return folder


def driver_of(folder: Path) -> Path:
    return folder / "tests" / "native" / "native_driver"


def test_random_plans_are_exact_on_every_tier(plain: Path) -> None:
    assert tuple(drive(driver_of(plain), "tiers").stdout.split()) == tuple(cpu.tiers())
    expect_right(driver_of(plain), "fuzz", "seeds=12")


@pytest.mark.parametrize("tier", cpu.EMULATED)
def test_random_plans_are_exact_in_the_emulation(plain: Path, tier: str) -> None:
    convs = ("conv", "groups", "depthwise", "joined", "lines", "deep", "long", "scatter", "shared")
    for test in (*convs, "train_conv", "train_tiles"):
        expect_right(driver_of(plain), "fuzz", f"test={test}", f"tier={tier}", "seeds=8")


def test_random_plans_under_the_address_and_undefined_behaviour_sanitizers(tmp_path: Path) -> None:
    expect_right(build_driver(ROOT, tmp_path, optimize="-O0", sanitize="address,undefined"), "fuzz", "seeds=10")


def test_random_plans_under_the_thread_sanitizer(tmp_path: Path) -> None:
    driver = build_driver(ROOT, tmp_path, optimize="-O0", sanitize="thread")
    convs = ("shared", "depthwise", "joined", "lines", "pair", "winograd")
    training = ("weight_gradient", "gradient_tiles", "train_conv", "train_tiles", "train_pool")
    for test in ("mix", "callers", *convs, "import", "average", "stages", *training):
        expect_right(driver, "fuzz", f"test={test}", "seeds=3")


@pytest.mark.alone
def test_a_thread_leaves_the_core_of_its_caller(plain: Path) -> None:
    expect_right(driver_of(plain), "apart")
    core = str(min(os.sched_getaffinity(0)))
    alone = subprocess.run(
        [sys.executable, "-c", f"import os,sys;os.sched_setaffinity(0,{{{core}}});os.execv(sys.argv[1],sys.argv[1:])",
         str(driver_of(plain)), "apart"],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert alone.returncode == 0, alone.stdout
    assert alone.stdout.startswith("left its core 0 of 100 times, 1 cores before, 1 after")


@pytest.mark.parametrize("kind", ["conv", "pair"])
def test_single_layers_run(plain: Path, kind: str) -> None:
    sizes = ("h=5", "w=7", "c=6", "mid=9", "oc=4", "kh=3", "kw=3")
    done = drive(driver_of(plain), "layer", f"kind={kind}", "tier=generic", "repeats=2", *sizes)
    row = json.loads(done.stdout)
    weights = 6 * 4 * 9 if kind == "conv" else 6 * 9 * 3 + 9 * 4 * 3
    assert (row["macs"], row["weight_bytes"]) == (35 * weights, 4 * weights)
    assert (row["input_bytes"], row["output_bytes"]) == (4 * 35 * 6, 4 * 35 * 4)
    assert row["sum"] > 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "''; allowed: tests, tiers, fuzz, layer"),
        (("fuzz", "seeds=none"), "'none'; allowed: a whole number from 1"),
        (("fuzz", "seed"), "allowed: KEY=VALUE with seed, seeds, test, tier"),
        (("fuzz", "test=nothing"), "no plan of test 'nothing'"),
        (("layer", "tier=mmx"), "this machine can run: generic"),
        (("layer", "kh=2"), "allowed: odd"),
    ],
)
def test_mistakes_in_the_command_are_named(plain: Path, arguments: tuple[str, ...], said: str) -> None:
    done = drive(driver_of(plain), *arguments)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert said in done.stderr


@pytest.mark.skipif(shutil.which("valgrind") is None, reason="valgrind is not installed")
def test_cachegrind_counts_what_a_layer_must_at_least_bring_in(plain: Path) -> None:
    """Weights that no cache holds come in again with every call; those that fit do not."""
    driver = driver_of(plain)
    layer = cache.Layer("conv", 4, 4, 128, 64, 3, 3)
    weights = 4 * 128 * 64 * 9 // cache.LINE
    small = cache.measure(driver, layer, cache.Caches(last=128 << 10))
    large = cache.measure(driver, layer, cache.Caches(last=4 << 20))
    assert weights <= small.last <= small.l1 < small.accesses
    assert large.last < 0.02 * weights <= large.l1


class Workshop:
    """Builds the driver with one source file spoilt: one translation unit is compiled, the rest is borrowed."""

    def __init__(self, plain: Path) -> None:
        commands = json.loads((plain / "compile_commands.json").read_text())
        self.plain = plain
        self.commands = {Path(entry["file"]).name: shlex.split(entry["command"]) for entry in commands}
        self.objects = {name: str(plain / command[command.index("-o") + 1]) for name, command in self.commands.items()}

    def build(self, mutant: Mutant, folder: Path) -> Path:
        for file in (*KERNELS.glob("*.h"), *KERNELS.glob("*.cpp")):
            (folder / file.name).write_text(file.read_text())
        (folder / mutant.file).write_text(mutant.applied((KERNELS / mutant.file).read_text()))
        spoilt = str(folder / "spoilt.o")
        command = list(self.commands[mutant.unit])
        command[command.index("-o") + 1] = spoilt
        command[command.index("-c") + 1] = str(folder / mutant.unit)
        objects = [spoilt if name == mutant.unit else path for name, path in self.objects.items()]
        driver = folder / "driver"
        for line in (command, [command[0], "-pthread", "-o", str(driver), *objects, "-ldl"]):
            done = subprocess.run(line, capture_output=True, text=True, cwd=self.plain)
            assert done.returncode == 0, done.stderr[-3000:]
        return driver


ALL_MUTANTS = (*MUTANTS, *TRAINING_MUTANTS)


def test_mutants_are_many_and_fit_the_sources() -> None:
    assert len(ALL_MUTANTS) >= 20 and len({mutant.name for mutant in ALL_MUTANTS}) == len(ALL_MUTANTS)
    for mutant in ALL_MUTANTS:
        mutant.applied((KERNELS / mutant.file).read_text())


@pytest.fixture(scope="module")
def sound(plain: Path) -> Callable[..., None]:
    """Runs the sound kernels, once for all mutants with the same test and seeds."""
    return cached(lambda *arguments: expect_right(driver_of(plain), *arguments))


@pytest.mark.parametrize("mutant", ALL_MUTANTS, ids=lambda mutant: mutant.name)
def test_mutant_is_caught(plain: Path, sound: Callable[..., None], tmp_path: Path, mutant: Mutant) -> None:
    """The test named in the table fails on the spoilt kernels, and passes on the sound ones with the same seeds."""
    arguments = ("fuzz", f"test={mutant.test}", f"tier={mutant.tier}", f"seeds={mutant.seeds}")
    if mutant.tier not in (*cpu.tiers(), *cpu.EMULATED):
        pytest.skip(f"this machine cannot run {mutant.tier}")
    sound(*arguments)
    done = drive(Workshop(plain).build(mutant, tmp_path), *arguments)
    caught = done.returncode == 1 and done.stderr.startswith(f"wrong: {mutant.test}, ")
    touched = done.returncode == -signal.SIGSEGV  # a page between which the memory lies
    assert caught or touched, f"not caught: {done.returncode}\n{done.stdout}{done.stderr}"
