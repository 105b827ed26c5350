"""The six variants, in plain torch.nn, and the registry that makes them."""

from .._data_config import DataConfig, facenet_config, imagenet_config, inception_config
from ._base import GoogLeNetOutputs, InceptionNet, InceptionOutputs
from ._registry import create_model, list_models
from ._trunk import FeatureInfo, FeatureNet
from .inception_resnet import InceptionResnetV1, InceptionResnetV2
from .inception_v1 import InceptionV1
from .inception_v2 import InceptionV2
from .inception_v3 import InceptionV3
from .inception_v4 import InceptionV4

__all__ = [
    "DataConfig",
    "FeatureInfo",
    "FeatureNet",
    "GoogLeNetOutputs",
    "InceptionNet",
    "InceptionOutputs",
    "InceptionResnetV1",
    "InceptionResnetV2",
    "InceptionV1",
    "InceptionV2",
    "InceptionV3",
    "InceptionV4",
    "create_model",
    "facenet_config",
    "imagenet_config",
    "inception_config",
    "list_models",
]
