"""The verb ``serve``, and the part of ``export`` that writes repositories for Triton."""
