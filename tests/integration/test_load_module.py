"""Modules a user has in Python: SMP models, subclasses, wrappers, networks of their own. Oracle: the module itself."""

from __future__ import annotations

import copy
import threading
from collections import OrderedDict
from typing import Any

import pytest

from edgeseg.errors import CheckpointError, SpecError
from edgeseg.spec import IMAGENET_MEAN, ModelRequest

torch = pytest.importorskip("torch")
from torch.nn.utils import prune  # noqa: E402

from edgeseg.convert.architectures import import_smp  # noqa: E402  these need torch
from edgeseg.convert.load import load_model, wrap_module  # noqa: E402
from edgeseg.silence import without_warnings  # noqa: E402  these need torch

smp = import_smp()
nn = torch.nn
pytestmark = pytest.mark.integration

ENCODER = "mobilenet_v2"
NOTHING = ModelRequest()


def fpn(**fields: Any) -> Any:
    torch.manual_seed(0)
    return smp.FPN(ENCODER, encoder_weights=None, **{"classes": 4, **fields}).eval()


def output(module: Any, channels: int = 3, height: int = 64, width: int = 96) -> Any:
    image = torch.rand(1, channels, height, width, generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), without_warnings():
        return module(image)


class Wrapper(nn.Module):  # type: ignore[misc, name-defined]
    """What people write around a model to train it."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("mean", torch.tensor([0.4, 0.5, 0.6]).view(1, 3, 1, 1))
        self.register_buffer("std", torch.full((1, 3, 1, 1), 0.25))

    def forward(self, image: Any) -> Any:
        return self.model(image)


class Normalizing(Wrapper):
    def forward(self, image: Any) -> Any:
        return self.model((image - self.mean) / self.std)


class Squashing(Wrapper):
    def forward(self, image: Any) -> Any:
        return torch.sigmoid(self.model(image))


class Labelled(nn.Module):  # type: ignore[misc, name-defined]
    """A network that is not SMP's, with a second output."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.body = nn.Conv2d(3, 5, 4, stride=4)
        self.head = nn.ConvTranspose2d(5, 5, 4, stride=4)
        self.form = form

    def forward(self, x: Any) -> Any:
        features = self.body(x)
        masks, labels = self.head(features), features.mean((2, 3))
        if self.form == "tuple":
            return masks, labels
        return OrderedDict(aux=labels, out=masks)


@pytest.mark.parametrize("arch", ["unet", "pan", "dpt", "pspnet"])
def test_an_smp_model_describes_itself(arch: str) -> None:
    small = {"decoder_intermediate_channels": (16, 16, 16, 16), "decoder_fusion_channels": 16, "dynamic_img_size": True}
    with without_warnings():
        model = smp.create_model(
            arch,
            "tu-vit_tiny_patch16_224" if arch == "dpt" else ENCODER,
            encoder_weights=None,
            classes=4,
            activation="softmax",
            **(small if arch == "dpt" else {}),
        ).eval()
    wrapped = wrap_module(model, NOTHING)
    built = load_model(
        ModelRequest(
            arch=arch,
            encoder=wrapped.model.encoder,
            classes=4,
            activation="softmax",
            weights="random",
            model_args=wrapped.model.model_args,
        )
    )
    assert wrapped.model == built.model
    assert (wrapped.stride, wrapped.size, wrapped.fixed_size) == (built.stride, built.size, built.fixed_size)
    assert wrapped.preprocess == built.preprocess
    side = 160 if arch == "pan" else 64
    assert torch.allclose(output(wrapped.module, 3, side, side), output(model, 3, side, side), atol=1e-6)


def test_the_users_module_is_left_as_it_was() -> None:
    model = fpn(aux_params={"classes": 2}).train()
    twin = copy.deepcopy(model.state_dict())
    wrapped = wrap_module(model, NOTHING)
    assert model.training
    assert model.classification_head is not None
    assert all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(v, twin[k]) for k, v in model.state_dict().items())
    assert not wrapped.module.training
    assert wrapped.module is not model


