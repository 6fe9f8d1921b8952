"""Benchmarks of diffmtl_fast, run from the repository root: ``python -m benchmarks.step``."""
