"""The verbs of heads and of evaluation: ``evaluate``, ``probe``, ``classes`` and ``attach``."""
