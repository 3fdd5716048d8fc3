"""Networks that SMP 0.4 and older built otherwise from tensors of the same names and shapes.

Found by giving one state dict to SMP 0.1.0, 0.1.2, 0.1.3, 0.2.1, 0.3.4, 0.4.0, 0.5.0 and 0.6.0, every architecture and
encoder family, and comparing the outputs. Three places differ:

- SMP 0.5 replaced its own ``timm-mobilenetv3``, ``timm-regnet`` and ``timm-gernet`` encoders by timm's. Where an
  architecture dilates its encoder, the old ones set stride 1 and the stage's dilation on every convolution of a stage;
  timm gives the first block of a dilated stage the dilation of the stage before, and leaves 1x1 convolutions alone.
- UPerNet has another decoder since 0.5.
- SMP 0.1.0 (none after it) fed the last stage of its ``xception`` encoder with what ``block10`` returns, not ``block11``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from edgeseg.errors import CheckpointError, SpecError

if TYPE_CHECKING:
    import torch

DILATING = ("deeplabv3", "deeplabv3plus", "pan")
ARGUMENT = "smp_version"
OLD, NEW, FIRST = "0.4", "0.5", "0.1.0"

_OLD_OWN_ENCODERS = ("timm-mobilenetv3", "timm-regnet", "timm-gernet")
_DEFAULT_OUTPUT_STRIDE = {"deeplabv3": 8, "deeplabv3plus": 16, "pan": 16}

# Constructor arguments that came with a version. save_pretrained writes every argument, those left at their default
# too, so a config without one was written by an older version.
_ARGUMENT_SINCE_0_5 = {"pan": "decoder_interpolation"}
_ARGUMENT_SINCE_0_4 = {"deeplabv3": "encoder_output_stride", "deeplabv3plus": "decoder_aspp_separable"}


def is_old(version: object) -> bool:
    """Whether a version such as ``"0.3.4"`` or ``0.4`` is one before 0.5. Raises ``SpecError`` if it is no version."""
    text = str(version)
    numbers = re.fullmatch(r"v?(\d{1,4})\.(\d{1,4})(\.\w{1,20}){0,2}", text)
    if numbers is None:
        raise SpecError(f"{ARGUMENT} is {text[:40]!r}; give the version of SMP that trained the weights, such as 0.4")
    return (int(numbers[1]), int(numbers[2])) < (0, 5)


def _dilates_otherwise(arch: str, encoder: str, model_args: Mapping[str, Any]) -> bool:
    """Whether SMP 0.4 and older made another network of the same tensors."""
    stride = model_args.get("encoder_output_stride", _DEFAULT_OUTPUT_STRIDE.get(arch))
    return arch in DILATING and stride != 32 and encoder.startswith(_OLD_OWN_ENCODERS)


def _leaves_out_a_block(arch: str, encoder: str, model_args: Mapping[str, Any]) -> bool:
    """Whether SMP 0.1.0 made another network of the same tensors."""
    # SMP 0.1.0 had these and pspnet, which does not use the last stage unless told to.
    default_depth = {"unet": 5, "linknet": 5, "fpn": 5, "pspnet": 3}.get(arch)
    return encoder == "xception" and default_depth is not None and model_args.get("encoder_depth", default_depth) == 5


def settle_version(
    arch: str, encoder: str, model_args: Mapping[str, Any], keys: Iterable[str], config: Mapping[str, Any]
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Find out which SMP's network the tensors are of, where it matters.

    Returns:
        ``model_args``, with ``smp_version`` only where an old network is to be built, and notes.

    Raises:
        CheckpointError: neither the checkpoint nor the user tells, or it is a network that cannot be built.
        SpecError: the user contradicts the checkpoint.
    """
    settled = {k: v for k, v in model_args.items() if k != ARGUMENT}
    said = is_old(model_args[ARGUMENT]) if ARGUMENT in model_args else None
    listed = list(keys)
    if arch == "upernet" and any(k.startswith("decoder.fpn_stages.") for k in listed):
        raise CheckpointError(
            "the weights are of the UPerNet of SMP 0.4, whose decoder is another network since SMP 0.5; put it together of two "
            "files of SMP 0.4, in a dozen lines (docs/own-data.md), for edgeseg.build(model=...), or train it again"
        )
    if _leaves_out_a_block(arch, encoder, settled):
        return _settle_first(encoder, settled, model_args.get(ARGUMENT), config)
    if not _dilates_otherwise(arch, encoder, settled):
        return settled, ()
    old, evidence = _evidence(arch, encoder, listed, config)
    if old is None and said is None:
        raise CheckpointError(
            f"SMP 0.5 changed how {arch} dilates {encoder}, and nothing in the checkpoint tells which version trained "
            f"it; give --model-arg {ARGUMENT}={OLD} (0.4 or older) or {ARGUMENT}={NEW} (0.5 or newer)"
        )
    if old is not None and said is not None and old != said:
        raise SpecError(
            f"{ARGUMENT}={model_args[ARGUMENT]} contradicts the checkpoint, which is of SMP {_words(old)} ({evidence}); "
            "leave it out"
        )
    if old or (old is None and said):
        settled[ARGUMENT] = OLD
    why = evidence or f"{ARGUMENT} given"
    return settled, (f"{encoder} is dilated as SMP {_words(ARGUMENT in settled)} dilates it ({why})",)


