"""The verb ``selftest``."""
