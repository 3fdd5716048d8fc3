"""ONNX Runtime and OpenVINO on the CPU."""
