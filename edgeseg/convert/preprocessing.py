"""Which normalization a model was trained with: said, recorded, known about its encoder, or assumed.

SMP 0.6.0 asks the Hugging Face hub for its encoders' values (and spends 30 s on retries without a network), so the
values are kept here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from edgeseg.convert.architectures import import_for_conversion
from edgeseg.errors import SpecError
from edgeseg.spec import FULL_SCALE, ChannelOrder, InputDtype, ModelRequest, Preprocess

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


def encoder_statistics(encoder: str, encoder_weights: str | None) -> Preprocess | None:
    """Return what is known offline about an encoder's pretrained weights, for uint8 RGB; ``None`` when nothing is."""
    if encoder.startswith("tu-"):
        timm, name = import_for_conversion("timm"), encoder.removeprefix("tu-")
        if not timm.is_model(name) or not timm.models.is_model_pretrained(name):
            return None
        settings = timm.get_pretrained_cfg(name)
        return Preprocess(tuple(settings.mean), tuple(settings.std), source=f"timm's settings for {name}")
    for prefix, weights, (mean, std) in _SMP_EXCEPTIONS:
        if encoder.startswith(prefix) and weights in ("", encoder_weights):
            return Preprocess(mean, std, source=f"SMP's settings for {encoder}")
    smp = import_for_conversion("segmentation_models_pytorch")
    # SMP 0.6 forwards five timm- families to timm, which has other values for some; when they were SMP's own (until
    # 0.4), and models were trained with them, SMP gave ImageNet's for all five.
    if encoder in smp.encoders.encoders or encoder.startswith("timm-"):
        return Preprocess(source=f"SMP's settings for {encoder}")
    return None


@dataclass(frozen=True)
class RecordedNormalization:
    """What a checkpoint or a wrapper carries; ``scale_known``: whether it also says which scale its images have."""

    preprocess: Preprocess
    scale_known: bool


Judge: TypeAlias = "Callable[[Sequence[Preprocess]], Preprocess | None]"
"""Given candidates: the one that the network itself bears out, ``None`` when nothing tells."""


def resolve_preprocess(
    request: ModelRequest,
    encoder: str,
    in_channels: int,
    *,
    encoder_weights: str | None = None,
    recorded: RecordedNormalization | None = None,
    untrained: bool = False,
    judge: Judge | None = None,
    whole: str | None = None,
) -> tuple[Preprocess, tuple[str, ...]]:
    """Decide on the normalization: the user's, else the checkpoint's, else the encoder's, else ImageNet's.

    Where neither the user nor the checkpoint is explicit, evidence decides, if there is some.

    Args:
        request: the user's mean, std, scale and channel order count before all else.
        encoder: its name.
        in_channels: of the model.
        encoder_weights: SMP's name of the pretrained weights training started from, where recorded.
        recorded: what the checkpoint's own config or buffers say.
        untrained: random weights, for which any choice is as good.
        judge: see :data:`Judge`; ``None`` where there is no evidence to ask for.
        whole: name of a user's class whose forward may normalize by itself.

    Returns:
        the preprocessing and notes on what was assumed.

    Raises:
        SpecError: mean without std, scale without both, a wrong number of values, or in_channels for which nothing can
            be assumed.
    """
    dtype, clip = request.input_dtype, None if request.clip is None else (request.clip[0], request.clip[1])
    if request.mean is not None or request.std is not None:
        given, notes = _from_user(request, in_channels)
        given = replace(given, clip=clip)
        # Of float32 the scale is known: mean and std are those of the values.
        if request.scale is None and judge is not None and dtype != "float32":
            better = judge((given, _other_scale(given, dtype)))
            if better is not None and better != given:
                told = f"and not as given: {in_words(given, dtype)}; --scale settles it"
                notes = (*notes, f"{_evidence(better, dtype)}, {told}")
        return given, notes
    if recorded is not None:
        assumed, notes = _from_record(request, recorded, in_channels)
        assumed = replace(assumed, clip=clip)
        settled = recorded.scale_known or request.scale is not None
        candidates: tuple[Preprocess, ...] = (assumed, _other_scale(assumed, dtype))
    else:
        assumed, notes = _from_encoder(request, encoder, encoder_weights, in_channels, untrained)
        assumed = replace(assumed, clip=clip)
        settled = untrained
        usual = [assumed, replace(assumed, mean=(0.0,) * in_channels, std=(1.0,) * in_channels)]
        if in_channels == 3:
            imagenet = Preprocess(scale=1.0 / FULL_SCALE[dtype])
            usual.append(_with_order(imagenet, request.channel_order))
        # The same values once more, wherever they came from, are no rival.
        alone = dict.fromkeys(replace(p, source=assumed.source, clip=clip) for p in usual)
        candidates = tuple(p for one in alone for p in (one, _other_scale(one, dtype)))
    if settled:
        return assumed, notes
    best = None if judge is None else judge(candidates)
    if best is not None:
        if best == assumed and whole is None:
            return replace(
                best, source=f"{assumed.source}, as the first batch norm confirms"
            ), notes if recorded else ()
        note = f"{_evidence(best, dtype)}; --mean, --std and --scale say otherwise"
        return replace(best, source="what fits the first batch norm"), (note,)
    before = "" if whole is None else f"the whole of {whole} is converted; before it, "
    if whole is not None or recorded is not None:
        doubt = "if it normalizes by itself" if whole is not None else "if it was trained otherwise"
        hint = "--mean 0 --std 1" if whole is not None else f"--scale 1 for pixel values{_range(dtype)}"
        return assumed, (
            *notes,
            f"{before}{in_words(assumed, dtype)} ({assumed.source}): assumed; {doubt}, give {hint}",
        )
    return assumed, notes


