"""What is asked for: the model, its input, its preprocessing, its output and the target.

Frozen dataclasses that travel through every stage and into the engine's manifest. They validate themselves:
an instance that exists is consistent. Nothing here imports torch, onnx or a backend.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias, get_args

from edgeseg.arguments import (
    FLAG,
    MOST,
    NAMES,
    NUMBERS,
    PATH_OR_WORD,
    RANGE,
    SETTINGS,
    TEXT,
    Kind,
    argument,
    arguments_of,
    choice,
    number,
    one_of,
    settle,
    shortened,
    whole,
)
from edgeseg.errors import SpecError

Precision: TypeAlias = Literal["fp32", "fp16", "int8"]
Task: TypeAlias = Literal["multiclass", "binary", "multilabel"]
OutputKind: TypeAlias = Literal["mask", "logits", "probabilities"]
ChannelOrder: TypeAlias = Literal["rgb", "bgr"]
InputDtype: TypeAlias = Literal["uint8", "uint16", "float32"]
FitPolicy: TypeAlias = Literal["resize", "letterbox", "tile"]
Interpolation: TypeAlias = Literal["linear", "cubic", "area", "nearest", "lanczos"]
PadPosition: TypeAlias = Literal["top_left", "center"]
Border: TypeAlias = Literal["constant", "replicate", "reflect", "wrap", "reflect_101"]

ARCHITECTURES: tuple[str, ...] = (
    "unet",
    "unetplusplus",
    "manet",
    "linknet",
    "fpn",
    "pspnet",
    "deeplabv3",
    "deeplabv3plus",
    "pan",
    "upernet",
    "segformer",
    "dpt",
)
PRECISIONS: tuple[str, ...] = get_args(Precision)

MAX_CLASSES = 65536
FULL_SCALE: dict[InputDtype, int] = {"uint8": 255, "uint16": 65535, "float32": 1}
"""The pixel value that training scripts divide by where nobody says another: albumentations' and OpenCV's."""
MAX_INPUT_BYTES = 2**31
"""Of one batch of images: what a runtime allocates before it has seen any."""

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def nearest_size(height: int, width: int, stride: int) -> tuple[int, int]:
    """The multiples of ``stride``, which are at least one, nearest to a height and width."""
    rows, columns = (max(stride, round(side / stride) * stride) for side in (height, width))
    return rows, columns


@dataclass(frozen=True)
class Preprocess:
    """How an image becomes the network's float input: ``(clip(x) * scale - mean) / std`` per channel.

    Attributes:
        mean: per channel, in the units after ``scale`` (0..1 for the usual 1/255), in ``channel_order``.
        std: per channel, > 0, same units.
        scale: factor applied to the pixel value first; 1/255 of uint8, 1/65535 of uint16 for models trained on [0, 1].
        channel_order: order the *network* was trained with. The engine's input is always RGB;
            the swap, if any, is inside the graph.
        source: where the values came from, for the manifest and the log.
        clip: lowest and highest pixel value, which those beyond are held at before all else: a window of a CT image.
    """

    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    scale: float = 1.0 / 255.0
    channel_order: ChannelOrder = "rgb"
    source: str = "ImageNet default"
    clip: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if self.clip is not None and not (len(self.clip) == 2 and -math.inf < self.clip[0] < self.clip[1] < math.inf):
            raise SpecError(
                f"clip is {shortened(self.clip)}; give the lowest and the highest pixel value, such as -160,240"
            )
        if len(self.mean) != len(self.std):
            raise SpecError(f"mean has {len(self.mean)} values, std {len(self.std)}; give one of each per channel")
        if not all(math.isfinite(v) for v in (*self.mean, *self.std, self.scale)):
            raise SpecError(f"mean, std and scale must be finite, got {self.mean}, {self.std} and {self.scale}")
        if not all(s > 0 for s in self.std) or self.scale <= 0:
            raise SpecError(f"std and scale must be > 0, got std={self.std} scale={self.scale}")
        one_of("channel order", self.channel_order, get_args(ChannelOrder))

    def usual_values(self, dtype: InputDtype) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Lowest and highest pixel value that images of ``dtype`` usually have, by channel in RGB order.

        Of uint8 all there are, else two standard deviations around the mean of training, within the range of the dtype.
        """
        if dtype == "uint8":
            return (0.0,) * len(self.mean), (255.0,) * len(self.mean)
        least, most = (-math.inf, math.inf) if dtype == "float32" else (0.0, float(FULL_SCALE[dtype]))
        if self.clip is not None:
            least, most = max(least, self.clip[0]), min(most, self.clip[1])
        around = [(m / self.scale, 2 * s / self.scale) for m, s in zip(self.mean, self.std, strict=True)]
        ordered = around[::-1] if self.channel_order == "bgr" else around
        low = tuple(min(max(middle - spread, least), most - 1) for middle, spread in ordered)
        return low, tuple(max(min(middle + spread, most), least + 1) for middle, spread in ordered)


