"""What the heads of models take by themselves: maps of the classifier's dtype, unless something casts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from inception_fast.models import create_model
from inception_fast.models._base import InceptionNet

NAME = "inception_v1"
MAP = torch.rand(2, 1024, 2, 2)
BAD: dict[str, tuple[Tensor, type[Exception], str]] = {
    "integers": (MAP.long(), TypeError, "dtype torch.int64; allowed: a floating point dtype"),
    "complex": (MAP.to(torch.complex64), TypeError, "dtype torch.complex64; allowed: a floating point dtype"),
    "wider": (MAP.double(), TypeError, "dtype torch.float64; allowed: torch.float32, the classifier's"),
    "narrower": (MAP.bfloat16(), TypeError, "dtype torch.bfloat16; allowed: torch.float32, the classifier's"),
    "sparse": (MAP.to_sparse(), ValueError, "layout torch.sparse_coo; allowed: torch.strided"),
}


def net() -> InceptionNet:
    made = create_model(NAME, num_classes=3).eval()
    assert isinstance(made, InceptionNet)
    return made


@pytest.mark.parametrize("name", BAD)
def test_a_map_that_no_classifier_takes(name: str) -> None:
    x, error, message = BAD[name]
    with pytest.raises(error, match=f"{NAME}'s head got a map of {message}"):
        net().forward_head(x)


def test_a_head_that_casts_takes_what_it_casts() -> None:
    model = net()
    with torch.autocast("cpu", torch.bfloat16):
        assert model.forward_head(MAP.bfloat16()).dtype is torch.bfloat16
    assert model.forward_head(MAP.double(), pre_logits=True).dtype is torch.float64
    model.fc.register_forward_pre_hook(lambda module, args: (args[0].float(),))
    assert model.forward_head(MAP.bfloat16()).dtype is torch.float32
    model.fc = nn.Sequential(nn.Flatten(), nn.Linear(1024, 3, dtype=torch.float64))
    assert model.forward_head(MAP.double()).shape == (2, 3)
    model.reset_classifier(0)
    assert model.forward_head(MAP.double()).dtype is torch.float64
