"""The exporter's own translations of torch operators, where a size is known at run time only. Oracle: torch.

With known sizes they are covered by the architectures that need them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the convert extra is not installed")
pytest.importorskip("onnxscript", reason="the convert extra is not installed")

from small_graphs import plain_session  # noqa: E402

from edgeseg.convert.onnx_reading import OPSET  # noqa: E402
from edgeseg.convert.translations import TRANSLATIONS  # noqa: E402
from edgeseg.silence import silenced  # noqa: E402

pytestmark = pytest.mark.integration


class Function(torch.nn.Module):  # type: ignore[misc]  # torch is imported when it is there
    """A function as a module, which is what can be exported."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Any) -> Any:
        return self.function(x)


def exported(function: Any, example: Any, axes: dict[int, Any]) -> Any:
    """The function as an ONNX model, with these axes of its input dynamic."""
    with silenced(), torch.inference_mode():
        program = torch.onnx.export(
            Function(function).eval(),
            (example,),
            dynamo=True,
            opset_version=OPSET,
            dynamic_shapes=(axes,),
            custom_translation_table=dict(TRANSLATIONS),
            verbose=False,
        )
    assert program is not None
    return program.model_proto


def outputs(model: Any, x: Any) -> list[np.ndarray[Any, Any]]:
    session = plain_session(model)
    return list(session.run(None, {session.get_inputs()[0].name: x.numpy()}))


def dims(*names: str) -> list[Any]:
    return [torch.export.Dim(name, min=2, max=512) for name in names]


@pytest.mark.parametrize("kind", ["avg", "max"])
@pytest.mark.parametrize("output", [(2, 2), (3, 5), (6, 6), (1, 1)])
def test_adaptive_pooling_of_any_size(output: tuple[int, int], kind: str) -> None:
    function = getattr(torch.nn.functional, f"adaptive_{kind}_pool2d")

    def pool(x: Any) -> Any:
        return function(x, output)

    height, width = dims("height", "width")
    model = exported(pool, torch.zeros(1, 3, 8, 9), {2: height, 3: width})
    # multiples of the windows, and not; fewer cells than windows; sides whose quotients round
    for size in ((6, 6), (7, 11), (12, 30), (4, 3), (41, 49), (128, 255)):
        x = torch.randn(1, 3, *size)
        np.testing.assert_allclose(outputs(model, x)[0], pool(x).numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("output", [(4, 3), (5, 7)], ids=["factor", "no factor"])
def test_adaptive_max_pooling_of_a_known_size(output: tuple[int, int]) -> None:
    def pool(x: Any) -> Any:
        return torch.nn.functional.adaptive_max_pool2d(x, output)

    x = torch.randn(1, 3, 8, 9)
    np.testing.assert_array_equal(outputs(exported(pool, x, {}), x)[0], pool(x).numpy())


def test_pooling_to_a_size_of_the_image() -> None:
    def halved(x: Any) -> Any:
        return torch.nn.functional.interpolate(x, size=(x.shape[2] // 2, x.shape[3] // 3), mode="area")

    height, width = dims("height", "width")
    model = exported(halved, torch.zeros(1, 3, 8, 9), {2: height, 3: width})
    for size in ((6, 6), (7, 11), (41, 49)):
        x = torch.randn(1, 3, *size)
        np.testing.assert_allclose(outputs(model, x)[0], halved(x).numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "arguments",
    [
        (3, 1, 1, False, True, 4),
        ((3, 2), None, (1, 0), False, False, 5),
        (3, 2, 1, True, False),
        (3, (2, 1), 1),
        ((2, 3),),
    ],
)
def test_average_pooling(arguments: tuple[Any, ...]) -> None:
    def pool(x: Any) -> Any:
        return torch.nn.functional.avg_pool2d(x, *arguments)

    x = torch.randn(2, 3, 9, 11)
    np.testing.assert_allclose(outputs(exported(pool, x, {}), x)[0], pool(x).numpy(), rtol=1e-5, atol=1e-6)


def test_antialiased_bicubic_resize_to_any_size() -> None:
    table = torch.randn(1, 4, 14, 14)

    def position_embeddings(x: Any) -> Any:
        size = (x.shape[2], x.shape[3])
        return torch.nn.functional.interpolate(table, size=size, mode="bicubic", antialias=True)

    height, width = dims("height", "width")
    model = exported(position_embeddings, torch.zeros(1, 1, 16, 20), {2: height, 3: width})
    for size in ((14, 14), (3, 5), (16, 7), (13, 41), (64, 64)):
        x = torch.zeros(1, 1, *size)
        np.testing.assert_allclose(outputs(model, x)[0], position_embeddings(x).numpy(), rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize(("dynamic", "operator"), [(False, "Split"), (True, "Gather")])
def test_unbind(dynamic: bool, operator: str) -> None:
    def parts(x: Any) -> Any:
        query, key, value = x.unbind(0)
        return query - key, value

    axes = {1: dims("tokens")[0]} if dynamic else {}
    model = exported(parts, torch.zeros(3, 4, 5), axes)
    assert operator in {node.op_type for node in model.graph.node}
    x = torch.randn(3, 7 if dynamic else 4, 5)
    for expected, actual in zip(parts(x), outputs(model, x), strict=True):
        np.testing.assert_array_equal(actual, expected.numpy())
