"""Turn a bundle into a model repository for NVIDIA's Triton Inference Server. Importing this module imports nothing
heavy; bundles of several sizes need onnx.
"""

from phreg_deploy.model_repository.repository import ModelRepository, write_repository

__all__ = ["ModelRepository", "write_repository"]
