"""From a segmentation-models-pytorch model to a checked ONNX graph; the only room that imports torch."""
