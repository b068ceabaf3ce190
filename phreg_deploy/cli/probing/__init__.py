"""The verbs that train or read linear heads: ``evaluate`` and ``probe``."""
