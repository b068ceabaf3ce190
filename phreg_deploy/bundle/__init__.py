"""The bundle on disk: manifest, graph, exam, TensorRT plans (``docs/bundle-format.md``)."""