@dataclass(frozen=True)
class BatchRange:
    """Batch sizes an engine accepts. ``minimum == maximum`` means a static batch."""

    minimum: int = 1
    optimum: int = 1
    maximum: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.minimum <= self.optimum <= self.maximum:
            raise SpecError(
                f"batch {self.minimum}:{self.optimum}:{self.maximum} is not 1 <= MIN <= OPT <= MAX; "
                "give N or MIN:OPT:MAX, such as 1 or 1:4:8"
            )

    @classmethod
    def read(cls, value: Any) -> BatchRange:
        """``4``, ``"4"``, ``"1:4:8"`` or ``(1, 4, 8)``. Raises ``TypeError``, ``ValueError``, :class:`SpecError`."""
        if isinstance(value, BatchRange):
            return value
        parts = value.split(":") if isinstance(value, str) else value if isinstance(value, Iterable) else [value]
        numbers = [whole(0, MOST, 1).read(part) for part in parts]
        if len(numbers) not in (1, 3):
            raise ValueError
        return cls(*numbers) if len(numbers) == 3 else cls(*numbers * 3)

    def __str__(self) -> str:
        return f"{self.minimum}:{self.optimum}:{self.maximum}" if self.is_dynamic else str(self.minimum)

    @property
    def is_dynamic(self) -> bool:
        return self.minimum != self.maximum


_ITEM_BYTES: dict[InputDtype, int] = {"uint8": 1, "uint16": 2, "float32": 4}

BATCH = Kind("N or MIN:OPT:MAX, such as 1 or 1:4:8", BatchRange.read, metavar="N|MIN:OPT:MAX")


@dataclass(frozen=True)
class Padding:
    """How a model's own preprocessing fills the engine's input where the image does not; OpenCV's words.

    Attributes:
        position: of the image: in the middle (of an odd number of pixels the larger half is to the right and below), or at
            the top left. Windows of fit policy ``tile`` are always filled to the right and below.
        border: what is repeated there; ``constant`` is a colour.
        value: that colour, a pixel value of the engine's dtype, one for all channels or one per channel, RGB.
    """

    position: PadPosition = "center"
    border: Border = "constant"
    value: tuple[int | float, ...] = (0,)

    def __post_init__(self) -> None:
        one_of("position of padding", self.position, get_args(PadPosition))
        one_of("border of padding", self.border, get_args(Border))
        if not self.value or not all(math.isfinite(level) for level in self.value):
            raise SpecError(f"the padding's colour is {self.value}; give pixel values, one per channel or one for all")


