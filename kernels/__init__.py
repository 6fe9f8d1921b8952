"""Triton device code and its launch settings; installed as ``diffmtl_fast.kernels``."""
