"""Graphs of modules a user has in Python: each computes what its own module computes, whatever was built before it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeseg.progress import SilentReporter
from edgeseg.spec import InputSpec, ModelRequest, OutputSpec, PipelineSpec

torch = pytest.importorskip("torch")
import onnxruntime  # noqa: E402

from edgeseg.convert.architectures import import_smp  # noqa: E402  these need torch
from edgeseg.convert.load import wrap_module  # noqa: E402
from edgeseg.convert.loaded import hash_structure  # noqa: E402
from edgeseg.pipeline import export_stage  # noqa: E402

smp = import_smp()
nn = torch.nn
pytestmark = pytest.mark.integration

SIZE = (32, 32)
IMAGE = np.random.default_rng(0).integers(0, 256, (1, *SIZE, 3), dtype=np.uint8)
PLAIN = {"mean": (0.0,), "std": (1.0,)}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGESEG_CACHE", str(tmp_path / "cache"))


def tiny(classes: int = 3) -> Any:
    """A network without SMP in which every class wins somewhere."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, classes, 1)).eval()


def graph_outputs(module: Any, folder: Path, kind: str = "logits", **request: Any) -> dict[str, Any]:
    """What the exported graph of ``module`` returns for :data:`IMAGE`."""
    loaded = wrap_module(module, ModelRequest(**{**PLAIN, **request}))
    spec = PipelineSpec(
        loaded.model,
        InputSpec(*SIZE, channels=loaded.model.in_channels, stride=loaded.stride),
        loaded.preprocess,
        OutputSpec(kind),  # type: ignore[arg-type]
    )
    folder.mkdir()
    graph, _ = export_stage(loaded, spec, folder, SilentReporter())
    session = onnxruntime.InferenceSession(str(graph.path), providers=["CPUExecutionProvider"])
    return dict(zip([o.name for o in session.get_outputs()], session.run(None, {"image": IMAGE}), strict=True))


def torch_output(module: Any) -> Any:
    with torch.no_grad():
        return module(torch.from_numpy(IMAGE).permute(0, 3, 1, 2).float() / 255.0).numpy()


class Scaled(nn.Module):  # type: ignore[misc, name-defined]
    """A wrapper whose attribute the user edits between two builds; no tensor of it changes."""

    def __init__(self, net: Any, factor: float) -> None:
        super().__init__()
        self.net = net
        self.factor = factor

    def forward(self, x: Any) -> Any:
        return self.net(x) * self.factor


def test_a_module_never_gets_the_graph_of_another_with_the_same_weights(tmp_path: Path) -> None:
    net = tiny()
    other_eps = tiny()
    other_eps[1].eps = 0.5
    leaky = tiny()
    leaky[2] = nn.LeakyReLU(0.3)
    modules = (Scaled(net, 2.0), Scaled(net, -2.0), net, other_eps, leaky)
    for number, module in enumerate(modules):
        logits = graph_outputs(module.eval(), tmp_path / str(number))["logits"]
        np.testing.assert_allclose(logits, torch_output(module), atol=1e-4)


def test_structure_is_more_than_weights() -> None:
    def unet(**arguments: Any) -> Any:
        torch.manual_seed(0)
        return smp.Unet("resnet18", encoder_weights=None, **arguments)

    dilated = unet()
    dilated.decoder.blocks[0].conv1[0].dilation = (2, 2)
    leaky = unet()
    leaky.decoder.blocks[0].conv1[2] = nn.LeakyReLU(0.3)
    same = hash_structure(unet())
    assert hash_structure(unet()) == same
    assert len({same, hash_structure(dilated), hash_structure(leaky)}) == 3
