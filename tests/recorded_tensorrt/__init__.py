"""Stand-ins for the ``tensorrt`` module of TensorRT 8.5, 8.6, 10.3, 10.16 and 11.4, for machines without a GPU.

    recorder = Recorder("11.4.0.106")
    trt = recorder.module                  # has what that version's module has, and nothing else
    trt.BuilderFlag.FP16                   # AttributeError: tensorrt 11.4.0.106 has no BuilderFlag.FP16

Classes, enum members, methods and properties come from the committed surfaces of the real modules (``tests/data``). What a
call *does* is made up (:mod:`recorded_tensorrt.fake`): no kernel is built or run. A test that passes on these proves that
the names, the arity, the argument types and the order of calls fit the version; nothing about results or speed.
"""

from recorded_tensorrt.fake import Fakery
from recorded_tensorrt.surface import RTX, VERSIONS, Call, Recorder

__all__ = ["RTX", "VERSIONS", "Call", "Fakery", "Recorder"]
