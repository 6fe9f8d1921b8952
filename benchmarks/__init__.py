"""Benchmarks of diffmtl_fast: ``benchmarks/bench_suite.py`` measures, ``python -m benchmarks`` reports."""
