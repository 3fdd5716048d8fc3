"""Run a program whose TensorRT builds do without cuDNN, cuBLAS and TensorRT's plugins.

    python -m no_external_tactics pytest -m gpu tests/gpu      # a module, by name, and its arguments
    python -m no_external_tactics edgeseg compile FOLDER

TensorRT 8.5 takes kernels from both libraries by default; here every config is made without, and a build's own choice wins.
"""

from __future__ import annotations

import runpy
import sys
from typing import Any

KEPT = ("JIT_CONVOLUTIONS", "EDGE_MASK_CONVOLUTIONS")


def apply() -> None:
    """Leave the libraries out of every config made from now on."""
    import tensorrt as trt

    made = trt.Builder.create_builder_config

    def create_builder_config(self: Any) -> Any:
        config = made(self)
        config.set_tactic_sources(sum(1 << int(getattr(trt.TacticSource, name)) for name in KEPT))
        return config

    trt.Builder.create_builder_config = create_builder_config


if __name__ == "__main__":
    apply()
    del sys.argv[0]
    sys.path.insert(0, "")
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
