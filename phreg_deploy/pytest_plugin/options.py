"""The settings of the plugin, and which of them are options of the command line."""

from __future__ import annotations

# Name -> type, and the help. Each is an ini option; those of ``OPTIONS`` can be given on the command line too.
SETTINGS = {
    "bundle": ("string", "the bundle to test"),
    "reference": ("string", "assert_parity: a student (needs PyTorch) or another bundle to compare with on the images"),
    "images": ("string", "folder of photographs"),
    "masks": ("string", "assert_miou: folder of masks, PNG, with the names of the images"),
    "backend": ("string", "backend that runs the bundle; by default the fastest that passes the exam"),
    "artifacts": ("string", "folder for the pictures and JSON of failures; by default in the cache of pytest"),
    "limit": ("int", "images at most (64)"),
    "threads": ("int", "threads of the backend; by default as many as the runtime takes"),
    "cosine": ("float", "assert_parity: least 1st-percentile patch cosine; by default that of the bundle's precision"),
    "outlier_points": ("float", "assert_parity: largest change of the norm-outlier rate, in percentage points"),
    "artifact_rate": ("float", "assert_artifact_rate: largest share of norm outliers, 0-1"),
    "latency_ms": ("float", "assert_latency: largest median of a call, in milliseconds"),
    "latency_p99_ms": ("float", "assert_latency: largest 99th percentile of a call, in milliseconds"),
    "baseline": ("string", "assert_latency: a report of `phreg-deploy profile --json` of the same machine"),
    "tolerance": ("float", "assert_latency: growth over the baseline that is allowed (0.1 is 10 %)"),
    "miou": ("float", "assert_miou: least mean IoU of the bundle's head, 0-1"),
}
OPTIONS = ("bundle", "reference", "images", "masks", "backend", "artifacts")
