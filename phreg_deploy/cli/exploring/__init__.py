"""The verb ``explore``, and the options that it shares with ``check``."""
