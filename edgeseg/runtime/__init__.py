"""Running engines: images, folders, videos and cameras in, masks out. Imports numpy and Pillow, never torch or onnx.

``resize`` and ``placement`` say how an image becomes an input and a mask comes back, ``tiling`` and ``scores`` how
overlapping windows and logits become one mask; ``segmenter`` puts them around an engine. ``images`` and ``sources``
read, ``overlap`` and ``stream`` do so ahead of time, ``overlay`` and ``outputs`` draw and write, ``run`` does it all.
"""
