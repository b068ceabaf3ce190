"""phreg-deploy: clean dense features from pretrained Vision Transformers, distilled once, served without PyTorch.

The rooms, in the order in which data flows through them: ``distill`` (a timm ViT -> a registered student),
``export`` (a student -> a bundle), ``runtime`` (a bundle and images -> dense features).
"""

__version__ = "0.1.0"