def _settle_first(
    encoder: str, settled: dict[str, Any], said: object, config: Mapping[str, Any]
) -> tuple[dict[str, Any], tuple[str, ...]]:
    if str(said) == FIRST:
        return settled | {ARGUMENT: FIRST}, (f"{encoder} leaves out block11 before its last stage, as SMP {FIRST} did",)
    if said is not None or config:  # SMP 0.1.0 wrote no config.json
        return settled, ()
    return settled, (
        f"{encoder} is built as SMP 0.1.1 and newer build it; if SMP {FIRST} (to September 2020) trained these weights, give "
        f"--model-arg {ARGUMENT}={FIRST}",
    )


def _words(old: bool) -> str:
    return "0.4 and older" if old else "0.5 and newer"


def _evidence(arch: str, encoder: str, keys: list[str], config: Mapping[str, Any]) -> tuple[bool | None, str]:
    if "mobilenetv3" not in encoder:
        # The old encoder was the network itself, the new one holds timm's as "model".
        old = not any(k.startswith("encoder.model.") for k in keys)
        return old, "by the names of the encoder's tensors"
    if {"upsampling", "aux_params"} <= config.keys():
        newer = _ARGUMENT_SINCE_0_5.get(arch)
        if newer is not None:
            return newer not in config, f"config.json has {'no' if newer not in config else 'an'} argument {newer}"
        if _ARGUMENT_SINCE_0_4[arch] not in config:
            return True, f"config.json has no argument {_ARGUMENT_SINCE_0_4[arch]}"
    return None, ""


def rebuild_encoder(module: torch.nn.Module, arch: str, encoder: str, model_args: Mapping[str, Any]) -> None:
    """Make the encoder of a freshly built model the one that the version in ``model_args`` built.

    Args:
        module: changed in place.
        arch: of the model.
        encoder: of the model.
        model_args: of the model, ``smp_version`` among them.
    """
    version = model_args.get(ARGUMENT)
    if version is None or not is_old(version):
        return
    if _dilates_otherwise(arch, encoder, model_args):
        _dilate_as_before(module, arch, encoder, model_args)
    elif str(version) == FIRST and _leaves_out_a_block(arch, encoder, model_args):
        _leave_out_block_11(module)


def _leave_out_block_11(module: torch.nn.Module) -> None:
    built: Any = module

    class FirstXception(type(built.encoder)):  # type: ignore[misc]
        def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
            features = [x]
            x = self.relu2(self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x))))))
            features += [x, self.block1(x)]
            features.append(self.block2(features[-1]))
            x = features[-1]
            for k in range(3, 11):
                x = getattr(self, f"block{k}")(x)
            features.append(self.block11(x))
            x = self.relu3(self.bn3(self.conv3(self.block12(x))))
            return [*features, self.bn4(self.conv4(x))]

    built.encoder.__class__ = FirstXception


def _dilate_as_before(module: torch.nn.Module, arch: str, encoder: str, model_args: Mapping[str, Any]) -> None:
    """Replace the encoder by one dilated as SMP 0.4 and older did it."""
    from segmentation_models_pytorch.encoders import get_encoder
    from segmentation_models_pytorch.encoders._utils import replace_strides_with_dilation

    built: Any = module
    output_stride = model_args.get("encoder_output_stride", _DEFAULT_OUTPUT_STRIDE[arch])
    replaced = built.encoder
    plain: Any = get_encoder(
        encoder, in_channels=replaced._in_channels, depth=replaced._depth, weights=None, output_stride=32
    )
    for stride, stages in _late_stages(plain.model, encoder).items():
        for stage in stages if stride > output_stride else ():
            replace_strides_with_dilation(stage, dilation_rate=stride // output_stride)
    plain._output_stride = output_stride
    built.encoder = plain


def _late_stages(network: Any, encoder: str) -> dict[int, list[torch.nn.Module]]:
    """Return the modules of the old encoders' stages at 1/16 and 1/32 of the image's size; fewer for a small depth."""
    if "mobilenetv3" in encoder:
        first, second = (2, 4) if "small" in encoder else (3, 5)
        return {16: list(network.blocks[first:second]), 32: list(network.blocks[second:])}
    names = (
        {16: ("s3",), 32: ("s4",)}
        if "regnet" in encoder
        else {16: ("stages_2",), 32: ("stages_3", "stages_4", "final_conv")}
    )
    return {stride: [network[n] for n in stage if n in network] for stride, stage in names.items()}
