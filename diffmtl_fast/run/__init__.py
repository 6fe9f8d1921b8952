"""Whole runs: trained to their pictures and metrics, then drawn from, judged and analysed.

`diffmtl_fast.train` has the trainer itself, and the folder that it fills.
"""
