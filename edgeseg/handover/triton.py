"""A model repository of NVIDIA's Triton Inference Server.

Triton takes the engine's graph as it is: image in, mask out, everything between inside. Written against the
protocol buffer of its model configuration (``model_config.proto``).
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

from edgeseg.backends.signature import AUXILIARY, Extent, TensorInfo, expected_image, expected_outputs
from edgeseg.console import markdown_text
from edgeseg.errors import SpecError, typed
from edgeseg.handover.contents import Content, input_words, labels, values_words
from edgeseg.spec import PipelineSpec
from edgeseg.store.engine import Engine
from edgeseg.store.manifest import MANIFEST_NAME, Manifest

REPOSITORY = "model_repository"
_TYPES = {"uint8": "TYPE_UINT8", "uint16": "TYPE_UINT16", "float32": "TYPE_FP32", "int32": "TYPE_INT32"}
# How long a request waits for others to share its batch: far below a frame's time.
QUEUE_DELAY_US = 500


def contents(engine: Engine) -> dict[str, Content]:
    """The files of the repository, by path.

    Raises:
        SpecError: Triton has no backend for the engine, or the engine takes no single image.
    """
    manifest = engine.manifest
    is_plan = manifest.target == "tensorrt"
    if manifest.target == "tensorrt-rtx":
        raise SpecError(
            "Triton has no backend for TensorRT-RTX; build with --target tensorrt or onnxruntime, and export that"
        )
    if is_plan and manifest.engine is None:
        compile_first = typed("compile", engine.folder)
        raise SpecError(
            f"{engine.folder} holds a portable graph, no plan; run this on the server's GPU first: {compile_first}"
        )
    batch = manifest.spec.input.batch
    if batch.is_dynamic and batch.minimum > 1:
        raise SpecError(
            f"the engine takes {batch.minimum} images or more, Triton also sends one; build with --batch 1:N:M"
        )
    name = re.sub(r"[^A-Za-z0-9_-]", "-", manifest.name).strip("-") or "edgeseg"
    model = f"{REPOSITORY}/{name}"
    file: tuple[str, Content] = ("model.plan", engine.engine_path) if is_plan else ("model.onnx", engine.graph_path)
    return {
        f"{model}/config.pbtxt": _configuration(name, manifest, is_plan=is_plan).encode(),
        f"{model}/labels.txt": ("\n".join(" ".join(label.split()) for label in labels(manifest.spec)) + "\n").encode(),
        f"{model}/1/{file[0]}": file[1],
        "README.md": _readme(name, manifest, is_plan=is_plan).encode(),
    }


def _configuration(name: str, manifest: Manifest, *, is_plan: bool) -> str:
    spec = manifest.spec
    # A server that batches leaves the first dimension to it; a graph of a fixed batch has all its dimensions written out.
    batches = spec.input.batch.is_dynamic
    image = expected_image(spec, has_uint16=not is_plan)
    outputs = [*expected_outputs(spec, has_uint16=not is_plan), *_auxiliary(spec)]
    lines = [
        f"name: {json.dumps(name)}",
        f'backend: "{"tensorrt" if is_plan else "onnxruntime"}"',
        f"max_batch_size: {spec.input.batch.maximum if batches else 0}",
        *_tensor("input", image, batches),
    ]
    for index, output in enumerate(outputs):
        lines += _tensor("output", output, batches, "labels.txt" if index == 0 else None)
    if batches:
        lines.append(f"dynamic_batching {{ max_queue_delay_microseconds: {QUEUE_DELAY_US} }}")
    # INT8 is written for a kind of CPU; on a GPU, ONNX Runtime would compute it in float.
    kind = "KIND_GPU" if is_plan else "KIND_CPU" if manifest.precision.requested == "int8" else "KIND_AUTO"
    lines.append(f"instance_group [ {{ count: 1 kind: {kind} }} ]")
    threads = manifest.options.get("threads")
    if not is_plan and isinstance(threads, int) and threads > 0:
        lines.append(f'parameters {{ key: "intra_op_thread_count" value {{ string_value: "{threads}" }} }}')
    size = spec.input
    shape: Sequence[int] = (size.height, size.width, size.channels)
    dims = ", ".join(map(str, shape if batches else (size.batch.maximum, *shape)))
    lines.append(
        f'model_warmup [ {{ name: "zeros" batch_size: 1 inputs {{ key: "image" value {{ data_type: {_TYPES[image.dtype]} '
        f"dims: [ {dims} ] zero_data: true }} }} }} ]"
    )
    return "\n".join(lines) + "\n"


def _auxiliary(spec: PipelineSpec) -> list[TensorInfo]:
    kept = spec.model.model_args.get("aux_params")
    if not isinstance(kept, dict):
        return []
    classes = int(kept["classes"])
    batch = (spec.input.batch.minimum, spec.input.batch.maximum)
    return [TensorInfo(AUXILIARY, "float32", (batch, (classes, classes)))]


def _tensor(word: str, tensor: TensorInfo, batches: bool, label_file: str | None = None) -> list[str]:
    shape = tensor.shape or ()
    dims = ", ".join(_size(extent) for extent in (shape[1:] if batches else shape))
    label = f' label_filename: "{label_file}"' if label_file else ""
    return [f'{word} [ {{ name: "{tensor.name}" data_type: {_TYPES[tensor.dtype]} dims: [ {dims} ]{label} }} ]']


def _size(extent: Extent) -> str:
    low, high = extent
    return str(low) if low == high else "-1"


def _readme(name: str, manifest: Manifest, *, is_plan: bool) -> str:
    spec = manifest.spec
    size, batch = spec.input, spec.input.batch
    # A server that batches takes any number up to the engine's; else it is the engine's own.
    shown = 1 if batch.is_dynamic else batch.maximum
    where = (
        f"The plan is for {manifest.device.get('gpu', 'the GPU it was built on')} and TensorRT "
        f"{manifest.versions.get('tensorrt', 'of its build')}: use the Triton release that has this version."
        if is_plan
        else "The graph runs in Triton's ONNX Runtime backend."
        + (f" Its INT8 is in the scheme {manifest.scheme}." if manifest.scheme else "")
        + (" It was built and measured for OpenVINO, not for ONNX Runtime." if manifest.target == "openvino" else "")
    )
    given = expected_image(spec, has_uint16=not is_plan).dtype
    results = [*expected_outputs(spec, has_uint16=not is_plan), *_auxiliary(spec)]
    tried = (
        "The configuration follows Triton's own format; edgeseg has not started a server with a plan."
        if is_plan
        else "Folders like this one were served by Triton 2.51.0 (release 24.10) on a CPU, with the engine's own masks."
    )
    outputs = "\n".join(f"- `{tensor.name}`: {tensor.dtype}" for tensor in results)
    return f"""# {name} for Triton

{markdown_text(f"{spec.in_words}. {where}")}

Start it, in this folder:

    docker run --rm --net host {"--gpus all " if is_plan else ""}-v "$PWD/{REPOSITORY}:/models" \\
        nvcr.io/nvidia/tritonserver:<release>-py3 tritonserver --model-repository /models

- `image`: {input_words(spec, given)}. Normalization is inside.
{outputs}

{values_words(spec)}: the lines of `labels.txt`, from 0 on. A request, with `pip install tritonclient[http] numpy`:

```python
import numpy as np
import tritonclient.http as http

image = np.zeros(({shown}, {size.height}, {size.width}, {size.channels}), np.{given})
given = http.InferInput("image", image.shape, "{_TYPES[given].removeprefix("TYPE_")}")
given.set_data_from_numpy(image)
answer = http.InferenceServerClient("localhost:8000").infer("{name}", [given])
mask = answer.as_numpy("{spec.output.kind}")
```

Images of another size are the client's matter: the engine was built for fit policy `{size.fit}`.
`handover.json` has the SHA-256 of every file, `{MANIFEST_NAME}` is the engine's own record: where it is from, its precision
and its verification against PyTorch. {tried}
"""
