"""What convert, quantize and backends all ask of an ONNX graph: multiply-accumulates, editing, types."""
