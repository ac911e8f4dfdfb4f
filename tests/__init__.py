"""A package, so that no installed one of this name takes its place: train.py and scan_triton.py import from it."""
