"""What turns a picture into features: a preparation that worker processes run, and a network behind the engine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from .batching import fingerprint

if TYPE_CHECKING:
    from ..images import Preparation

DEFAULT_MODEL = "inception_v3"


class Prepare(Protocol):
    """Picklable, for worker processes. `plain`: pictures are only converted to RGB, see `images.read_photo`."""

    @property
    def shape(self) -> tuple[int, int, int]: ...
    @property
    def plain(self) -> bool: ...

    def __call__(self, image: Image.Image) -> NDArray[np.float32]: ...


class Extractor(Protocol):
    """settings: all that the features depend on, JSON; two runs of equal settings give equal features."""

    @property
    def prepare(self) -> Prepare: ...
    @property
    def width(self) -> int: ...
    @property
    def settings(self) -> dict[str, Any]: ...

    def run(self, x: Tensor) -> Tensor: ...


class FidPrepare(NamedTuple):
    """The FID network's own preparation."""

    preprocessing: str
    shape: tuple[int, int, int] = (3, 299, 299)
    plain: bool = True

    def __call__(self, image: Image.Image) -> NDArray[np.float32]:
        from ..fid.resize import prepare

        return prepare(np.asarray(image).transpose(2, 0, 1), self.preprocessing)


class ConfigPrepare(NamedTuple):
    """The preparation that a model's data config asks for."""

    config: Preparation
    plain: bool = False

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.config.input_size

    def __call__(self, image: Image.Image) -> NDArray[np.float32]:
        from ..images import prepare

        result: NDArray[np.float32] = prepare(image, self.config).numpy()
        return result


class FidExtractor:
    """`InceptionFeatures` on pictures."""

    def __init__(
        self,
        weights: str,
        dtype: torch.dtype | None = None,
        preprocessing: str = "tensorflow",
        device: str = "cpu",
        *,
        winograd: bool = False,
    ) -> None:
        from ..fid import InceptionFeatures

        options: dict[str, Any] = {"preprocessing": preprocessing, "device": device, "winograd": winograd}
        self.features = InceptionFeatures(weights, dtype, **options)
        self.prepare: Prepare = FidPrepare(preprocessing)
        self.width = self.features.num_features
        self.settings = {
            "model": "inception_v3",
            "form": "fid",
            "preprocessing": preprocessing,
            "dtype": _name(dtype),
            "weights": self.features.fingerprint,
            **self.features.placed.settings,
        }

    def run(self, x: Tensor) -> Tensor:
        return self.features.from_prepared(x)


class ModelExtractor:
    """What stands before the classifier of a model, prepared as its data config says."""

    def __init__(
        self,
        model: str,
        weights: str | None,
        dtype: torch.dtype | None = None,
        device: str = "cpu",
        *,
        winograd: bool = False,
    ) -> None:
        from ..images import check_channels
        from ..models import create_model
        from .placed import Placed

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # without weights the same random ones every time, or a run could not be resumed
            net: Any = create_model(model, weights=weights, num_classes=0).eval()
        config = net.data_config
        check_channels(config)
        self.prepare: Prepare = ConfigPrepare(config)
        self._placed = Placed(net, config.input_size, dtype, device, winograd=winograd)
        self.settings = {
            "model": model,
            "form": "model",
            "preprocessing": {key: _plain(value) for key, value in vars(config).items()},
            "dtype": _name(dtype),
            "weights": fingerprint(net),
            **self._placed.settings,
        }
        self.width = self.run(torch.zeros(1, *config.input_size)).shape[1]

    def run(self, x: Tensor) -> Tensor:
        return self._placed(x)


class Recipe(NamedTuple):
    """How to make an extractor, in words that another process understands."""

    model: str | None
    weights: str | None
    dtype: str = "float32"
    preprocessing: str | None = None
    device: str = "cpu"
    winograd: bool = False

    def make(self) -> Extractor:
        """The extractor. The FID network has its own where the weights are of it, whatever `model` names it.

        Raises ValueError, FileNotFoundError or WeightsError for what cannot be served.
        """
        from ..weights import resolve
        from .placed import DTYPES, device_of

        device_of(self.device)
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype {self.dtype!r}; allowed: {', '.join(DTYPES)}")
        dtype = DTYPES[self.dtype]
        source = None if self.weights is None else resolve(self.weights, self.model)
        if source is not None and source.model == "inception_v3" and source.options.get("fid"):
            assert self.weights is not None
            preprocessing = self.preprocessing or "tensorflow"
            return FidExtractor(self.weights, dtype, preprocessing, self.device, winograd=self.winograd)
        if self.preprocessing is not None:
            raise ValueError(f"preprocessing {self.preprocessing!r}; allowed: with weights of the FID network only")
        model = self.model or (DEFAULT_MODEL if source is None else source.model)
        return ModelExtractor(model, self.weights, dtype, self.device, winograd=self.winograd)


def _name(dtype: torch.dtype | None) -> str:
    return str(dtype or torch.float32).removeprefix("torch.")


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
