"""What the built library of Hopper kernels holds, read without a GPU, and the command that prints it."""

from __future__ import annotations

import json
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from inception_fast.kernels.cuda import loader, offline

from checkout import ROOT
from inception_fast.cli import main

SASS = """
		Function : _ZN2if4convILi64ELb1EEEv5Group
        /*0000*/   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], !UPT ;
        /*0010*/   UTMALDG.4D.IM2COL [UR8], [UR4] ;
		Function : plain
        /*0000*/   STL [R1], R2 ;
        /*0010*/   LDL R2, [R1] ;
"""
USAGE = """
 Function _ZN2if4convILi64ELb1EEEv5Group:
  REG:168 STACK:0 SHARED:1024 LOCAL:0 CONSTANT[0]:948
 Function plain:
  REG:255 STACK:16 SHARED:0 LOCAL:0
"""
FENCE = """
        /*0000*/   MEMBAR.ALL.GPU ;
        /*0010*/   MEMBAR.ALL.CTA ;
"""


def test_a_built_library_is_read_and_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offline, "_tool", lambda name, option, file: USAGE if option == "-res-usage" else SASS)
    good, bad = offline.kernels(Path("x.so"))
    assert (good.kernel, good.config, good.registers, good.shared_bytes) == ("conv", "64, true", 168, 1024)
    assert good.instructions == {"HGMMA": 1, "UTMALDG": 1} and good.complaint == ""
    assert bad.complaint == "16 bytes of registers spill"
    assert replace(bad, spill_bytes=0, instructions={}).complaint == "no HGMMA instruction"
    assert "spill" in replace(good, instructions={"HGMMA": 1, "STL": 2}).complaint
    serial = replace(good, instructions={"HGMMA": 8, "WARPGROUP.DEPBAR": 8})
    assert serial.complaint == "8 waits for 8 products, which run one by one; allowed: fewer waits"
    assert replace(serial, kernel="cuda/pair").complaint == ""
    loops = offline.counted(" @P0 BRA.U.ANY `(.L_x_3) ;\n UTMALDG.3D [UR8], [UR4] ;\n @P1 BRA `(.L_x_4) ;")
    assert loops == {"BRA.U.ANY": 1, "UTMALDG": 1}
    assert (
        replace(good, instructions={**loops, "HGMMA": 1}).complaint == "1 loops over lanes, round copies; allowed: none"
    )
    assert offline.counted("  WARPGROUP.DEPBAR.LE gsb0, 0x1 ;\n  WARPGROUP.ARRIVE ;") == {"WARPGROUP.DEPBAR": 1}
    few, many = offline.counted(FENCE * 4), offline.counted(FENCE * 5)
    assert replace(good, instructions={**few, "HGMMA": 1}).complaint == ""
    assert replace(good, instructions={**many, "HGMMA": 1}).complaint == "5 MEMBAR.ALL.GPU instructions; allowed: 4"
    asked: list[tuple[str, ...]] = []
    monkeypatch.setattr(
        offline, "_tool", lambda *words: asked.append(words) or (USAGE if "-res-usage" in words else SASS)
    )
    assert offline.kernels(Path("x.so"), ["plain"]) == [bad] and "-fun" not in asked[-1], "half are no few"
    with monkeypatch.context() as patch:
        patch.setattr(offline, "FEW", 1)
        assert offline.kernels(Path("x.so"), ["plain"]) == [bad] and asked[-1][2:4] == ("-fun", "plain")
        assert offline.kernels(Path("x.so")) == [good, bad] and "-fun" not in asked[-1]
    assert offline.names(Path("x.so")) == ["conv", "plain"]
    asked.clear()
    assert offline.kernels(Path("x.so"), ["pool"]) == [] and len(asked) == 1, "nothing is disassembled for nothing"
    monkeypatch.setattr(offline, "_tool", lambda *words: "")
    with pytest.raises(RuntimeError, match=r"x\.so holds no kernels for sm_90a"):
        offline.kernels(Path("x.so"))


def test_a_walk_orders_memory_between_blocks_and_no_more_than_that() -> None:
    """What orders whole units is allowed; one more of either, a wait at the cluster's scope say, is not, nor is any of
    another kind, nor as many in a kernel whose blocks have nothing to tell each other.
    """
    most = {"HGMMA": 56, **offline.MOST_OF_A_WALK}
    name = offline.label("void inception_fast::hopper::walk_jobs<__half>(inception_fast::hopper::Walk)")[0]
    walk = offline.Compiled(f"cuda/{name}", "__half", 128, 0, 1024, most)
    assert walk.complaint == replace(walk, kernel=name).complaint == ""
    assert (
        replace(walk, kernel="cuda/conv").complaint
        == f"{most['MEMBAR.ALL.GPU']} MEMBAR.ALL.GPU instructions; allowed: 4"
    )
    for kind in offline.DEVICE_WIDE:
        more = {**most, kind: most[kind] + 1}
        assert replace(walk, instructions=more).complaint == f"{more[kind]} {kind} instructions; allowed: {most[kind]}"
    assert "spill" in replace(walk, spill_bytes=8).complaint
    assert replace(walk, instructions={"UTMALDG": 4}).complaint == "no HGMMA instruction"


@pytest.fixture(scope="module")
def found() -> list[offline.Compiled]:
    """What each kernel of the built library became: where nvcc built one."""
    if loader.missing():
        pytest.skip(loader.missing())
    return offline.kernels(loader.FILE)


def test_the_built_library_is_as_it_should_be(found: list[offline.Compiled]) -> None:
    """No spill, tensor cores, operands by TMA, no fence too many, the walk of either format among all."""
    assert [(one.kernel, one.config, one.complaint) for one in found if one.complaint] == []
    assert found and all(one.instructions.get("UTMALDG") for one in found)
    walks = {one.config: one for one in found if one.kernel == offline.WALK}
    assert sorted(walks) == ["__half", "__nv_bfloat16"]
    assert all(one.instructions["MEMBAR.ALL.GPU"] > offline.MOST_DEVICE_WIDE for one in walks.values())


def test_the_command_lists_them(
    found: list[offline.Compiled], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(offline, "kernels", lambda file, only: [one for one in found if one.kernel in only])
    assert main(["kernels", "cuda/*", "--json", "--check"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert len(rows) == len(found) and all(row["instructions"]["HGMMA"] > 0 for row in rows)
    assert {row["arch"] for row in rows} == {"sm_90a"}


def test_the_command_says_how_to_build(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(loader, "FILE", tmp_path / "_hopper.so")
    assert main(["kernels", "normalize", "--arch", "sm_90a"]) == 0
    told = capsys.readouterr()
    assert "the CUDA kernels were not built" in told.err and "normalize" in told.out
    assert main(["kernels", "cuda/*"]) == 2


def test_kernels_of_many_configurations_keep_the_most_shared_memory(tmp_path: Path) -> None:
    """launch.cu over a runtime that refuses what the last call did not allow, as CUDA's does."""
    program, root = tmp_path / "launches", ROOT
    source = ["-x", "c++", str(root / "kernels/cuda/launch.cu"), str(root / "tests/cuda/launches.cpp")]
    folders = [f"-I{root / folder}" for folder in ("tests/cuda/runtime", "kernels/cuda")]
    subprocess.run(["g++", "-std=c++17", "-Wall", "-Werror", *folders, *source, "-o", str(program)], check=True)
    ran = subprocess.run([str(program)], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout
