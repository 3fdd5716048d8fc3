"""Benchmarks, run from the repository's root: ``python -m benchmarks.end_to_end``. See README.md."""
