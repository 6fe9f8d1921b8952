"""The groups of benchmarks, a module each: ``benchmarks(options)`` yields the cases of one capability."""
