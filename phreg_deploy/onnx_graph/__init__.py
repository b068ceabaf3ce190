"""Edit ONNX graphs for ``export`` and ``calibration``, and open sessions on graphs in memory."""