@dataclass(frozen=True)
class InputSpec:
    """The engine's image input: ``dtype`` ``(N, height, width, channels)``, RGB for three channels.

    Attributes:
        dtype: of its pixels. Images of another one are never converted without being told to.
        height, width: pixels; the optimum when ``dynamic_size``.
        stride: height and width must be multiples of this (what the network demands).
        dynamic_size: any multiple of ``stride`` is accepted at run time, not just ``height`` x ``width``.
        min_size, max_size: pixels, bounds ``(height, width)`` when ``dynamic_size`` (profiles need them).
        fit: how an image of another size is brought to the engine's: ``resize`` (bilinear, aspect ratio not kept),
            ``letterbox`` (aspect ratio kept, padded), ``tile`` (sliding window with overlap). Used alike by
            calibration, runtime and evaluation.
        interpolation: by which an image is resized, as OpenCV does it.
        padding: how the rest of the input is filled; ``None``: to the right and below, black, or the border repeated
            where that is narrower than the stride, and where ``dtype`` is not uint8: 0 may be far from any pixel's value.
    """

    height: int = 256
    width: int = 256
    channels: int = 3
    batch: BatchRange = field(default_factory=BatchRange)
    stride: int = 32
    dynamic_size: bool = False
    min_size: tuple[int, int] | None = None
    max_size: tuple[int, int] | None = None
    fit: FitPolicy = "resize"
    interpolation: Interpolation = "linear"
    padding: Padding | None = None
    dtype: InputDtype = "uint8"

    def __post_init__(self) -> None:
        one_of("input dtype", self.dtype, get_args(InputDtype))
        one_of("fit policy", self.fit, get_args(FitPolicy))
        one_of("interpolation", self.interpolation, get_args(Interpolation))
        if self.padding is not None and len(self.padding.value) not in (1, self.channels):
            raise SpecError(f"the padding's colour has {len(self.padding.value)} values for {self.channels} channels")
        if self.padding is not None and self.dtype != "float32":
            top = FULL_SCALE[self.dtype]
            if not all(0 <= level <= top and level == int(level) for level in self.padding.value):
                raise SpecError(f"the padding's colour is {self.padding.value}; of {self.dtype} give levels 0 to {top}")
        if self.height < 1 or self.width < 1 or self.channels < 1 or self.stride < 1:
            raise SpecError(f"size {self.height}x{self.width} with {self.channels} channels is not positive")
        size_bytes = self.batch.maximum * self.height * self.width * self.channels * _ITEM_BYTES[self.dtype]
        if size_bytes > MAX_INPUT_BYTES:
            raise SpecError(
                f"{shortened(self.batch.maximum)} images of {shortened(self.height)}x{shortened(self.width)} with "
                f"{shortened(self.channels)} channels are {min(size_bytes, 2**1000) / 2**30:.3g} GiB; "
                f"at most {MAX_INPUT_BYTES >> 30} in a batch"
            )
        if self.height % self.stride or self.width % self.stride:
            near = nearest_size(self.height, self.width, self.stride)
            raise SpecError(
                f"size {self.height}x{self.width} does not fit: this model needs multiples of {self.stride}; "
                f"nearest is {near[0]}x{near[1]}"
            )
        low, high = self.min_size or (1, 1), self.max_size or (self.height, self.width)
        if not (low[0] <= self.height <= high[0] and low[1] <= self.width <= high[1]):
            raise SpecError(
                f"size {self.height}x{self.width} is not between the smallest {low[0]}x{low[1]} and the largest "
                f"{high[0]}x{high[1]}"
            )

    @property
    def pixels(self) -> int:
        return self.height * self.width

    @property
    def pixel_words(self) -> str:
        """``RGB``, ``uint16 grey``, ``float32 5 channels``: what a pixel is, for people."""
        words = {1: "grey", 3: "RGB"}.get(self.channels, f"{self.channels} channels")
        return words if self.dtype == "uint8" else f"{self.dtype} {words}"


@dataclass(frozen=True)
class OutputSpec:
    """What the engine returns.

    Attributes:
        kind: ``mask``: class index per pixel, uint8 ``(N, H, W)`` (uint16 above 256 classes; for ``binary`` 0 or 1;
            for ``multilabel`` one 0/1 plane per class, ``(N, C, H, W)``). ``logits`` / ``probabilities``:
            float32 ``(N, C, H, W)``.
        confidence: also return float32 ``(N, H, W)``: the probability of the chosen class at each pixel.
        threshold: probability above which ``binary`` and ``multilabel`` pixels are 1.
    """

    kind: OutputKind = "mask"
    confidence: bool = False
    threshold: float = 0.5

    def __post_init__(self) -> None:
        one_of("output kind", self.kind, get_args(OutputKind))
        if not 0.0 < self.threshold < 1.0:
            raise SpecError(f"threshold {self.threshold} is not between 0 and 1")


