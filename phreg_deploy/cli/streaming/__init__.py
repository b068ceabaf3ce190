"""The verb ``watch`` and its display."""
