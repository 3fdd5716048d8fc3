"""CUDA memory, streams and arrays behind one protocol, by cuda-bindings or pycuda."""
