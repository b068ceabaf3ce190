"""A bundle and images -> dense features, parity and latency reports. Imports neither torch, timm nor onnx."""

from phreg_deploy.images.nv12 import Nv12Frame
from phreg_deploy.runtime.dense_features import DenseFeatures, LayerFeatures
from phreg_deploy.runtime.features import FeatureExtractor
from phreg_deploy.runtime.tiling import TiledFeatures

__all__ = ["DenseFeatures", "FeatureExtractor", "LayerFeatures", "Nv12Frame", "TiledFeatures"]