def test_an_auxiliary_head_is_dropped_unless_kept() -> None:
    model = fpn(aux_params={"classes": 2})
    dropped = wrap_module(model, NOTHING)
    assert torch.equal(output(dropped.module), output(model)[0])
    assert any("auxiliary classification head dropped" in n for n in dropped.notes)
    kept = output(wrap_module(model, ModelRequest(keep_aux=True)).module)
    assert torch.equal(kept[1], output(model)[1])
    with pytest.raises(SpecError, match="no auxiliary head to keep"):
        wrap_module(fpn(), ModelRequest(keep_aux=True))


def test_a_wrapper_that_adds_nothing_is_looked_through() -> None:
    model = fpn()
    wrapped = wrap_module(Wrapper(model), NOTHING)
    assert (wrapped.model.arch, wrapped.model.encoder, wrapped.stride) == ("fpn", ENCODER, 32)
    assert wrapped.preprocess.mean == IMAGENET_MEAN
    assert torch.equal(output(wrapped.module), output(model))
    assert wrapped.weights_sha256 == wrap_module(model, NOTHING).weights_sha256


def test_normalization_inside_a_wrapper_becomes_preprocessing() -> None:
    wrapper = Normalizing(fpn()).eval()
    wrapped = wrap_module(wrapper, NOTHING)
    assert wrapped.model.arch == "fpn"
    assert wrapped.preprocess.mean == pytest.approx((0.4, 0.5, 0.6))
    assert wrapped.preprocess.std == (0.25, 0.25, 0.25)
    pixels = torch.randint(0, 256, (1, 3, 64, 96), generator=torch.Generator().manual_seed(2)).float()
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (wrapped.preprocess.mean, wrapped.preprocess.std))
    with torch.no_grad():
        mine = wrapped.module((pixels * wrapped.preprocess.scale - mean) / std)
        assert torch.allclose(mine, wrapper(pixels / 255), atol=1e-4)


def test_a_wrapper_that_does_more_is_converted_as_a_whole() -> None:
    wrapper = Squashing(fpn()).eval()
    wrapped = wrap_module(wrapper, ModelRequest(task="multilabel"))
    assert (wrapped.model.arch, wrapped.model.encoder) == ("custom", ENCODER)
    assert (wrapped.model.activation, wrapped.model.task, wrapped.stride) == ("sigmoid", "multilabel", 32)
    assert torch.equal(output(wrapped.module), output(wrapper))
    assert any("Squashing does more than its network .model" in n for n in wrapped.notes)
    assert wrap_module(wrapper, ModelRequest(activation="none")).model.activation is None


def resized(model: Any, x: Any) -> Any:
    """What people write to run any size; 256x256 images pass through it as they are."""
    small = nn.functional.interpolate(x, (256, 256), mode="bilinear")
    return nn.functional.interpolate(model(small), x.shape[2:], mode="bilinear")


def padded(model: Any, x: Any) -> Any:
    height, width = x.shape[2:]
    return model(nn.functional.pad(x, (0, -width % 32, 0, -height % 32)))[..., :height, :width]


def enlarged(model: Any, x: Any) -> Any:
    if min(x.shape[2:]) > 64:
        return model(x)
    return nn.functional.interpolate(model(nn.functional.interpolate(x, scale_factor=2)), x.shape[2:])


class Around(nn.Module):  # type: ignore[misc, name-defined]
    def __init__(self, model: Any, function: Any) -> None:
        super().__init__()
        self.model, self.function = model, function

    def forward(self, x: Any) -> Any:
        return self.function(self.model, x)


