"""A model for Deepness, the QGIS plug-in: one ONNX file that carries its own settings.

Written against the plug-in's source: ``processing/models/model_base.py`` and ``segmentor.py`` (what it reads from
``metadata_props``), ``preprocessing_utils.py`` (pixels divided by 255, NCHW), ``map_processor_segmentation.py``
(threshold, argmax, median filter).
"""

from __future__ import annotations

import json
import math

from edgeseg.errors import SpecError
from edgeseg.handover.contents import Content, graph_bytes, labels, readme, require, threshold_words
from edgeseg.handover.face import Face, with_face
from edgeseg.store.engine import Engine

FACE = Face("image", "probabilities", "probabilities", scale=1 / 255)
TILES_OVERLAP_PERCENT = 25
"""As edgeseg's own windows overlap."""


def contents(engine: Engine, resolution_cm: float | None) -> dict[str, Content]:
    """The files of the folder, by path.

    Args:
        engine: the engine.
        resolution_cm: ground size of a pixel of the images the model was trained on, centimetres.

    Raises:
        SpecError: the plug-in cannot run the engine, or the resolution was not said.
        BuildError: the graph made does not give the engine's masks.
    """
    spec = engine.manifest.spec
    size = spec.input
    square = (
        f"cuts square tiles, the engine takes {size.height}x{size.width}; build with --size {size.height}x{size.height}"
    )
    others = [(size.height != size.width, square)]
    require(engine, "Deepness", target="onnxruntime", fit="tile", batch=True, others=others)
    if resolution_cm is None or not (math.isfinite(resolution_cm) and resolution_cm > 0):
        raise SpecError(
            "Deepness resamples maps to the model's ground resolution, which no engine knows; give --resolution CM, the "
            "centimetres per pixel of the training images, such as 10"
        )
    settings = {
        "model_type": "Segmentor",
        "class_names": dict(enumerate(labels(spec))),
        "resolution": resolution_cm,
        # The plug-in reads the first, its documentation names the second.
        "tile_size": size.width,
        "tiles_size": size.width,
        "tiles_overlap": TILES_OVERLAP_PERCENT,
        # The highest probability decides; the engine's threshold is in the graph. A median filter would change masks.
        "seg_thresh": 0.0,
        "seg_small_segment": 0,
    }
    made = with_face(engine, FACE, {name: json.dumps(value) for name, value in settings.items()})
    start = (
        "Start QGIS with the plug-in Deepness installed, choose `model.onnx` of this folder as the model file in its panel,\n"
        "press *Load default parameters*, choose the layer, and run:\n\n    qgis"
    )
    notes = (
        f"Tiles of {size.width}x{size.width} pixels at {resolution_cm:g} cm, {TILES_OVERLAP_PERCENT}% overlap; bands in the "
        "order the model was trained with. The plug-in cuts overlaps in the middle, edgeseg blends them: masks differ at seams.",
        "Median filter and threshold are off, so that masks are the engine's. " + threshold_words(engine),
    )
    return {
        "model.onnx": graph_bytes(made),
        "README.md": readme(engine, "Deepness", start, notes),
    }
