"""Every Triton kernel compiled for GPUs that are not here: no spill, tensor cores where they belong, nowhere else."""

from __future__ import annotations

import collections
import json
import re
from dataclasses import replace

import pytest
import torch
from inception_fast.kernels.spec import ConvSpec, PoolSpec
from inception_fast.kernels.triton import catalogue, convolve, norms, offline, pools
from inception_fast.kernels.triton.catalogue import Entry
from inception_fast.kernels.triton.configs import Config
from inception_fast.kernels.triton.launch import Launch

from inception_fast import dispatch
from inception_fast.cli import main

ENTRIES = list(catalogue.entries())
N = catalogue.N


def name(entry: Entry) -> str:
    return f"{entry.kernel}: {entry.config}"


def compiled(entry: Entry, arch: str) -> offline.Compiled:
    return offline.compile_launch(entry.launch, arch)


def stores(one: Launch, arch: str) -> set[str]:
    return set(re.findall(r"st\.global[.\w]*", offline.built(one, arch).asm["ptx"]))


@pytest.mark.parametrize("entry", [e for e in ENTRIES if e.kernel.startswith(("conv_group", "split"))], ids=name)
def test_scattered_results_are_stored_16_bytes_at_a_time(entry: Entry) -> None:
    """Through a table the compiler knows no alignment of, they were stored 2 bytes at a time, and so were weights read:
    on an H200 siblings took 230 to 363 us at batch 128 that took 80 to 93 with one destination.
    """
    arch = "sm_90a" if "split" in entry.config else entry.arches[0]
    assert stores(entry.launch, arch) == {"st.global.v4.b32"}
    if entry.launch.arguments["SPLIT"] == 1:
        ragged = replace(entry.launch, arguments={**entry.launch.arguments, "ALIGNED": 1})
        assert "st.global.v4.b32" not in stores(ragged, arch), "a tile of unaligned columns would fault"


@pytest.mark.parametrize("entry", [e for e in ENTRIES if e.kernel == "stem" and e.tensor_cores], ids=name)
def test_a_stems_lanes_are_neighbours_in_an_images_row(entry: Entry) -> None:
    """With lanes along taps a tile of 128 pixels had 146 and 167 registers and 4 of 32 lanes in one line."""
    made = offline.built(entry.launch, "sm_90a").asm["ttgir"]
    shape, lanes = ("32x128", "1, 32") if entry.launch.arguments["PIXELS"] else ("128x32", "32, 1")
    (layout,) = set(re.findall(rf"tt\.load .*<{shape}x!tt\.ptr<\w+>, (#\w+)>", made))
    assert f"{layout} = #ttg.blocked<{{sizePerThread = [1, 1], threadsPerWarp = [{lanes}]" in made
    assert compiled(entry, "sm_90a").registers <= (96 if entry.launch.arguments["KH"] == 3 else 168)
    assert "scf.for" not in made, "taps are constants"


POOLED = {e.config: e.launch for e in ENTRIES if e.kernel in ("pool", "global_pool")}


@pytest.mark.parametrize("config", POOLED)
def test_pools_move_16_bytes_at_a_time(config: str) -> None:
    """Of a tap that two by two outputs share, once: nine loads an output become four, or 6.25 at stride 2."""
    made = offline.built(POOLED[config], "sm_90a").asm["ptx"]
    loads = collections.Counter(re.findall(r"ld\.global[.\w]*", made))
    shift = 2 if "shift" in config else 0  # 8 channels in float32
    taps = {"max 3x3 stride 2": 25, "average of one image": 9, "average of 81 taps": 1, "whole map": 8}
    assert loads == {"ld.global.v4.b32": taps.get(config.removeprefix("bfloat16 "), 16) + shift}
    whole = config.endswith("whole map")
    assert whole or set(re.findall(r"st\.global[.\w]*", made)) == {"st.global.v4.b32"}
    assert made.count("st.global") == (4 if taps.get(config.removeprefix("bfloat16 "), 16) >= 16 else 1)


@pytest.mark.parametrize(("c", "width"), ((24, "v4"), (40, "v4"), (20, "v2")))
def test_pools_move_what_channels_allow(c: int, width: str) -> None:
    """Of what is no constant the compiler knows whether 16 divides it, not 8 or 4: these were 2 bytes at a time."""
    spec, x = PoolSpec(N, 9, 9, c, 3, 3, (1, 1), (1,) * 4, "avg"), catalogue.blank(N, 9, 9, c, torch.bfloat16)
    (launched,) = pools.pooled(spec, x, x)
    moved = re.findall(r"(?:ld|st)\.global[.\w]*", offline.built(launched, "sm_90a").asm["ptx"])
    assert set(moved) == {f"ld.global.{width}.b32", f"st.global.{width}.b32"}


