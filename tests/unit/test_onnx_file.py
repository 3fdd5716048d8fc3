"""ONNX files: hostile ones are refused, ours appear whole or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

onnx = pytest.importorskip("onnx", reason="onnx is not installed")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402
from small_graphs import graph  # noqa: E402

from edgeseg.errors import ArtifactError, first_line  # noqa: E402
from edgeseg.store.engine import check_engine_folder  # noqa: E402
from edgeseg.store.onnx_file import read_onnx, write_onnx  # noqa: E402


def small_model() -> Any:
    weight = np.arange(6, dtype=np.float32).reshape(2, 3)
    return graph("(float[1, 2] x) => (float[1, 3] y)", "y = MatMul(x, w)", w=weight)


def test_a_model_comes_back_as_written(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    write_onnx(small_model(), path)
    assert read_onnx(path) == small_model()
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]


def test_the_order_of_initializers_does_not_change_the_bytes(tmp_path: Path) -> None:
    """Passes collect them in sets, whose order differs between processes; the hash of a graph must not."""
    model = small_model()
    model.graph.initializer.append(numpy_helper.from_array(np.zeros(3, np.float32), "bias"))
    model.graph.value_info.extend(helper.make_tensor_value_info(n, TensorProto.FLOAT, (1, 3)) for n in ("b", "a"))
    write_onnx(model, tmp_path / "one.onnx")
    other = small_model()
    other.graph.initializer.insert(0, numpy_helper.from_array(np.zeros(3, np.float32), "bias"))
    other.graph.value_info.extend(helper.make_tensor_value_info(n, TensorProto.FLOAT, (1, 3)) for n in ("a", "b"))
    write_onnx(other, tmp_path / "other.onnx")
    assert (tmp_path / "one.onnx").read_bytes() == (tmp_path / "other.onnx").read_bytes()


def test_a_missing_file_says_so(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"cannot read .*m\.onnx"):
        read_onnx(tmp_path / "m.onnx")


@pytest.mark.parametrize("place", ["m\udcff.onnx", "folder\udcff/m.onnx"])
def test_a_name_that_native_code_cannot_be_given_is_said_to_be_one(tmp_path: Path, place: str) -> None:
    path = tmp_path / place
    path.parent.mkdir(exist_ok=True)
    write_onnx(small_model(), path)
    with pytest.raises(ArtifactError, match=r"^cannot use [^\ud800-\udfff]+: ONNX needs a name in UTF-8"):
        read_onnx(path)
    with pytest.raises(ArtifactError, match=r"^cannot use [^\ud800-\udfff]+: ONNX needs a name in UTF-8"):
        check_engine_folder(path.with_suffix(""), force=False)


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ArtifactError, match="cannot write"):
        write_onnx(small_model(), tmp_path / "file" / "m.onnx")
    target = tmp_path / "m.onnx"
    target.mkdir()  # os.replace of a file over a folder fails after the scratch file was written
    with pytest.raises(ArtifactError, match="cannot write"):
        write_onnx(small_model(), target)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "m.onnx"]


def test_first_line_is_that_of_the_root_cause() -> None:
    try:
        try:
            raise ValueError("\x1b[96mthe cause.\x1b[0m\nwith details")
        except ValueError as exc:
            raise RuntimeError("in general words") from exc
    except RuntimeError as error:
        assert first_line(error) == "the cause"
    assert first_line(KeyError()) == "KeyError"
