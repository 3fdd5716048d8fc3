"""edgeseg's own files: artifacts and their manifests, atomic writing, the cache, ONNX files."""