def test_maxima_of_16_bits_stay_there() -> None:
    """In float32 a maximum of 3x3 took 31 instructions an output, most of them moves of halves."""
    launched = POOLED["bfloat16 max 3x3 stride 2"]
    made = offline.built(launched, "sm_90a").asm["ptx"]
    # Of 8 channels: two columns of five rows of three taps, and four windows of three rows.
    assert made.count("max.NaN.bf16x2") == 4 * (2 * 5 * 2 + 4 * 2)
    one_by_one = re.compile(r"max\.NaN\.(f32|bf16)\s")  # in float32 up to Triton 3.7, as they are from 3.8 on
    assert not one_by_one.search(made) and not re.search(r"cvt[.\w]*f32", made)
    plain = replace(launched, arguments={**launched.arguments, "PACKED": False})
    assert one_by_one.search(offline.built(plain, "sm_90a").asm["ptx"])


@pytest.mark.parametrize("arch", ("sm_80", "sm_100a"))
def test_pools_of_other_machines(arch: str) -> None:
    """Pairs of 16 bits have maxima from sm_80 on."""
    for launched in POOLED.values():
        assert offline.compile_launch(launched, arch).spill_bytes == 0
    half = PoolSpec(32, 9, 9, 64, 3, 3, (2, 2))
    (launched,) = pools.pooled(
        half, catalogue.blank(32, 9, 9, 64, torch.float16), catalogue.blank(32, 4, 4, 64, torch.float16)
    )
    assert "max.NaN.f16x2" in offline.built(launched, arch).asm["ptx"]


def test_taps_in_flight_leave_room_for_warps() -> None:
    """Five blocks of four warps a multiprocessor hide the latency of their loads."""
    found = {config: offline.compile_launch(launched, "sm_90a") for config, launched in POOLED.items()}
    assert all(one.registers <= 102 and one.spill_bytes == 0 for one in found.values())
    assert found["bfloat16 max 3x3 stride 2"].registers <= 64


# Kernels without products differ little between the two architectures; one of them is enough.
@pytest.mark.parametrize("entry", [e for e in ENTRIES if "sm_90a" in e.arches], ids=name)
def test_hopper(entry: Entry) -> None:
    found = compiled(entry, "sm_90a")
    assert offline.complaint(found, entry.tensor_cores) == ""
    assert found.registers > 0 and found.shared_bytes <= 227 * 1024
    if entry.kernel.endswith("_tma"):
        assert found.instructions["UTMALDG"] >= 2 and "LDGSTS" not in found.instructions


