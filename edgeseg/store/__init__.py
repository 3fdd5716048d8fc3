"""edgeseg's own files: engine folders and their manifests, documents, atomic writing, the cache, ONNX files."""
