"""The tables of README and docs: ``python -m benchmarks.tables`` writes them from the JSON files."""