@pytest.mark.parametrize("entry", [e for e in ENTRIES if e.config.startswith("bfloat16 cached")], ids=name)
def test_cached_copies_go_through_l1(entry: Entry) -> None:
    """Triton copies 16 bytes past L1, whatever a load asks for; x by 8 does not, weights still do."""
    copies = collections.Counter(re.findall(r"cp\.async\.(c[ag])\.", offline.built(entry.launch, "sm_90a").asm["ptx"]))
    tile = {name: entry.launch.arguments[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K")}
    threads = 32 * entry.launch.options["num_warps"]
    x, w = (tile["BLOCK_K"] * tile[side] * 2 // threads for side in ("BLOCK_M", "BLOCK_N"))  # bytes a thread
    assert copies["ca"] % (x // 8) == copies["cg"] % max(w // 16, 1) == 0 and copies["ca"] > copies["cg"] > 0
    plain = replace(entry.launch, arguments={**entry.launch.arguments, "CACHED": False})
    assert "cp.async.ca" not in offline.built(plain, "sm_90a").asm["ptx"]


@pytest.mark.parametrize("entry", [e for e in ENTRIES if e.kernel in ("conv", "conv_tma", "split_tma")], ids=name)
def test_a_step_divides_nothing(entry: Entry) -> None:
    """Two divisions by the steps of a tap were 27 of the 123 instructions of a step, one behind the other."""
    before, loop, *_ = offline.built(entry.launch, "sm_90a").asm["ttgir"].split("scf.for", 2)
    body = loop[: loop.index("scf.yield")]
    assert re.search(r"arith\.(div|rem)", before) and not re.search(r"arith\.(div|rem)", body)


def first_operands(entry: Entry) -> set[str]:
    """Where the products of a kernel for Hopper find their first operand."""
    made = offline.built(entry.launch, "sm_90a").asm["ttgir"]
    return set(re.findall(r"warp_group_dot %[^:]* : (tensor|!ttg\.memdesc)<", made))


@pytest.mark.parametrize("entry", [e for e in ENTRIES if e.kernel.endswith("_tma")], ids=name)
def test_boxes_stay_in_shared_memory(entry: Entry) -> None:
    """Behind a reshape, which a box of several rows needs, x came to registers first, a product waited for its copy,
    and one stage of a ring of three was lost. Pixels of a 1x1 are one row, and a turned x is the second operand.
    """
    reshaped = entry.launch.arguments["BOX_H"] > 1 or entry.launch.arguments["BOX_N"] > 1
    kept = entry.launch.arguments["TURNED"] or not reshaped
    assert first_operands(entry) == ({"!ttg.memdesc"} if kept else {"tensor"})


@pytest.mark.parametrize("entry", [e for e in ENTRIES if "sm_80" in e.arches and e.tensor_cores], ids=name)
def test_ampere(entry: Entry) -> None:
    found = compiled(entry, "sm_80")
    assert offline.complaint(found, True) == ""
    assert found.instructions["HMMA"] >= 2 and found.shared_bytes <= 163 * 1024
    if entry.kernel in ("conv", "conv_group", "split"):
        assert found.instructions["LDGSTS"] >= 4, "tiles are not loaded 16 bytes at a time ahead of their use"


@pytest.mark.parametrize("entry", [e for e in ENTRIES if e.kernel == "stem"], ids=name)
def test_blackwell_keeps_float32_exact(entry: Entry) -> None:
    """Triton 3.7 takes TF32 for float32 that came from bytes wherever a tile is large enough for tcgen05."""
    assert offline.complaint(compiled(entry, "sm_100a"), entry.tensor_cores) == ""


def quotients(entry: Entry) -> set[str]:
    """How the compiled kernel divides and takes roots."""
    return set(
        re.findall(r"\b(?:div|sqrt|rsqrt|rcp)\.(?:rn|full|approx)", offline.built(entry.launch, "sm_90a").asm["ptx"])
    )


@pytest.mark.parametrize("kernel", ["moments", "merge", "batch_norm", "gradient_sums", "gradient"])
def test_batch_norm_rounds_quotients_and_roots_to_nearest(kernel: str) -> None:
    """`/` becomes div.full, which errs by two units, and the interpreter's does not."""
    (entry, *_), pool = ([e for e in ENTRIES if e.kernel == name] for name in (kernel, "pool"))
    assert quotients(entry) and quotients(entry) <= {"div.rn", "sqrt.rn"}
    assert any("div.full" in quotients(e) for e in pool), "the pools divide by `/`"


def single(kind: str) -> list[Launch]:
    """Launches whose sizes are one wherever they can be: Triton turns such arguments into constants."""
    half = torch.bfloat16
    if kind == "norm":
        one, row = catalogue.blank(1, 1, 1, 1, half), torch.empty(1, device="meta")
        of = norms.Norm(row, row, row, row)
        made, parts = norms.statistics(one)
        made += [*norms.merged(parts, 1, moments=True)[0], *norms.forward(one, one, of, 1e-3)]
        return made + norms.backward(one, one, of, 1e-3, one, row, row)
    tiny = Config(block_m=32, block_n=32, block_k=32, split=2)
    if kind == "pool":
        spec = PoolSpec(1, 1, 8, 1, 1, 3, padding=(0, 0, 1, 1), kind="avg")
        (first,) = pools.pooled(spec, catalogue.blank(1, 1, 8, 1, half), catalogue.blank(1, 1, 8, 1, half))
        whole = PoolSpec(1, 1, 1, 1, 1, 1, kind="avg")
        (other,) = pools.pooled(whole, catalogue.blank(1, 1, 1, 1, half), catalogue.blank(1, 1, 1, 1, half))
        return [first, replace(first, arguments={**first.arguments, "WIDE": True}), other]
    oc, groups = (1, 2) if kind == "group" else (1000, 1)
    packed = convolve.pack([catalogue._part(oc, 2048, 1, 1)] * groups, half, "meta")
    outputs = [catalogue.blank(1, 1, 1, oc, half) for _ in range(groups)]
    config = replace(tiny, form="tma", block_m=64) if kind == "tma" else tiny
    spec = ConvSpec(1, 1, 1, 2048, oc * groups, 1, 1, dtype="bfloat16")
    found = convolve.convolution(kind, spec, catalogue.blank(1, 1, 1, 2048, half), packed, outputs, config)
    wide = {**found[0].arguments, "WIDE": True}
    return [*found, replace(found[0], arguments=wide)] if kind == "linear" else found


@pytest.mark.parametrize("kind", ("linear", "group", "tma", "pool", "norm"))
def test_sizes_of_one_compile(kind: str) -> None:
    for one in single(kind):
        assert offline.compile_launch(one, "sm_90a").spill_bytes == 0


def test_a_spill_is_seen() -> None:
    """A tile far too large for its warps spills, and the check says so."""
    entry = catalogue._conv_entries("conv", Config(block_m=128, block_n=256, block_k=64, warps=4), torch.bfloat16)[0]
    found = compiled(entry, "sm_90a")
    assert found.spill_bytes > 0 and "STL" in found.instructions
    assert "bytes of registers spill" in offline.complaint(found, True)


def test_a_missing_tensor_core_is_seen() -> None:
    entry = next(e for e in ENTRIES if e.kernel == "pool")
    assert offline.complaint(compiled(entry, "sm_90a"), True) == "no HGMMA instruction"


@pytest.mark.parametrize("arch", offline.TARGETS)
def test_rounded_products_of_any_kind_are_seen(arch: str) -> None:
    """A small tile of tf32 is HMMA on every architecture."""
    for name in offline.TENSOR_CORE.values():
        found = offline.Compiled(arch, 32, 0, 0, {"FFMA": 16, name: 16})
        assert offline.complaint(found, False) == f"{name} instructions would round float32"


def test_an_unknown_architecture_is_refused() -> None:
    with pytest.raises(ValueError, match="'sm_70'; allowed: sm_80, sm_90a, sm_100a"):
        offline.compile_launch(ENTRIES[0].launch, "sm_70")


def test_arguments_are_described_as_a_launch_would() -> None:
    launch = next(e for e in ENTRIES if e.kernel == "conv_tma").launch
    types, constants, attributes = offline.describe(launch)
    names = [parameter.name for parameter in launch.kernel.params]
    assert types["x_desc"] == "tensordesc<bf16[32, 2, 2, 64]>" and types["y_ptr"] == "*bf16"
    assert types["residual_scale"] == "fp32" and types["oc"] == "i32"
    assert constants[(names.index("KW"),)] == 7
    assert attributes[(names.index("y_pitch"),)] == [["tt.divisibility", 16]]
    wide = replace(launch, arguments={**launch.arguments, "y_pitch": 1 << 40})
    assert offline.describe(wide)[0]["y_pitch"] == "i64"


def test_the_command_prints_rows(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["kernels", "split", "--arch", "sm_90a", "--json", "--check"]) == 0
    rows = json.loads(capsys.readouterr().out)
    keys = ["kernel", "config", "arch", "registers", "spill_bytes", "shared_bytes", "instructions"]
    assert rows and all(list(row) == keys for row in rows)
    assert rows[0]["arch"] == "sm_90a" and rows[0]["instructions"]["HGMMA"] > 0
    assert main(["kernels", "split"]) == 0
    table = capsys.readouterr().out.splitlines()
    assert table[0].split()[:3] == ["kernel", "config", "registers"] and "HGMMA:" in table[1]


def test_the_command_refuses_what_it_does_not_know(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    nothing = dispatch.Unavailable("no NVIDIA driver")
    monkeypatch.setattr(dispatch, "backend_status", lambda: dict.fromkeys(dispatch.BACKENDS, nothing))
    for words in (["--arch", "sm_42"], ["no_such_kernel"], ["--tune", "no_such_model"], ["--tune", "inception_v1"]):
        assert main(["kernels", *words]) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1
    for words in (["pool*", "--tune", "inception_v1"], ["--check", "--tune", "inception_v1"]):
        assert main(["kernels", *words]) == 2
        assert "with PATTERN or --check; allowed: one or the other" in capsys.readouterr().err
    for words in (["--batch", "1,32"], ["--dtype", "bfloat16"]):
        assert main(["kernels", "lrn", *words]) == 2
        assert f"{words[0]} without --tune; allowed: with --tune" in capsys.readouterr().err


def test_the_command_says_on_one_line_that_nothing_compiles(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(offline, "interpreting", lambda: True)
    assert main(["kernels", "lrn", "--arch", "sm_80"]) == 2
    said = "lrn bfloat16: kernels are interpreted in this process; allowed: without TRITON_INTERPRET"
    assert capsys.readouterr() == ("", f"inception-fast: error: {said}\n")
