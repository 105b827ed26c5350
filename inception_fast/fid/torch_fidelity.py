"""Our extractor under torch-fidelity: register it once, then name it in `calculate_metrics(feature_extractor=...)`."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from ..features.placed import DTYPES
from .extractor import InceptionFeatures

NAME = "inception-v3-fast"
PROVIDED = ("2048", "logits_unbiased")


def register_with_torch_fidelity(name: str = NAME, *, winograd: bool = False) -> type:
    """Registers a feature extractor with torch-fidelity and returns its class.

    It gives the features "2048" and "logits_unbiased", which serve FID, KID, precision and recall, and the Inception
    score. Of torch-fidelity's own options, `feature_extractor_weights_path` names the weights and
    `feature_extractor_internal_dtype` the arithmetic; for `winograd`, of which it has no option, see
    `InceptionFeatures`.

    Raises ImportError without torch-fidelity or the torchvision that it needs; torch-fidelity itself refuses a name
    that is taken.
    """
    try:
        base: Any = importlib.import_module("torch_fidelity.feature_extractor_base").FeatureExtractorBase
        registry: Any = importlib.import_module("torch_fidelity.registry")
    except (ImportError, RuntimeError) as error:  # RuntimeError: it meets a torchvision built for another torch
        if getattr(error, "name", None) == "torch_fidelity":
            raise ImportError(f"torch-fidelity is not installed ({error}); pip install torch-fidelity") from error
        needed = f"a torchvision built for torch {torch.__version__}"
        raise ImportError(f"torch-fidelity cannot be imported ({error}); it needs {needed}") from error
    extractor = _extractor_class(base, winograd)
    registry.register_feature_extractor(name, extractor)
    return extractor


def _extractor_class(base: Any, winograd: bool = False) -> type:
    class FastInceptionV3(base):  # type: ignore[misc]
        """`InceptionFeatures` behind torch-fidelity's interface."""

        def __init__(
            self,
            name: str,
            features_list: list[str],
            feature_extractor_weights_path: str | None = None,
            feature_extractor_internal_dtype: str | None = None,
            **_: Any,
        ) -> None:
            super().__init__(name, features_list)
            if feature_extractor_weights_path is None:
                raise ValueError("feature_extractor_weights_path=None; allowed: the path of the FID network's weights")
            dtype = feature_extractor_internal_dtype or "float32"
            if dtype not in DTYPES:
                raise ValueError(f"feature_extractor_internal_dtype={dtype!r}; allowed: {', '.join(DTYPES)}")
            self.features = InceptionFeatures(feature_extractor_weights_path, DTYPES[dtype], winograd=winograd)

        def forward(self, images: Tensor) -> tuple[Tensor, ...]:
            """uint8 [n, 3, h, w] -> the features asked for, in their order."""
            pooled = self.features(images)
            found = {"2048": pooled}
            if "logits_unbiased" in self.features_list:
                found["logits_unbiased"] = pooled @ self.features.classifier_weight.T
            return tuple(found[key] for key in self.features_list)

        @staticmethod
        def get_provided_features_list() -> tuple[str, ...]:
            return PROVIDED

        @staticmethod
        def get_default_feature_layer_for_metric(metric: str) -> str:
            return {"isc": "logits_unbiased", "fid": "2048", "kid": "2048", "prc": "2048"}[metric]

        @staticmethod
        def can_be_compiled() -> bool:
            return False  # it is one native plan already

        @staticmethod
        def get_dummy_input_for_compile() -> Tensor:
            return torch.zeros(1, 3, 4, 4, dtype=torch.uint8)

    return FastInceptionV3