def _evidence(preprocess: Preprocess, dtype: InputDtype) -> str:
    return f"the network's first batch norm fits the images given when {in_words(preprocess, dtype)}"


def in_words(preprocess: Preprocess, dtype: InputDtype = "uint8") -> str:
    """What is done to pixel values, as a clause: ``images are divided by 255, then ...``."""
    scale = preprocess.scale
    clipped = "" if preprocess.clip is None else "clipped to {:g}..{:g}".format(*preprocess.clip)
    divisor = next((n for n in (255, 65535) if scale == 1.0 / n), None)
    if scale == 1.0:
        first = f"images are {clipped}" if clipped else f"images keep their values{_range(dtype)}"
    else:
        first = f"images are {clipped + ', then ' if clipped else ''}" + (
            f"divided by {divisor}" if divisor else f"multiplied by {scale:g}"
        )
    if set(preprocess.mean) == {0.0} and set(preprocess.std) == {1.0}:
        return f"{first} and not normalized further"
    return f"{first}, then normalized with mean {_listed(preprocess.mean)} and std {_listed(preprocess.std)}"


def _listed(values: Sequence[float]) -> str:
    return ", ".join(f"{v:.4g}" for v in (values[:1] if len(set(values)) == 1 else values))


def _range(dtype: InputDtype) -> str:
    return "" if dtype == "float32" else f" 0..{FULL_SCALE[dtype]}"


def _other_scale(preprocess: Preprocess, dtype: InputDtype) -> Preprocess:
    """The same numbers on the other usual scale: images of 0..255 in place of 0..1, or the reverse."""
    unit = 1.0 / (255 if dtype == "float32" else FULL_SCALE[dtype])
    return replace(preprocess, scale=1.0 if preprocess.scale != 1.0 else unit)


def _from_record(
    request: ModelRequest, recorded: RecordedNormalization, in_channels: int
) -> tuple[Preprocess, tuple[str, ...]]:
    known = recorded.preprocess
    if len(known.mean) != in_channels:
        raise SpecError(
            f"the checkpoint records {len(known.mean)} mean/std values for {in_channels} input channels; "
            "give --mean and --std"
        )
    if request.scale is not None and request.scale != known.scale:
        known = replace(known, scale=request.scale, source=f"{known.source}, scale by request")
    notes = (f"normalization: {known.source}",)
    # What is recorded is done to the channels as the network gets them, whichever colours these are.
    return _in_order(known, request.channel_order, known.mean, known.std), notes


def _from_encoder(
    request: ModelRequest, encoder: str, encoder_weights: str | None, in_channels: int, untrained: bool
) -> tuple[Preprocess, tuple[str, ...]]:
    dtype = request.input_dtype
    full_scale = FULL_SCALE[dtype]
    if request.scale is not None and request.scale != 1.0 / full_scale:
        raise SpecError(
            f"--scale {request.scale:g} was given, and neither mean nor std is recorded; give --mean and --std in the "
            "same units (0 and 1 if images were not normalized)"
        )
    known = encoder_statistics(encoder, encoder_weights)
    notes: list[str] = []
    if known is None:
        known = Preprocess()
        notes.append(
            f"nothing is known about the normalization of {encoder}: ImageNet's mean and std assumed; "
            "give --mean and --std if the model was trained with others"
        )
    if in_channels != len(known.mean):
        known, note = _adapt(known, in_channels, untrained)
        notes.append(note)
    if dtype != "uint8" and not untrained:
        notes.append(
            f"{dtype} images: mean and std of {known.source} assumed, for values 0..{full_scale}; give --mean, --std and "
            "--scale as in training"
        )
    return _with_order(replace(known, scale=1.0 / full_scale), request.channel_order), tuple(notes)