@pytest.mark.parametrize(
    ("arch", "function", "size"), [("unet", resized, (64, 96)), ("fpn", padded, (50, 70)), ("fpn", enlarged, (64, 96))]
)
def test_a_wrapper_that_resizes_or_pads_takes_part(arch: str, function: Any, size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    wrapper = Around(smp.create_model(arch, ENCODER, encoder_weights=None, classes=4), function).eval()
    wrapped = wrap_module(wrapper, NOTHING, size=size)
    wrapped.check_size(*size)
    assert torch.allclose(output(wrapped.module, 3, *size), output(wrapper, 3, *size), atol=1e-5)


def test_what_is_said_is_done_before_a_wrapper_that_normalizes() -> None:
    wrapper = Normalizing(fpn()).eval()
    wrapped = wrap_module(wrapper, ModelRequest(mean=(0.0,), std=(1.0,)))
    assert wrapped.preprocess.mean == (0.0, 0.0, 0.0)
    assert torch.allclose(output(wrapped.module), output(wrapper), atol=1e-5)


@pytest.mark.parametrize(
    ("make", "said", "channels"),
    [
        (lambda: nn.Sequential(nn.Conv2d(4, 3, 1), fpn()), {}, 4),
        (lambda: Around(fpn(), lambda model, x: model(x.expand(-1, 3, -1, -1))), {"in_channels": 1}, 1),
        (lambda: Around(fpn(), lambda model, x: model(x[:, :3])), {"in_channels": 5}, 5),
    ],
    ids=["convolution before", "gray", "some of"],
)
def test_a_wrapper_takes_other_channels_than_its_network(make: Any, said: dict[str, Any], channels: int) -> None:
    wrapper = make().eval()
    wrapped = wrap_module(wrapper, ModelRequest(mean=(0.5,), std=(0.5,), **said))
    assert wrapped.model.in_channels == channels
    assert torch.allclose(output(wrapped.module, channels), output(wrapper, channels), atol=1e-5)


class Gated(nn.Module):  # type: ignore[misc, name-defined]
    """Ends in logits, though its last layer is a sigmoid."""

    def __init__(self) -> None:
        super().__init__()
        self.scores = nn.Conv2d(128, 3, 1)
        self.gate = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Sigmoid())

    def forward(self, x: Any) -> Any:
        x = nn.functional.interpolate(self.scores(x), scale_factor=4)
        return 9.0 * x * self.gate(x)


@pytest.mark.parametrize(
    ("head", "classes"),
    [
        (Gated, 3),
        (lambda: nn.Sequential(nn.Conv2d(128, 48, 1), nn.PixelShuffle(4)), 3),
        (lambda: nn.ConvTranspose2d(128, 2, 4, stride=4), 2),
    ],
    ids=["gate", "pixel shuffle", "transposed"],
)
def test_a_head_of_the_users_is_what_it_returns(head: Any, classes: int) -> None:
    model = fpn()
    model.segmentation_head = head()
    wrapped = wrap_module(model.eval(), NOTHING)
    assert (wrapped.model.arch, wrapped.model.encoder, wrapped.model.task) == ("fpn", ENCODER, "multiclass")
    assert (wrapped.model.classes, wrapped.model.activation) == (classes, None)
    assert torch.equal(output(wrapped.module), output(model))


def test_a_gate_behind_smps_head_is_no_activation() -> None:
    class Gate(nn.Sequential):  # type: ignore[misc, name-defined]
        def forward(self, x: Any) -> Any:
            return 9.0 * x * super().forward(x)

    model = fpn()
    model.segmentation_head.append(Gate(nn.Conv2d(4, 4, 1), nn.Sigmoid()))
    assert wrap_module(model, NOTHING).model.activation is None
    assert wrap_module(fpn(activation="sigmoid"), NOTHING).model.activation == "sigmoid"


def test_a_function_on_the_object_that_runs_it_in_training_mode_is_refused() -> None:
    model = fpn().train()
    before = copy.deepcopy(model.state_dict())
    own = model.forward
    model.forward = lambda x: 2.0 * own(x)
    with pytest.raises(SpecError, match=r"runs the object itself.*training mode: call its eval\(\) first"):
        wrap_module(model, NOTHING)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    model.eval()
    assert torch.allclose(output(wrap_module(model, NOTHING).module), output(model), atol=1e-5)


def test_the_encoder_weights_training_started_from_decide_the_preprocessing() -> None:
    model = smp.Unet("efficientnet-b0", encoder_weights=None)
    assert wrap_module(model, NOTHING).preprocess.mean == IMAGENET_MEAN
    model.config["encoder_weights"] = "advprop"
    assert wrap_module(model, NOTHING).preprocess.mean == (0.5, 0.5, 0.5)


