"""The verbs of linear heads: ``evaluate``, ``probe`` and ``attach``."""
