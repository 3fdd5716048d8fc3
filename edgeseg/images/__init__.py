"""Pixels: decoding files, fit and placement, resizing. No engine."""
