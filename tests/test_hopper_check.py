"""Forms of tiles that nothing but a measurement chooses: proved on a GPU where a row names them, and never before."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from inception_fast.kernels.cuda import check, loader
from inception_fast.kernels.cuda.choices import Row, Shape

from checkout import ROOT
from hopper_library import stub
from inception_fast.backends import hopper_gpu

SHAPE = Shape("conv", "half", 289, 192, 1344, 7)


def test_a_form_that_measurements_choose_is_proved_where_one_did(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is wrong with it costs its rows and no more; where nothing names it, it does not run."""
    asked: list[str] = []

    def refused(device: torch.device, form: str) -> str:
        asked.append(form)
        return "wrong numbers" if form == "pooled" else ""

    def rows(*configs: str) -> tuple[Row, ...]:
        return tuple(Row("A GPU", SHAPE, config, 1, 1e-6, 2e-6) for config in configs)

    monkeypatch.setattr(check, "refusal", lambda device: "")
    monkeypatch.setattr(check, "form_refusal", refused)
    gpu, plain = torch.device("cuda", 0), rows("128x64x64 s4", "pair 192")
    assert hopper_gpu.proved(plain, gpu) == plain and asked == []
    named = rows("128x192x64 s4 behind", "256x64x32 pooled")
    with pytest.warns(RuntimeWarning, match="no tile 'pooled' is used, which measurements chose: wrong numbers"):
        assert hopper_gpu.proved((*plain, *named), gpu) == (*plain, named[0])
    assert asked == ["behind", "pooled"]
    monkeypatch.setattr(check, "refusal", lambda device: "all is wrong")
    assert hopper_gpu.proved(named, gpu) == named and len(asked) == 2


def test_each_of_several_gpus_has_its_own_measurements(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked without a number about the current one, too."""
    hopper_gpu._measured.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU {device.index}")
    monkeypatch.setattr(hopper_gpu, "proved", lambda rows, device: ())
    try:
        for index in (0, 1):
            monkeypatch.setattr(torch.cuda, "current_device", lambda index=index: index)
            assert hopper_gpu.measured(torch.device("cuda")) == (f"GPU {index}", ())
        assert hopper_gpu.measured(torch.device("cuda", 0)) == ("GPU 0", ())
    finally:
        hopper_gpu._measured.cache_clear()


def test_a_form_is_asked_once_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that fails is told as well, and what is wrong with it is no verdict on other kernels."""
    asked: list[torch.device] = []

    def found(kernels: Any, device: torch.device) -> str:
        asked.append(device)
        if device.index:
            raise RuntimeError("unspecified launch failure")
        return ""

    monkeypatch.setattr(loader, "form_verdicts", {})
    monkeypatch.setattr(check, "wrong_pooled", found)
    monkeypatch.setattr(check, "wrong_behind", lambda kernels, device: "the first behind tile gave wrong numbers")
    monkeypatch.setattr(check.loader, "library", stub)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    one, other = torch.device("cuda", 0), torch.device("cuda", 1)
    for _ in range(2):
        assert check.form_refusal(one, "pooled") == ""
        assert check.form_refusal(other, "pooled") == "GPU 1: the first pooled tile failed: unspecified launch failure"
        assert check.form_refusal(one, "behind") == "the first behind tile gave wrong numbers"
    assert asked == [one, other] and loader.distrusted() == ""


def test_what_says_nothing_of_the_kernels_is_no_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU that is full, or a graph that is captured: whoever asks later finds the kernels right."""
    room, captured, device = [False], [True], torch.device("cuda", 0)

    def found(kernels: Any, there: torch.device) -> str:
        if not room[0]:
            raise torch.OutOfMemoryError("no room for the first convolution")
        return ""

    monkeypatch.setattr(loader, "verdicts", {})
    monkeypatch.setattr(check, "wrong", found)
    monkeypatch.setattr(check.loader, "library", stub)
    monkeypatch.setattr(torch.cuda, "device", lambda there: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: captured[0])
    with pytest.raises(RuntimeError, match=r"convolution .* GPU 0, .* captured; allowed: a call ahead of the capture"):
        check.refusal(device)
    captured[0] = False
    with pytest.raises(torch.OutOfMemoryError):
        check.refusal(device)
    assert loader.distrusted() == ""
    room[0] = True
    assert check.refusal(device) == "" and loader.verdicts == {0: ""}


def test_the_callers_default_device_is_no_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers that the kernels are compared with are drawn on the CPU, by a generator of its own."""

    def found(kernels: Any, device: torch.device) -> str:
        drawn = torch.randint(0, 2, (3,), generator=torch.Generator())
        return "" if drawn.device.type == "cpu" else f"drawn on {drawn.device}"

    monkeypatch.setattr(loader, "walk_verdicts", {})
    monkeypatch.setattr(check, "wrong_walks", found)
    monkeypatch.setattr(check.loader, "library", stub)
    monkeypatch.setattr(torch.cuda, "device", lambda there: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    with torch.device("meta"):
        assert check.walk_refusal(torch.device("cuda", 0)) == ""


def test_nobody_waits_for_the_whole_device() -> None:
    """Which is an error while another thread captures a graph, there and here."""
    folders = (ROOT / "kernels", ROOT / "inception_fast" / "engine", ROOT / "inception_fast" / "backends")
    texts = {file.name: file.read_text() for folder in folders for file in folder.rglob("*.py")}
    assert len(texts) > 50 and not [name for name, text in texts.items() if "torch.cuda.synchronize(" in text]


def test_forms_are_words_of_their_configurations_names() -> None:
    plain = stub().configs[0]._replace(turns=0, behind=0, pooled=0)
    assert not set(plain.name.split()) & set(check.FORMS)
    for form in check.FORMS:
        assert form in plain._replace(**{form: 1}).name.split()
