"""The test run itself: it fails when it proved nothing, counts its skips, and hands out poisoned memory."""

from __future__ import annotations

import pytest
import torch

from checkout import ROOT

BODIES = {
    "nothing": "",
    "all skipped": "import pytest\n@pytest.mark.skip(reason='no GPU')\ndef test_a(): pass\n",
    "no reason": "import pytest\n@pytest.mark.skip\ndef test_a(): pass\ndef test_b(): pass\n",
    "fails": "def test_a(): assert False\n",
    "passes": "import pytest\n@pytest.mark.skip(reason='no GPU')\ndef test_a(): pass\ndef test_b(): pass\n",
}


@pytest.mark.parametrize("body", BODIES)
def test_a_run_passes_only_when_a_test_ran_and_every_skip_has_a_reason(body: str, pytester: pytest.Pytester) -> None:
    pytester.makeconftest((ROOT / "tests/conftest.py").read_text())
    pytester.makepyfile(BODIES[body])
    done = pytester.runpytest_inprocess("-p", "no:cacheprovider")
    assert (done.ret == pytest.ExitCode.OK) == (body == "passes")
    if body == "passes":
        done.stdout.fnmatch_lines(["*1 skipped*", "    1  no GPU"])
    if body in ("nothing", "all skipped"):
        done.stdout.fnmatch_lines(["no test was executed*"])


def test_uninitialised_memory_is_poisoned() -> None:
    assert torch.empty(1000).isnan().all()
