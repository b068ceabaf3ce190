"""Measurements of the project. A package, since pyarrow 17 installs another one of this name."""
