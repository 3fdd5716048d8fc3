"""Calibration and quantization: activation ranges from images, then Q/DQ and FP16 graphs for a target's scheme."""
