"""Which normalization a model was trained with: said, recorded, known about its encoder, or assumed.

SMP 0.6.0 asks the Hugging Face hub for its encoders' values (and spends 30 s on retries without a network), so the
values are kept here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edgeseg.convert.architectures import import_for_conversion
from edgeseg.errors import SpecError
from edgeseg.spec import IMAGENET_MEAN, IMAGENET_STD, ChannelOrder, ModelRequest, Preprocess

_HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
_DPN = ((124 / 255, 117 / 255, 104 / 255), (1 / (0.0167 * 255),) * 3)

# SMP's own encoders whose weights were not trained with ImageNet's mean and std. Source: SMP's
# encoders/_legacy_pretrained_settings.py; there all are RGB in [0, 1]. (name prefix, encoder_weights or "" for any).
_SMP_EXCEPTIONS: tuple[tuple[str, str, tuple[tuple[float, ...], tuple[float, ...]]], ...] = (
    ("dpn", "", _DPN),
    ("inceptionresnetv2", "", _HALF),
    ("inceptionv4", "", _HALF),
    ("xception", "", _HALF),
    ("timm-tf_efficientnet_lite", "", _HALF),
    ("efficientnet-b", "advprop", _HALF),
    ("timm-efficientnet-b", "advprop", _HALF),
)


@dataclass(frozen=True)
class KnownStatistics:
    """Normalization of RGB images divided by 255, and where it is from."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    source: str


def encoder_statistics(encoder: str, encoder_weights: str | None) -> KnownStatistics | None:
    """Return what is known offline about an encoder's pretrained weights, ``None`` when nothing is."""
    if encoder.startswith("tu-"):
        return _timm_statistics(encoder.removeprefix("tu-"))
    for prefix, weights, (mean, std) in _SMP_EXCEPTIONS:
        if encoder.startswith(prefix) and weights in ("", encoder_weights):
            return KnownStatistics(mean, std, f"SMP's settings for {encoder}")
    smp = import_for_conversion("segmentation_models_pytorch")
    # SMP 0.6 forwards five timm- families to timm, which has other values for some; when they were SMP's own (until
    # 0.4), and models were trained with them, SMP gave ImageNet's for all five.
    if encoder in smp.encoders.encoders or encoder.startswith("timm-"):
        return KnownStatistics(IMAGENET_MEAN, IMAGENET_STD, f"SMP's settings for {encoder}")
    return None


def _timm_statistics(name: str) -> KnownStatistics | None:
    timm = import_for_conversion("timm")
    if not timm.is_model(name) or not timm.models.is_model_pretrained(name):
        return None
    settings = timm.get_pretrained_cfg(name)
    return KnownStatistics(tuple(settings.mean), tuple(settings.std), f"timm's settings for {name}")


def resolve_preprocess(
    request: ModelRequest,
    *,
    encoder: str,
    encoder_weights: str | None,
    in_channels: int,
    recorded: Preprocess | None,
    untrained: bool,
) -> tuple[Preprocess, tuple[str, ...]]:
    """Decide on the normalization: the user's, else the checkpoint's, else the encoder's, else ImageNet's.

    Args:
        request: the user's mean, std and channel order count before all else.
        encoder: its name.
        encoder_weights: SMP's name of the pretrained weights training started from, where recorded.
        in_channels: of the model.
        recorded: what the checkpoint's own config or buffers say.
        untrained: random weights, for which any choice is as good.

    Returns:
        the preprocessing and notes on what was assumed.

    Raises:
        SpecError: mean without std, a wrong number of values, or in_channels for which nothing can be assumed.
    """
    order = request.channel_order
    if request.mean is not None or request.std is not None:
        return _from_user(request, in_channels)
    if recorded is not None:
        if len(recorded.mean) != in_channels:
            raise SpecError(
                f"the checkpoint records {len(recorded.mean)} mean/std values for {in_channels} input channels; "
                "give --mean and --std"
            )
        return _with_order(recorded, order), (f"normalization: {recorded.source}",)
    known = encoder_statistics(encoder, encoder_weights)
    notes: list[str] = []
    if known is None:
        known = KnownStatistics(IMAGENET_MEAN, IMAGENET_STD, "ImageNet default")
        notes.append(
            f"nothing is known about the normalization of {encoder}: ImageNet's mean and std assumed; "
            "give --mean and --std if the model was trained with others"
        )
    if in_channels != len(known.mean):
        known, note = _adapt(known, in_channels, untrained)
        notes.append(note)
    found = Preprocess(known.mean, known.std, 1.0 / 255.0, "rgb", known.source)
    return _with_order(found, order), tuple(notes)


