"""phreg-deploy: clean dense features from pretrained Vision Transformers, distilled once, served without PyTorch.

A model passes these rooms in order: ``distill`` (a timm ViT -> a student with register tokens), ``export`` (a student
-> a bundle), ``calibration`` (a bundle -> one in 8 bits), ``verify`` (a bundle -> parity and artifact rates),
``runtime`` (a bundle and images -> dense features).
"""

__version__ = "0.1.0"