@dataclass(frozen=True)
class ModelSpec:
    """Which network, built how.

    Attributes:
        arch: one of :data:`ARCHITECTURES`, or ``custom`` for a module object handed to :func:`edgeseg.build`.
        encoder: SMP encoder name (``tu-`` names are timm's).
        classes: output channels.
        class_names: one per class, or empty.
        activation: SMP's ``activation`` argument as trained (``None``, ``"softmax"``, ``"sigmoid"``, ...). Masks never
            depend on softmax; it is removed from the graph where it does not change the mask.
        model_args: further keyword arguments of the SMP constructor, JSON values.
    """

    arch: str
    encoder: str = "resnet34"
    classes: int = 1
    class_names: tuple[str, ...] = ()
    task: Task = "multiclass"
    in_channels: int = 3
    activation: str | None = None
    model_args: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        one_of("architecture", self.arch, (*ARCHITECTURES, "custom"))
        one_of("task", self.task, get_args(Task))
        if self.classes < 1:
            raise SpecError(f"classes is {self.classes}; a segmentation model has at least 1")
        if self.task == "binary" and self.classes != 1:
            raise SpecError(f"task binary has 1 class, got {self.classes}; use --task multiclass or multilabel")
        if self.task == "multiclass" and self.classes < 2:
            raise SpecError("task multiclass needs at least 2 classes; use --task binary for 1")
        if self.classes > MAX_CLASSES:
            raise SpecError(f"{shortened(self.classes)} classes; at most {MAX_CLASSES}, what a uint16 mask holds")
        if self.class_names and len(self.class_names) != self.classes:
            raise SpecError(f"{len(self.class_names)} class names for {self.classes} classes")
        if self.in_channels < 1:
            raise SpecError(f"in_channels is {self.in_channels}; at least 1")

    @property
    def display_name(self) -> str:
        return f"{self.arch}-{self.encoder}"

    @property
    def names(self) -> tuple[str, ...]:
        """One name per class; ``class 0``, ``class 1``, ... when the model has none."""
        return self.class_names or tuple(f"class {index}" for index in range(self.classes))


@dataclass(frozen=True)
class PipelineSpec:
    """The one contract shared by conversion, calibration, runtime and evaluation."""

    model: ModelSpec
    input: InputSpec = field(default_factory=InputSpec)
    preprocess: Preprocess = field(default_factory=Preprocess)
    output: OutputSpec = field(default_factory=OutputSpec)

    def __post_init__(self) -> None:
        if self.model.in_channels != self.input.channels:
            raise SpecError(f"the model takes {self.model.in_channels} channels, the input has {self.input.channels}")
        if len(self.preprocess.mean) != self.input.channels:
            raise SpecError(
                f"mean/std have {len(self.preprocess.mean)} values for {self.input.channels} input channels; "
                "give --mean and --std with one value per channel"
            )

    @property
    def in_words(self) -> str:
        """Short, for people: ``fpn-resnet34, 11 classes, 352x480 RGB (resize) -> mask``."""
        model, given = self.model, self.input
        classes = "1 class" if model.classes == 1 else f"{model.classes} classes"
        size = "any size" if given.dynamic_size else f"{given.height}x{given.width}"
        return f"{model.display_name}, {classes}, {size} {given.pixel_words} ({given.fit}) -> {self.output.kind}"

    @property
    def mask_dtype(self) -> str:
        """numpy name of the mask's dtype: ``uint8`` up to 256 classes, else ``uint16``."""
        return "uint16" if self.model.task == "multiclass" and self.model.classes > 256 else "uint8"


