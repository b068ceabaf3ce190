"""Serve bundles over HTTP on one machine: images in; features, labels and pictures out. Needs the extra ``serve``."""
