"""The Triton kernels as far as a machine without a GPU can tell: interpreted in a process of their own, and what the
host side decides.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from inception_fast.kernels.cuda import choices
from inception_fast.kernels.spec import ConvSpec
from inception_fast.kernels.triton import configs
from inception_fast.kernels.triton.configs import Config, Row
from inception_fast.kernels.triton.convolve import box

from checkout import ROOT
from inception_fast.backends import triton_gpu

# In processes of a few minutes each: what starts with these names, and the rest.
INTERPRETED = ("test_conv", "test_gpu", "test_hopper", "test_p", "test_")


@pytest.mark.timeout(600)
@pytest.mark.parametrize("start", INTERPRETED)
def test_interpreted_kernels(start: str) -> None:
    """Triton chooses its interpreter when it is imported, for the whole process."""
    before = INTERPRETED[: INTERPRETED.index(start)]
    files = sorted(
        path for path in (ROOT / "tests/interpreted").glob(f"{start}*.py") if not path.name.startswith(before)
    )
    assert files
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--durations=8", *map(str, files)]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


def test_every_class_has_configs() -> None:
    for arch in configs.ARCHES:
        for precision in configs.PRECISIONS:
            rows = [row for row in configs.shipped() if (row.arch, row.precision) == (arch, precision)]
            assert len(rows) >= 100
            item = 2 if precision == "half" else 4
            assert max(row.config.shared_bytes(item) for row in rows) <= configs.SHARED_BYTES[arch]


@pytest.mark.parametrize(("block_n", "widths"), [(16, (16, 0)), (192, (128, 64)), (80, (64, 16)), (256, (256, 0))])
def test_a_tile_has_one_or_two_widths(block_n: int, widths: tuple[int, int]) -> None:
    assert Config(block_n=block_n).widths == widths


@pytest.mark.parametrize(("block_n", "split"), [(72, 1), (112, 1), (96, 2), (0, 1)])
def test_other_widths_are_refused(block_n: int, split: int) -> None:
    """A rest of 8 columns, one of 48, two products whose parts nobody adds, and none."""
    with pytest.raises(ValueError, match=rf"{block_n}.*split.*allowed: "):
        Config(block_n=block_n, split=split)


def test_the_nearest_shape_decides() -> None:
    near, far = Config(block_n=64), Config(block_n=128)
    rows = [Row("sm_90", "half", 289, 192, 1344, near), Row("sm_90", "half", 36992, 192, 1344, far)]
    assert configs.choose("sm_90", "half", 400, 192, 1344, rows) == near
    assert configs.choose("sm_90", "half", 20000, 160, 1000, rows) == far


def test_a_measured_row_wins_where_it_is_as_near() -> None:
    guess, measured = Config(block_n=64), Config(block_n=128)
    rows = [Row("sm_90", "half", 289, 192, 1344, guess), Row("sm_90", "half", 289, 192, 1344, measured, 1e-5)]
    assert configs.choose("sm_90", "half", 289, 192, 1344, rows) == measured
    again = Config("tma", block_n=256)
    rows += [rows[1]._replace(config=again), rows[0]]
    assert configs.choose("sm_90", "half", 289, 192, 1344, rows) == again, "what was tuned here stands behind"


# m, oc, k, c, and what becomes of the prediction. The first is v3's second convolution at batch 128, then its 3x3 at
# 35x35 at batch 128 and 1; a measured row, and channels that steps of 64 or of 32 cover alike, stay.
STEPS = {
    "half a step": ((2765952, 32, 288, 32), "pointer 128x32x64 w4 s3", "pointer 128x32x32 w4 s3"),
    "full machine": ((156800, 96, 864, 96), "pointer 128x32x64 w4 s3", "pointer 128x64x32 w4 s3"),
    "few tiles": ((1225, 96, 864, 96), None, None),
    "whole steps": ((156800, 96, 576, 64), "pointer 128x32x64 w4 s3", None),
    "as many": ((2765952, 32, 432, 48), "pointer 128x32x64 w4 s3", None),
}


PREDICTED = [row for row in configs.shipped() if row.seconds is None]
CHANNELS = (16, 32, 48, 80, 96, 160, 192, 288)


@pytest.mark.parametrize("case", STEPS)
def test_steps_fit_the_channels_of_a_tap(case: str) -> None:
    (m, oc, k, c), before, after = STEPS[case]
    plain = configs.choose("sm_90", "half", m, oc, k, PREDICTED)
    assert before in (None, str(plain)) and plain.block_k == 64, "not the case that this is about"
    found = configs.choose("sm_90", "half", m, oc, k, PREDICTED, c)
    assert str(found) == (after or str(plain))
    assert configs.choose("sm_90", "half", m, oc, k, [Row("sm_90", "half", m, oc, k, plain, 1e-3)], c) == plain


def test_steps_that_fit_multiply_less() -> None:
    """Over all shipped predictions and channel counts, in no more shared memory."""
    found = [(row, c, configs.fitted(row.config, row.arch, row.m, row.oc, c)) for row in PREDICTED for c in CHANNELS]
    changed = [(row, c, config) for row, c, config in found if config != row.config]
    for row, c, config in changed:
        multiplied, before = (-(-c // one.block_k) * one.block_k for one in (config, row.config))
        assert multiplied < before and config.shared_bytes(2) <= row.config.shared_bytes(2)
        assert c <= 32 or row.arch == "sm_90"
    assert len(changed) > 50


def test_the_choice_of_a_device_knows_the_channels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_gpu, "_rows", lambda device: ("sm_90", PREDICTED))
    second = ConvSpec(128, 149, 149, 32, 32, 3, 3, dtype="bfloat16")
    assert str(triton_gpu.chooser(torch.device("cuda"))(second)) == "pointer 128x32x32 w4 s3"


def test_an_unknown_class_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match="sm_70 half; allowed: sm_80, sm_90"):
        configs.choose("sm_70", "half", 1, 1, 1)


def test_configs_survive_the_file(tmp_path: Path) -> None:
    rows = [Row("sm_80", "tf32", 64, 32, 27, Config("tma", 64, 32, 16, 2, 8, 4), 2.5e-6)]
    configs.write(tmp_path / "deep" / "c.json", rows, {"origin": "a test"})
    assert configs.read(tmp_path / "deep" / "c.json") == rows
    for wrong in (
        '{"rows": [["sm_80"',
        '{"rows": [["sm_80", "half", 0, 32, 27, ["tma", 64, 32, 16], 1e-6]]}',
        '{"rows": [["sm_80", "half", Infinity, 32, 27, ["tma", 64, 32, 16], 1e-6]]}',
        '{"rows": [["sm_80", "half", 64, 32, 27, ["tma", 64, null, 16], 1e-6]]}',
        '{"rows": [["sm_80", "half", 64, 32, 27, ["tma", 64, 32, 16], NaN]]}',
    ):
        (tmp_path / "torn.json").write_text(wrong)
        with pytest.raises(ValueError, match=r"torn\.json holds no tile configurations"):
            configs.read(tmp_path / "torn.json")


def test_what_was_tuned_here_is_added(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    row = Row("sm_90", "half", 7, 7, 7, Config(), 1e-6)
    assert configs.tuned("A GPU/1") == configs.shipped()
    configs.write(configs.cache_file("A GPU/1"), [row], {})
    assert configs.tuned("A GPU/1") == (*configs.shipped(), row)


@pytest.mark.parametrize("wrong", ({"block_m": 48}, {"split": 0}, {"form": "magic"}, {"block_k": 8}, {"warps": 3}))
def test_impossible_configs_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="allowed"):
        Config(**wrong)  # type: ignore[arg-type]


def test_the_model_fills_the_machine() -> None:
    """At batch 1 a walk over k is shared or tiles are small; at batch 256 tiles are big."""
    one = configs.candidates("sm_90", "half", 289, 192, 1344)[0]
    many = configs.candidates("sm_90", "half", 289 * 256, 192, 1344)[0]
    assert one.block_m * one.block_n < many.block_m * many.block_n
    assert configs.predict(many, "sm_90", "half", 289 * 256, 192, 1344) < configs.predict(
        one, "sm_90", "half", 289 * 256, 192, 1344
    )


@pytest.mark.parametrize(
    ("sizes", "pixels", "covered"),
    (((128, 17, 17), 128, 1.0), ((1, 8, 8), 64, 1.0), ((32, 17, 17), 128, 17 / 20), ((8, 35, 35), 128, 0.94)),
)
def test_boxes_hang_over_little(sizes: tuple[int, int, int], pixels: int, covered: float) -> None:
    """A box of many images and few pixels covers a 17x17 map that no power of two divides."""
    parts = box(*sizes, pixels)
    assert parts[0] * parts[1] * parts[2] == pixels
    whole = 1.0
    for size, part in zip(sizes, parts, strict=True):
        whole *= size / (-(-size // part) * part)
    assert whole >= covered


def test_tuners_at_once_keep_all_rows(tmp_path: Path) -> None:
    """Processes that add to the same caches, as one a GPU: nobody writes away what another has just written."""
    script = (
        "import sys; from dataclasses import replace; from pathlib import Path\n"
        "from inception_fast.engine import gpu_tune\n"
        "from inception_fast.kernels.cuda import choices\n"
        "from inception_fast.kernels.triton.configs import Config, Row\n"
        "folder, who = Path(sys.argv[1]), int(sys.argv[2])\n"
        "for i in range(100):\n"
        "    gpu_tune.keep(folder / 'triton.json', Row('sm_90', 'half', 1 + who, 1 + i, 9, Config(), 1e-6))\n"
        "    shape = choices.Shape('conv', 'half', 1 + who, 1 + i, 9, 1)\n"
        "    choices.keep(folder / 'cuda.json', choices.Row('A GPU', shape, 'a', 1, 1e-6, 2e-6))\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    tuners = [subprocess.Popen([*command, str(who)]) for who in range(3)]
    assert [tuner.wait() for tuner in tuners] == [0, 0, 0]
    assert len(configs.read(tmp_path / "triton.json")) == len(choices.read(tmp_path / "cuda.json")) == 300


@pytest.mark.parametrize("error", [RuntimeError("no home"), PermissionError("another's home")])
def test_without_a_home_there_are_the_shipped_rows(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def home(*_: object) -> None:
        raise error

    monkeypatch.setattr(Path, "home" if isinstance(error, RuntimeError) else "exists", home)
    assert configs.tuned("A GPU/1") == configs.shipped()
    assert choices.tuned("A GPU/1", 1) == choices.shipped()