def test_parallel_and_compiled_modules_are_looked_through() -> None:
    model = fpn()
    assert wrap_module(nn.DataParallel(model), NOTHING).model.arch == "fpn"
    compiled = torch.compile(model, backend="eager")
    assert wrap_module(compiled, NOTHING).model.arch == "fpn"
    for part in (nn.DataParallel, lambda encoder: torch.compile(encoder, backend="eager")):
        inside = fpn()
        inside.encoder = part(inside.encoder)
        wrapped = wrap_module(inside, NOTHING)
        assert (wrapped.model.arch, wrapped.stride) == ("fpn", 32)
        assert torch.equal(output(wrapped.module), output(model))
        assert inside.encoder is not wrapped.module.encoder


@pytest.mark.parametrize("form", ["tuple", "mapping"])
def test_the_map_is_found_among_several_outputs(form: str) -> None:
    module = Labelled(form).eval()
    expected = output(module)
    expected = expected[0] if form == "tuple" else expected["out"]
    wrapped = wrap_module(module, NOTHING)
    assert torch.equal(output(wrapped.module), expected)
    assert (wrapped.model.arch, wrapped.model.encoder, wrapped.model.classes) == ("custom", "Labelled", 5)
    assert wrapped.stride == 4
    assert any("dropped" in n for n in wrapped.notes)
    if form == "tuple":
        both = output(wrap_module(module, ModelRequest(keep_aux=True)).module)
        assert torch.equal(both[1], output(module)[1])


@pytest.mark.parametrize("others", [(0,), ("loss", "features")])
def test_outputs_that_are_no_map_of_the_images_size_are_passed_over(others: tuple[Any, ...]) -> None:
    net = nn.Conv2d(3, 5, 3, padding=1)

    class Several(nn.Module):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Any) -> Any:
            masks = self.net(x)
            small = nn.functional.avg_pool2d(masks, 4)
            return [small, masks] if others == (0,) else {"loss": masks.mean(), "features": small, "seg": masks}

    wrapped = wrap_module(Several(), NOTHING)
    assert torch.equal(output(wrapped.module), output(net))
    assert any(("number 2 of" if others == (0,) else "output 'seg'") in note for note in wrapped.notes)


@pytest.mark.parametrize("stride", [1, 2, 8, 32])
def test_the_size_multiple_of_any_network_is_found(stride: int) -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, stride, stride), nn.ConvTranspose2d(4, 2, stride, stride))
    wrapped = wrap_module(module, NOTHING)
    assert wrapped.stride == stride
    assert wrapped.model.classes == 2
    assert any("nothing is known about the normalization" in n for n in wrapped.notes)


def test_input_channels_and_softmax_are_found() -> None:
    module = nn.Sequential(nn.Conv2d(5, 3, 1), nn.Softmax(dim=1))
    wrapped = wrap_module(module, ModelRequest(mean=(0.5,), std=(0.5,)))
    assert (wrapped.model.in_channels, wrapped.model.activation, wrapped.model.task) == (5, "softmax", "multiclass")
    assert len(wrapped.preprocess.mean) == 5


@pytest.mark.parametrize(
    "reparametrize",
    [
        torch.nn.utils.weight_norm,
        torch.nn.utils.spectral_norm,
        lambda part: prune.random_structured(prune.l1_unstructured(part, "weight", 0.5), "weight", 0.2, dim=0),
    ],
    ids=["weight norm", "spectral norm", "pruned twice"],
)
def test_weights_that_hooks_compute_are_kept_as_they_are(reparametrize: Any) -> None:
    model = fpn()
    with without_warnings():
        reparametrize(model.segmentation_head[0])
    expected = output(model)
    wrapped = wrap_module(model, NOTHING)
    assert torch.allclose(output(wrapped.module), expected, atol=1e-5)
    assert not [name for name in wrapped.module.state_dict() if name.endswith(("_orig", "_mask", "_g", "_v"))]
    assert torch.equal(output(model), expected)


