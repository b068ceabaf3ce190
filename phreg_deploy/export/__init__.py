"""A student, or any supported timm ViT -> a bundle; a bundle -> a TensorRT engine.

``exporter`` needs the extra ``export`` (torch, timm, onnx, onnxscript); ``engine`` needs ``trt`` and no torch.
"""
