"""Graphs of modules a user has in Python: each computes what its own module computes, whatever was built before it."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeseg.errors import EdgesegError, ExportError, SpecError
from edgeseg.progress import SilentReporter
from edgeseg.spec import InputSpec, ModelRequest, OutputSpec, PipelineSpec

torch = pytest.importorskip("torch")
import onnxruntime  # noqa: E402

from edgeseg.convert.architectures import import_smp  # noqa: E402  these need torch
from edgeseg.convert.load import wrap_module  # noqa: E402
from edgeseg.convert.loaded import hash_structure  # noqa: E402
from edgeseg.pipeline.stages import export_stage  # noqa: E402

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


def headed(classes: int) -> Any:
    """The same with SMP's head, which ends in an ``Activation`` that does nothing."""
    return nn.Sequential(*tiny()[:3], smp.base.SegmentationHead(8, classes)).eval()


def graph_outputs(module: Any, folder: Path, kind: str = "logits", image: Any = None, **request: Any) -> dict[str, Any]:
    """What the exported graph of ``module`` returns for :data:`IMAGE`."""
    loaded = wrap_module(module, ModelRequest(**{**PLAIN, **request}))
    spec = PipelineSpec(
        loaded.model,
        InputSpec(*SIZE, **{"channels": loaded.model.in_channels, "stride": loaded.stride, **(image or {})}),
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


def test_an_epsilon_is_not_taken_for_nothing(tmp_path: Path) -> None:
    """torch's exporter leaves terms of up to 1e-8 out: where an image is 0, 0 / 0 remained. With each of these alone."""

    def normed(x: Any) -> Any:
        total, double = x.sum(1, keepdim=True), torch.tensor(1e-9, dtype=torch.float64)
        root = torch.sqrt(x.pow(2).mean(1, keepdim=True) + 1e-12)
        divisors = (total + 1e-8, 1e-10 + total, total + double, -total - 1e-9, root)
        return sum(x / divisor for divisor in divisors)

    net = tiny()
    net[0].bias.data -= 0.6
    module = nn.Sequential(*net[:3], Ending(nn.Identity(), normed), net[3]).eval()
    with torch.no_grad():
        seen = net[:3](torch.from_numpy(IMAGE).permute(0, 3, 1, 2).float() / 255.0).sum(1)
    assert 0.01 < (seen == 0).float().mean() < 0.99
    expected = torch_output(module)
    logits = graph_outputs(module, tmp_path / "e")["logits"]
    np.testing.assert_allclose(logits, expected, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x / (x.amax() - x.amin()),
        lambda x: x.clamp(0, 0.5),
        lambda x: (x + 0).clamp_(min=-0.25, max=1),
        nn.RReLU(0.1, 0.5),
    ],
    ids=["amax", "clamp", "clamp_", "rrelu"],
)
def test_what_the_exporter_refuses_of_torch(tmp_path: Path, function: Any) -> None:
    net = tiny()
    module = nn.Sequential(*net[:2], Ending(nn.Identity(), function), net[3]).eval()
    np.testing.assert_allclose(graph_outputs(module, tmp_path / "e")["logits"], torch_output(module), atol=1e-5)


def test_what_cannot_be_exported_is_named(tmp_path: Path) -> None:
    net = tiny()
    middle = Ending(nn.Identity(), lambda x: x - x.median(1, keepdim=True).values)
    with pytest.raises(
        ExportError, match=r"cannot export custom-Sequential: write aten\.median\.dim in \.2 with other"
    ) as caught:
        graph_outputs(nn.Sequential(*net[:2], middle, net[3]).eval(), tmp_path / "e")
    assert "\n" not in str(caught.value)


def test_a_size_that_torch_fixes_is_refused(tmp_path: Path) -> None:
    net = tiny()
    middle = Ending(nn.Identity(), lambda x: x + torch.linspace(0, 8, x.shape[3])[1])
    module = nn.Sequential(*net[:2], middle, net[3]).eval()
    with pytest.raises(ExportError, match=r"can only be exported for 32x32: .* without --dynamic-size"):
        graph_outputs(module, tmp_path / "e", image={"dynamic_size": True, "stride": 8})


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


class Ending(nn.Module):  # type: ignore[misc, name-defined]
    """What people put behind a network, outside SMP's head."""

    def __init__(self, net: Any, function: Any) -> None:
        super().__init__()
        self.net = net
        self.function = function

    def forward(self, x: Any) -> Any:
        return self.function(self.net(x))