def test_an_encoder_of_one_size_is_run_at_it() -> None:
    small = {"decoder_intermediate_channels": (8, 8, 8, 8), "decoder_fusion_channels": 8, "img_size": (64, 96)}
    with without_warnings():
        model = smp.DPT("tu-vit_tiny_patch16_224", encoder_weights=None, classes=3, **small).eval()
    mirror = Around(model, lambda net, x: net(x.flip(3)).flip(3))
    for module, arch in ((model, "dpt"), (Wrapper(model), "dpt"), (mirror, "custom")):
        wrapped = wrap_module(module, NOTHING)
        assert (wrapped.model.arch, wrapped.size, wrapped.fixed_size) == (arch, (64, 96), (64, 96))
        assert torch.allclose(output(wrapped.module), output(module), atol=1e-6)


def test_a_module_of_one_size_is_built_for_the_size_asked_for() -> None:
    def only(net: Any, x: Any) -> Any:
        assert x.shape[2:] == (96, 160)
        return net(x)

    module = Around(nn.Conv2d(3, 2, 1), only)
    wrapped = wrap_module(module, NOTHING, size=(96, 160))
    assert (wrapped.size, wrapped.fixed_size) == ((96, 160), (96, 160))
    for asked in (None, (64, 160)):
        with pytest.raises(SpecError, match="takes one size only, give --size"):
            wrap_module(module, NOTHING, size=asked)
    assert wrap_module(nn.Conv2d(3, 2, 1), NOTHING, size=(96, 160)).fixed_size is None


def test_half_precision_modules_become_float() -> None:
    wrapped = wrap_module(fpn().half(), NOTHING)
    assert all(p.dtype == torch.float32 for p in wrapped.module.parameters())


class Argmax(nn.Module):  # type: ignore[misc, name-defined]
    def forward(self, x: Any) -> Any:
        return x.argmax(1, keepdim=True)


class Locked(nn.Module):  # type: ignore[misc, name-defined]
    """Holds something that cannot be copied, as trainers do."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Conv2d(3, 2, 1)
        self.lock = threading.Lock()


def nan_model() -> Any:
    module = nn.Conv2d(3, 2, 1)
    module.weight.data[0] = float("nan")
    return module


@pytest.mark.parametrize(
    ("make", "request_", "message"),
    [
        (lambda: "model.pt", NOTHING, r"model is a str; give a torch\.nn\.Module"),
        (fpn, ModelRequest(weights="x.pt"), "load the weights into the module first"),
        (fpn, ModelRequest(model_args={"a": 1}), "load the weights into the module first"),
        (fpn, ModelRequest(arch="unet"), "arch 'unet' was given, but the module is a fpn; leave arch out"),
        (fpn, ModelRequest(encoder="resnet18"), "the module's is mobilenet_v2; leave encoder out"),
        (fpn, ModelRequest(classes=9), "9 classes were asked for, the module returns 4"),
        (
            fpn,
            ModelRequest(class_names=("a", "b")),
            "2 class names for 4 classes",
        ),
        (fpn, ModelRequest(in_channels=1), "in_channels 1 was given, the module takes 3"),
        (lambda: nn.Conv2d(3, 2, 1), ModelRequest(arch="fpn"), "but the module is no SMP model; leave arch out"),
        (Argmax, NOTHING, r"returns int64 \(1, 1, .*before argmax"),
        (lambda: nn.Conv2d(3, 2, 3, stride=2), NOTHING, r"returns \(1, 2, 127, 127\) for 256x256"),
        (lambda: nn.Conv2d(3, 2, 1, device="meta"), NOTHING, r"Conv2d is on the meta device .*weight"),
        (lambda: Around(nn.Conv2d(3, 2, 1), lambda net, x: net(x).bfloat16()), NOTHING, "Around computes in bfloat16"),
        (lambda: nn.Linear(7, 3), NOTHING, "Linear does not run on images of 3 channels"),
        (Locked, NOTHING, r"Locked cannot be copied .* such as module\.model"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(make: Any, request_: ModelRequest, message: str) -> None:
    with pytest.raises(SpecError, match=message) as caught:
        wrap_module(make(), request_)
    assert "\n" not in str(caught.value)


def test_weights_that_are_not_finite_are_refused() -> None:
    with pytest.raises(CheckpointError, match=r"the Conv2d module has NaN or Inf in 1 tensor \(weight\)"):
        wrap_module(nan_model(), NOTHING)
