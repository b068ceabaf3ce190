"""Edits of ONNX graphs that both ``export`` and ``calibration`` make, and sessions on graphs in memory."""