def _with_order(preprocess: Preprocess, order: ChannelOrder | None) -> Preprocess:
    if order is None or order == preprocess.channel_order:
        return preprocess
    if len(preprocess.mean) != 3:
        raise SpecError(f"channel order {order!r} is for 3 channels, the model takes {len(preprocess.mean)}")
    # mean and std belong to the colour, so they change places with it.
    return Preprocess(
        preprocess.mean[::-1], preprocess.std[::-1], preprocess.scale, order, f"{preprocess.source}, {order} by request"
    )


def _from_user(request: ModelRequest, in_channels: int) -> tuple[Preprocess, tuple[str, ...]]:
    if request.mean is None or request.std is None:
        given, other = ("mean", "std") if request.std is None else ("std", "mean")
        raise SpecError(f"--{given} given without --{other}; give both, one value per channel or one for all")
    mean, std = _per_channel("mean", request.mean, in_channels), _per_channel("std", request.std, in_channels)
    order: ChannelOrder = request.channel_order or "rgb"
    if order == "bgr" and in_channels != 3:
        raise SpecError(f"channel order 'bgr' is for 3 channels, the model takes {in_channels}")
    # In units of [0, 1] neither can exceed 1; mmsegmentation and others write them for 0..255.
    if max(*mean, *std) > 1.0:
        return Preprocess(mean, std, 1.0, order, "given, for pixel values 0..255"), (
            "--mean/--std above 1 are taken for pixel values 0..255",
        )
    return Preprocess(mean, std, 1.0 / 255.0, order, "given"), ()


def _per_channel(what: str, values: Sequence[float], in_channels: int) -> tuple[float, ...]:
    if len(values) == 1:
        return tuple(values) * in_channels
    if len(values) != in_channels:
        raise SpecError(f"--{what} has {len(values)} values, the model takes {in_channels} channels; give one for each")
    return tuple(values)


def _adapt(known: KnownStatistics, in_channels: int, untrained: bool) -> tuple[KnownStatistics, str]:
    """Statistics for another number of channels than the encoder's three, and a note."""
    if in_channels == 1:
        # SMP adapts pretrained weights to one channel by summing over RGB: the counterpart is the average image.
        mean, std = (sum(v) / len(v) for v in (known.mean, known.std))
        note = (
            f"1 input channel: mean {mean:.4g} and std {std:.4g} assumed, the average of RGB's; give --mean and --std "
            "if the model was trained with others"
        )
        return KnownStatistics((mean,), (std,), f"average of {known.source}"), note
    if not untrained:
        raise SpecError(
            f"nobody can guess the normalization of {in_channels} input channels; give --mean and --std with "
            f"{in_channels} values as in training (0 and 1 if images were only divided by 255)"
        )
    repeated = [tuple(v[i % len(v)] for i in range(in_channels)) for v in (known.mean, known.std)]
    note = f"{in_channels} input channels: mean and std of RGB repeated; the weights are random, so it does not matter"
    return KnownStatistics(repeated[0], repeated[1], known.source), note


def recorded_preprocess(config: Mapping[str, Any], tensors: Mapping[str, Any]) -> Preprocess | None:
    """Return the normalization a checkpoint carries: ``preprocess`` in its config, or Lightning's mean/std buffers.

    SMP's own training examples register buffers ``mean`` and ``std`` of shape ``(1, C, 1, 1)``.

    Raises:
        SpecError: the recorded values are no valid normalization.
    """
    settings = config.get("preprocess")
    if isinstance(settings, Mapping) and {"mean", "std"} <= settings.keys():
        try:
            mean, std = (tuple(float(v) for v in settings[k]) for k in ("mean", "std"))
            top = float((settings.get("input_range") or (0, 1))[-1])
            order = str(settings.get("channel_order") or settings.get("input_space") or "rgb").lower()
        except (TypeError, ValueError, IndexError) as exc:
            raise SpecError("preprocess in the checkpoint's config.json is not numbers; give --mean and --std") from exc
        return Preprocess(mean, std, top / 255.0, "bgr" if order == "bgr" else "rgb", "the checkpoint's config")
    buffers = [tensors.get("mean"), tensors.get("std")]
    if any(b is None or not 1 <= b.numel() <= 64 for b in buffers):
        return None
    values = [tuple(float(v) for v in b.flatten().tolist()) for b in buffers if b is not None]
    scale = 1.0 if max(*values[0], *values[1]) > 1.0 else 1.0 / 255.0
    words = "buffers mean and std, " + ("for 0..255" if scale == 1.0 else "for images divided by 255")
    return Preprocess(values[0], values[1], scale, "rgb", words)
