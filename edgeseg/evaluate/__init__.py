"""Accuracy and latency of an engine, measured against the PyTorch model it came from."""
