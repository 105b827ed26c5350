"""Measuring: one timer, work counts, provenance, the peers we are compared with, and result files."""