def softmax(x: Any) -> Any:
    return torch.softmax(x, 1)


@pytest.mark.parametrize(
    ("classes", "function", "activation"),
    [
        (1, torch.sigmoid, "sigmoid"),
        (3, softmax, "softmax"),
        (3, nn.Softmax2d(), "softmax"),
        (3, lambda x: torch.log_softmax(x, 1), "logsoftmax"),
        (3, lambda x: x.exp() / x.exp().sum(1, keepdim=True), "softmax"),
        (1, lambda x: torch.sigmoid(x)[:, :, :].contiguous(), "sigmoid"),
        (1, torch.tanh, "tanh"),
    ],
)
def test_what_a_module_ends_in_is_recognized(classes: int, function: Any, activation: str) -> None:
    loaded = wrap_module(Ending(tiny(classes), function).eval(), ModelRequest(**PLAIN))
    assert loaded.model.activation == activation
    assert any(activation in note for note in loaded.notes)


@pytest.mark.parametrize(("kind", "classes"), [("mask", 1), ("probabilities", 1), ("probabilities", 3)])
def test_probabilities_outside_smps_head_are_not_squashed_again(tmp_path: Path, kind: str, classes: int) -> None:
    module = nn.Sequential(headed(classes), nn.Sigmoid() if classes == 1 else nn.Softmax2d()).eval()
    expected = torch_output(module)
    got = graph_outputs(module, tmp_path / "e", kind)[kind]
    if kind == "mask":
        sure = np.abs(expected[:, 0] - 0.5) > 1e-4
        assert 0.01 < (expected > 0.5).mean() < 0.99, "a mask of one value proves nothing"
        np.testing.assert_array_equal(got[sure], (expected[:, 0] > 0.5)[sure])
    else:
        np.testing.assert_allclose(got, expected, atol=1e-4)


def test_logits_of_a_module_that_returns_probabilities_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="logits were asked for, but the module returns the result of sigmoid"):
        graph_outputs(nn.Sequential(headed(1), nn.Sigmoid()).eval(), tmp_path / "e", "logits")


def test_values_in_0_to_1_that_nothing_explains_are_not_guessed_about() -> None:
    module = Ending(tiny(1), lambda x: 1 / (1 + torch.exp(-x))).eval()
    with pytest.raises(SpecError, match=r"returns values from 0\.\d+ to .* say activation='sigmoid' or 'softmax'"):
        wrap_module(module, ModelRequest(**PLAIN))
    assert wrap_module(module, ModelRequest(**PLAIN, activation="sigmoid")).model.activation == "sigmoid"
    with pytest.raises(SpecError, match=r"activation 'sigmoid' was given, but the module returns values from -"):
        wrap_module(tiny(1), ModelRequest(**PLAIN, activation="sigmoid"))


@pytest.mark.parametrize(
    "function",
    [
        lambda x: 255 * torch.sigmoid(x),
        lambda x: 2 * torch.sigmoid(x) - 1,
        lambda x: 50 * (torch.sigmoid(x) + torch.sigmoid(-2 * x)),
        lambda x: -9 * torch.log(torch.sigmoid(x)),
        nn.functional.logsigmoid,
    ],
)
def test_what_is_computed_from_an_activation_is_not_taken_for_logits(function: Any) -> None:
    module = Ending(tiny(1), function).eval()
    with pytest.raises(SpecError, match=r"computed from the result of an activation, .* say activation='none'"):
        wrap_module(module, ModelRequest(**PLAIN))
    assert wrap_module(module, ModelRequest(**PLAIN, activation="none")).model.activation is None


@pytest.mark.parametrize("kind", [torch.float64, torch.float16])
def test_logits_of_another_type_become_float32(kind: Any, tmp_path: Path) -> None:
    class Cast(Scaled):
        def forward(self, x: Any) -> Any:
            return self.net(x).to(kind)

    module = Cast(tiny(), 1.0).eval()
    logits = graph_outputs(module, tmp_path / "a")["logits"]
    assert logits.dtype == np.float32
    np.testing.assert_allclose(logits, torch_output(module), atol=1e-2)


@pytest.mark.parametrize("function", [lambda x: x * torch.sigmoid(x), lambda x: 3 * x - 1, nn.functional.silu])
def test_a_gate_is_no_activation(function: Any) -> None:
    assert wrap_module(Ending(tiny(1), function).eval(), ModelRequest(**PLAIN)).model.activation is None