def _with_order(preprocess: Preprocess, order: ChannelOrder | None) -> Preprocess:
    """The same statistics of colours for a network that gets them in another order."""
    return _in_order(preprocess, order, preprocess.mean[::-1], preprocess.std[::-1])


def _in_order(
    preprocess: Preprocess, order: ChannelOrder | None, mean: tuple[float, ...], std: tuple[float, ...]
) -> Preprocess:
    """``mean`` and ``std`` in the place of its own where ``order`` is another than its own."""
    if order is None or order == preprocess.channel_order:
        return preprocess
    if len(preprocess.mean) != 3:
        raise SpecError(f"channel order {order!r} is for 3 channels, the model takes {len(preprocess.mean)}")
    source = f"{preprocess.source}, {order} by request"
    return replace(preprocess, mean=mean, std=std, channel_order=order, source=source)


def _from_user(request: ModelRequest, in_channels: int) -> tuple[Preprocess, tuple[str, ...]]:
    if request.mean is None or request.std is None:
        given, other = ("mean", "std") if request.std is None else ("std", "mean")
        raise SpecError(f"--{given} given without --{other}; give both, one value per channel or one for all")
    mean, std = _per_channel("mean", request.mean, in_channels), _per_channel("std", request.std, in_channels)
    order: ChannelOrder = request.channel_order or "rgb"
    if order == "bgr" and in_channels != 3:
        raise SpecError(f"channel order 'bgr' is for 3 channels, the model takes {in_channels}")
    full_scale = FULL_SCALE[request.input_dtype]
    if request.scale is not None or full_scale == 1:
        return Preprocess(mean, std, request.scale or 1.0, order, "given"), ()
    # In units of [0, 1] neither can exceed 1; mmsegmentation and others write them for 0..255.
    if max(*mean, *std) > 1.0:
        meant = f"for pixel values{_range(request.input_dtype)}"
        return Preprocess(mean, std, 1.0, order, f"given, {meant}"), (f"--mean/--std above 1 are taken {meant}",)
    return Preprocess(mean, std, 1.0 / full_scale, order, "given"), ()


def _per_channel(what: str, values: Sequence[float], in_channels: int) -> tuple[float, ...]:
    if len(values) == 1:
        return tuple(values) * in_channels
    if len(values) != in_channels:
        raise SpecError(f"--{what} has {len(values)} values, the model takes {in_channels} channels; give one for each")
    return tuple(values)


def _adapt(known: Preprocess, in_channels: int, untrained: bool) -> tuple[Preprocess, str]:
    """Mean and std for another number of channels than the encoder's three, and a note."""
    if in_channels == 1:
        # SMP adapts pretrained weights to one channel by summing over RGB: the counterpart is the average image.
        one_mean, one_std = (sum(v) / len(v) for v in (known.mean, known.std))
        note = (
            f"1 input channel: mean {one_mean:.4g} and std {one_std:.4g} assumed, the average of RGB's; give --mean and --std "
            "if the model was trained with others"
        )
        return Preprocess((one_mean,), (one_std,), source=f"average of {known.source}"), note
    if not untrained:
        raise SpecError(
            f"nobody can guess the normalization of {in_channels} input channels; give --mean and --std with "
            f"{in_channels} values as in training (0 and 1 if images were only divided by 255)"
        )
    mean, std = (tuple(v[i % len(v)] for i in range(in_channels)) for v in (known.mean, known.std))
    note = f"{in_channels} input channels: mean and std of RGB repeated; the weights are random, so it does not matter"
    return replace(known, mean=mean, std=std), note


def recorded_preprocess(
    config: Mapping[str, Any], tensors: Mapping[str, Any], dtype: InputDtype = "uint8"
) -> RecordedNormalization | None:
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
        channel_order: ChannelOrder = "bgr" if order == "bgr" else "rgb"
        return RecordedNormalization(
            Preprocess(mean, std, top / FULL_SCALE[dtype], channel_order, "the checkpoint's config"), scale_known=True
        )
    buffers = [tensors.get("mean"), tensors.get("std")]
    if any(b is None or not 1 <= b.numel() <= 64 for b in buffers):
        return None
    values = [tuple(float(v) for v in b.flatten().tolist()) for b in buffers if b is not None]
    # SMP's example has ImageNet's mean and std for 0..1, and was often fed images of 0..255: only above 1 are they clear.
    above = max(*values[0], *values[1]) > 1.0
    return RecordedNormalization(
        Preprocess(values[0], values[1], 1.0 if above else 1.0 / FULL_SCALE[dtype], "rgb", "buffers mean and std"),
        scale_known=above,
    )
