"""The commands that sign students and bundles, and verify signatures."""