class Dark(nn.Module):  # type: ignore[misc, name-defined]
    """Turns the classes over for dark images only: one bright image shows nothing of it."""

    def __init__(self, net: Any) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Any) -> Any:
        return -self.net(x) if x.mean() < -1e6 else self.net(x)


def test_a_branch_that_depends_on_the_image_is_refused_and_not_thrown_away(tmp_path: Path) -> None:
    net = smp.Unet("resnet18", encoder_weights=None, classes=3, decoder_channels=(32, 16, 8, 8, 8))
    with pytest.raises(EdgesegError, match="its forward decides by the values of the image"):
        graph_outputs(Dark(net).eval(), tmp_path / "e")
    with pytest.raises(EdgesegError, match="its forward decides by the values of the image"):
        graph_outputs(Dark(tiny()).eval(), tmp_path / "f")


class Sub(smp.Unet):  # type: ignore[misc, name-defined]
    """An SMP model whose forward is the user's."""

    def __init__(self, form: str) -> None:
        super().__init__("resnet18", encoder_weights=None, classes=3, decoder_channels=(32, 16, 8, 8, 8))
        self.form = form

    def forward(self, x: Any) -> Any:
        output = super().forward(x)
        forms = {"dict": {"out": output}, "list": [output], "fewer": output[:, 1:], "labels": output.argmax(1)}
        return forms[self.form]


def test_a_subclass_is_what_its_forward_returns() -> None:
    for form, classes in (("dict", 3), ("list", 3), ("fewer", 2)):
        module = Sub(form).eval()
        loaded = wrap_module(module, ModelRequest(**PLAIN))
        assert (loaded.model.arch, loaded.model.classes) == ("unet", classes)
        image = torch.rand(1, 3, 64, 64)
        with torch.no_grad():
            output = module(image)
            output = output["out"] if form == "dict" else output[0] if form == "list" else output
            assert torch.equal(loaded.module(image), output)
    with pytest.raises(SpecError, match=r"Sub returns int64 \(1, 64, 64\); it must return floats .* before argmax"):
        wrap_module(Sub("labels").eval(), ModelRequest(**PLAIN))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("stem", nn.Sequential(nn.Conv2d(3, 8, 3))),
        ("end", nn.Conv2d(8, 3, 1)),
        ("image_shape", (64, 64)),
        ("graph", {"nodes": 3}),
        ("encoder", "resnet18"),
    ],
)
def test_what_a_user_calls_the_parts_means_nothing(tmp_path: Path, name: str, value: Any) -> None:
    module = Scaled(tiny(), 2.0).eval()
    setattr(module, name, value)
    assert wrap_module(module, ModelRequest(**PLAIN)).model.display_name == "custom-Scaled"
    np.testing.assert_allclose(graph_outputs(module, tmp_path / "f")["logits"], torch_output(module), atol=1e-4)


class Indexed(nn.Module):  # type: ignore[misc, name-defined]
    """Makes a channel of those of the image, as a vegetation index is of bands, and gives all to the network."""

    def __init__(self, net: Any) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Any) -> Any:
        return self.net(torch.cat([x, x.mean(1, keepdim=True)], 1))


@pytest.mark.parametrize("is_smp", [True, False])
def test_in_channels_is_of_the_image_where_a_wrapper_makes_more(tmp_path: Path, is_smp: bool) -> None:
    torch.manual_seed(0)
    small: dict[str, Any] = {"encoder_weights": None, "encoder_depth": 3, "decoder_channels": (16, 8, 8), "classes": 3}
    net = smp.Unet("resnet18", in_channels=4, **small) if is_smp else nn.Conv2d(4, 3, 3, padding=1)
    module = Indexed(net).eval()
    outputs = graph_outputs(module, tmp_path / "f", in_channels=3)
    np.testing.assert_allclose(outputs["logits"], torch_output(module), atol=1e-3)
    with pytest.raises(SpecError, match="does not run on images of 4 channels.*in_channels says how many"):
        wrap_module(module, ModelRequest(**PLAIN))


def test_torchscript_is_refused_with_what_to_give_instead() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        traced = torch.jit.trace(tiny(), torch.rand(1, 3, 32, 32))
    for module in (traced, nn.Sequential(traced, nn.Identity())):
        with pytest.raises(SpecError, match=r"TorchScript, which keeps no Python; give the torch\.nn\.Module"):
            wrap_module(module, ModelRequest(**PLAIN))