@dataclass(frozen=True)
class ModelRequest:
    """What the user said about the model; ``None`` means "not said": the checkpoint or a default decides.

    Attributes:
        arch: SMP's, or the path of an ONNX file, which then stands in ``weights``.
        weights: path of a checkpoint, an ONNX file or a ``save_pretrained`` folder, ``"user/model[@revision]"`` of the
            Hugging Face hub, ``"imagenet"`` (encoder only), ``"random"``, or ``None`` for the demo model of ``arch``.
        weights_key: where the state dict is in a checkpoint that holds several, such as ``"state_dict_ema"``.
        keep_aux: keep an auxiliary classification head as a second output (dropped by default).
        input_dtype: of the images, as in :class:`InputSpec`.
        clip, mean, std, scale, channel_order: preprocessing overrides, as in :class:`Preprocess`.

    Raises:
        SpecError: a value of another kind; names the argument.
    """

    arch: str | None = argument(
        PATH_OR_WORD,
        positional=True,
        help=f"{', '.join(ARCHITECTURES[:-1])} or {ARCHITECTURES[-1]}.  [default: what the checkpoint says]",
    )
    encoder: str | None = argument(
        TEXT, help="SMP encoder; tu-NAME for timm's.  [default: the checkpoint's, else resnet34]"
    )
    weights: str | None = argument(
        PATH_OR_WORD,
        metavar="PATH|ID|imagenet|random",
        help="Checkpoint (.safetensors, .pt, .pth, .ckpt), save_pretrained folder, .onnx file, or user/model[@REVISION] "
        "of the Hugging Face hub.  [default: the demo model of --arch]",
    )
    weights_key: str | None = argument(
        TEXT, help="Where the state dict is in a checkpoint with several, such as state_dict_ema."
    )
    classes: int | None = argument(whole(1, MOST, 3), help="Output channels.  [default: what the checkpoint says]")
    class_names: tuple[str, ...] = argument(NAMES, (), help="One name per class.")
    task: Task | None = argument(choice(get_args(Task)), help="[default: binary for 1 class, else multiclass]")
    in_channels: int | None = argument(whole(1, MOST, 3), help="Image channels.  [default: 3]")
    activation: str | None = argument(TEXT, help="SMP's activation argument: softmax, sigmoid, none, ...")
    model_args: dict[str, Any] = argument(
        SETTINGS, dict, help="Any other argument of the SMP constructor, value as JSON; repeatable."
    )
    keep_aux: bool = argument(FLAG, False, help="Keep the auxiliary classification head as a second output.")
    input_dtype: InputDtype = argument(
        choice(get_args(InputDtype)),
        "uint8",
        help="Of the images' pixels: uint16 for 16-bit PNG and TIFF, float32 for physical values.",
    )
    clip: tuple[float, ...] | None = argument(
        RANGE, help="Lowest and highest pixel value; those beyond are held there first, such as a CT window's."
    )
    mean: tuple[float, ...] | None = argument(
        NUMBERS, help="Of pixel values times --scale.  [default: the checkpoint's or encoder's]"
    )
    std: tuple[float, ...] | None = argument(
        NUMBERS, help="Of pixel values times --scale.  [default: the checkpoint's or encoder's]"
    )
    scale: float | None = argument(
        number(1e-9, 1e9, "a factor above 0: 1 for a network that takes pixel values as they are, such as 0..255"),
        help="Factor on pixel values before mean and std: 1 for a network that takes them as they are.  "
        "[default: 1/255; of uint16 1/65535, of float32 1]",
    )
    channel_order: ChannelOrder | None = argument(
        choice(get_args(ChannelOrder)), help="Order the network was trained with."
    )

    def __post_init__(self) -> None:
        settle(self)
        if self.arch is not None and self.arch.lower().endswith(".onnx"):
            if self.weights is not None:
                raise SpecError(f"{self.arch} holds its weights; leave weights {shortened(self.weights)} out")
            object.__setattr__(self, "weights", self.arch)
            object.__setattr__(self, "arch", None)
        if not self.is_onnx_file:
            return
        for name in ("arch", "encoder", "weights_key", "model_args", "keep_aux"):
            if getattr(self, name):
                option = arguments_of(self)[name].flag
                raise SpecError(
                    f"{option} says how to build a model, and {self.weights} is built already; leave it out"
                )

    @property
    def is_onnx_file(self) -> bool:
        """Whether ``weights`` is an ONNX file, the whole model."""
        return self.weights is not None and self.weights.lower().endswith(".onnx")
