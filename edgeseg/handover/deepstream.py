"""A semantic segmentation model for DeepStream's ``nvinfer``.

Written against its source: ``nvdsinfer_conversion.cu`` (pixels times ``net-scale-factor``, planar),
``nvdsinfer_context_impl_output_parsing.cpp`` (float32, the highest class above the threshold), ``nvdsinfer_model_builder.cpp``
(``network-mode=1`` without a calibration file builds FP16; a strongly typed network computes in the graph's own types) and
``gstnvinfer_property_parser.cpp`` (the keys).
"""

from __future__ import annotations

from edgeseg.handover.contents import Content, graph_bytes, label_lines, labels, readme, require, threshold_words
from edgeseg.handover.face import Face, with_face
from edgeseg.store.engine import Engine

CONFIG_NAME = "config_infer.txt"
FACE = Face("input", "probabilities", "probabilities")
_COLOUR_FORMATS = {3: 0, 1: 2}


def contents(engine: Engine) -> dict[str, Content]:
    """The files of the folder, by path.

    Raises:
        SpecError: ``nvinfer`` cannot run the engine.
        BuildError: the graph made does not give the engine's masks.
    """
    about = engine.manifest
    weak = about.precision.requested == "int8" and about.options.get("typing") == "weak"
    strongly = (
        "builds INT8 of a Q/DQ graph as a strongly typed network only, this engine is to be weakly typed; build without "
        "--backend-option typing=weak"
    )
    require(
        engine, "DeepStream", target="tensorrt", fit="resize", batch=True, channels=(1, 3), others=[(weak, strongly)]
    )
    size = about.spec.input
    made = with_face(engine, FACE)
    start = f"""Start it, in this folder, on a machine with DeepStream; the first start builds TensorRT's engine, which takes
minutes:

    gst-launch-1.0 filesrc location=street.jpg ! jpegdec ! nvvideoconvert ! 'video/x-raw(memory:NVMM),format=NV12' \\
        ! mux.sink_0 nvstreammux name=mux batch-size=1 width={size.width} height={size.height} \\
        ! nvinfer config-file-path={CONFIG_NAME} \\
        ! nvsegvisual batch-size=1 width={size.width} height={size.height} \\
        ! nvvideoconvert ! jpegenc ! filesink location=mask.jpg"""
    notes = (
        f"Frames are resized to {size.height}x{size.width} by `nvinfer` (bilinear, aspect ratio not kept), as the "
        "engine was built for.",
        "`strongly-typed=1` makes TensorRT compute in the graph's own types; `network-mode` says nothing beside it. "
        "A release that does not know the key builds another precision or refuses the graph.",
        f"Every pixel gets a class. {threshold_words(engine)}",
    )
    return {
        "model.onnx": graph_bytes(made),
        CONFIG_NAME: _configuration(engine).encode(),
        "labels.txt": label_lines(about.spec),
        "README.md": readme(engine, "DeepStream", start, notes),
    }


def _configuration(engine: Engine) -> str:
    spec = engine.manifest.spec
    size = spec.input
    keys = {
        "gie-unique-id": 1,
        "onnx-file": "model.onnx",
        "labelfile-path": "labels.txt",
        "batch-size": size.batch.maximum,
        "network-type": 2,
        "network-mode": 0,
        "strongly-typed": 1,
        "num-detected-classes": len(labels(spec)),
        "segmentation-threshold": 0.0,
        "segmentation-output-order": 0,
        "output-blob-names": FACE.output,
        "net-scale-factor": 1.0,
        "model-color-format": _COLOUR_FORMATS[size.channels],
        "network-input-order": 0,
        "infer-dims": f"{size.channels};{size.height};{size.width}",
        "maintain-aspect-ratio": 0,
    }
    return "\n".join(("[property]", *(f"{key}={value}" for key, value in keys.items()))) + "\n"
