"""What DALI makes of a batch: images that are decoded only, or the views too.

The views are made from images that are decoded once, by every operation of ViewSpec with the parameters it is fed.
Pixels are float32 of 0 to 255 until they are normalized. What a sample was not drawn for costs nothing: DALI's
conditionals send only the samples concerned through an operation.
"""

from collections.abc import Callable, Sequence
from typing import Any

from nvidia.dali import fn, math, pipeline_def, types

from fastrdm.kernels.augment.layout import Adjustment, Column
from fastrdm.loaders.spec import ViewSpec

LUMA = 0.2989, 0.587, 0.114  # ITU-R 601-2
LEVELS = 255
BRIGHTNESS, CONTRAST, HUE = int(Adjustment.BRIGHTNESS), int(Adjustment.CONTRAST), int(Adjustment.HUE)
Node = Any  # nvidia.dali.data_node.DataNode


def pipeline(
    specs: Sequence[ViewSpec] | None,
    source: Callable[[], tuple[Any, ...]],
    *,
    encoded: bool,
    half: bool,
    device_id: int | None,
    batch_size: int,
    threads: int,
) -> Any:
    """A built pipeline: one output (B, S, S, 3) a view, float32, or float16 where `half`; on a GPU if it has an id.

    `source` gives B images, encoded or (H, W, 3) uint8, and the parameters (B, 16) of each view. Without `specs` it
    gives images alone, and the one output (B, bytes of the largest image) uint8 holds each image's pixels in a row.
    """
    gpu = device_id is not None
    if specs is None:
        definition = pipeline_def(rows)
        arguments: tuple[Any, ...] = (source, encoded, gpu)
    else:
        definition = pipeline_def(graph, enable_conditionals=True)
        arguments = (tuple(specs), source, encoded, types.FLOAT16 if half else types.FLOAT, gpu)
    made = definition(
        *arguments,
        batch_size=batch_size,
        num_threads=threads,
        device_id=device_id,
        prefetch_queue_depth=2,
    )
    made.build()
    return made


def graph(
    specs: Sequence[ViewSpec], source: Callable[[], tuple[Any, ...]], encoded: bool, dtype: Any, gpu: bool
) -> tuple[Node, ...]:
    """The nodes of all views."""
    layouts = ["" if encoded else "HWC", *("" for _ in specs)]
    images, *drawn = fn.external_source(source, num_outputs=len(layouts), layout=layouts)
    images = decoded(images, encoded, gpu)
    return tuple([view(images, drawn[number], spec, gpu, dtype) for number, spec in enumerate(specs)])


def rows(source: Callable[[], tuple[Any, ...]], encoded: bool, gpu: bool) -> Node:
    """The nodes of images that are decoded only: one batch in one piece of memory, whatever their sizes."""
    (images,) = fn.external_source(source, num_outputs=1, layout=["" if encoded else "HWC"])
    return fn.pad(fn.reshape(decoded(images, encoded, gpu), shape=[-1], layout=""))


def decoded(images: Node, encoded: bool, gpu: bool) -> Node:
    """Pixels (H, W, 3) uint8, on the GPU where there is one."""
    if encoded:
        device = "mixed" if gpu else "cpu"
        # nvJPEG repeats chroma samples unless told to smooth them, as libjpeg-turbo does on the host
        smooth = True if gpu else None
        images = fn.decoders.image(
            images, device=device, output_type=types.RGB, adjust_orientation=False, jpeg_fancy_upsampling=smooth
        )
    elif gpu:
        images = images.gpu()
    return images


def view(images: Node, drawn: Node, spec: ViewSpec, gpu: bool, dtype: Any) -> Node:
    """One view (S, S, 3) `dtype` of each image (H, W, 3) uint8; `drawn` (16,) float32 lies on the host."""
    values = drawn.gpu() if gpu else drawn
    x = crop(images, drawn, spec)
    if spec.jitter > 0:
        x = jitter(x, drawn, values)
    if spec.grayscale > 0:
        x = grayscale(x, drawn)
    if spec.blur > 0:
        x = blur(x, drawn, min(spec.blur_kernel // 2, spec.size - 1))
    if spec.solarize > 0:
        x = solarize(x, drawn, float(spec.solarize_threshold))
    return fn.crop_mirror_normalize(
        x,
        mirror=fn.cast(drawn[Column.FLIP], dtype=types.INT32),
        mean=[LEVELS * mean for mean in spec.mean],
        std=[LEVELS * std for std in spec.std],
        output_layout="HWC",
        dtype=dtype,
    )


def crop(images: Node, drawn: Node, spec: ViewSpec) -> Node:
    """The box cut out first, so that nothing beyond it enters the resize, as in torchvision."""
    box = fn.cast(drawn[Column.TOP : Column.WIDTH + 1], dtype=types.INT32)
    cut = fn.slice(images, start=box[:2], shape=box[2:], axes=(0, 1))
    kind = types.INTERP_CUBIC if spec.interpolation == "bicubic" else types.INTERP_LINEAR
    x = fn.resize(cut, size=(spec.size, spec.size), interp_type=kind, antialias=True, dtype=types.FLOAT)
    return clamped(x)


def jitter(x: Node, drawn: Node, values: Node) -> Node:
    """The four operations in each sample's own order; a sample that is not jittered has factors of 1 and no turn."""
    for place in range(4):
        turn = drawn[Column.ORDER + place]
        if turn == HUE:
            if drawn[Column.HUE] != 0:
                x = hue(x, values[Column.HUE])
        else:
            if turn == BRIGHTNESS:
                x = clamped(x * values[Column.BRIGHTNESS])
            else:
                if turn == CONTRAST:
                    x = blend(x, fn.reductions.mean(gray(x), axes=(0, 1), keep_dims=True), values[Column.CONTRAST])
                else:
                    x = blend(x, gray(x), values[Column.SATURATION])
    return x


def blend(x: Node, other: Node, factor: Node) -> Node:
    """factor * x + (1 - factor) * other."""
    return clamped(x * factor + other * (1 - factor))


def gray(x: Node) -> Node:
    """(S, S, 1)."""
    return fn.coord_transform(x, M=LUMA)


def grayscale(x: Node, drawn: Node) -> Node:
    """Gray in all channels where it was drawn."""
    if drawn[Column.GRAYSCALE] > 0:
        x = fn.coord_transform(x, M=LUMA * 3)
    return x


def blur(x: Node, drawn: Node, reach: int) -> Node:
    """`reach`: pixels of the kernel to each side of its middle."""
    if drawn[Column.BLUR] > 0:
        x = fn.gaussian_blur(x, sigma=drawn[Column.BLUR], window_size=2 * reach + 1)
    return x


def solarize(x: Node, drawn: Node, threshold: float) -> Node:
    """Values at or above `threshold` inverted where it was drawn."""
    if drawn[Column.SOLARIZE] > 0:
        x = x + (x >= threshold) * (LEVELS - 2 * x)
    return x


def hue(x: Node, turns: Node) -> Node:
    """Rotated by `turns` of the circle at constant HSV saturation and value."""
    red, green, blue = x[:, :, 0:1], x[:, :, 1:2], x[:, :, 2:3]
    high = fn.reductions.max(x, axes=(2,), keep_dims=True)
    span = high - fn.reductions.min(x, axes=(2,), keep_dims=True)
    of_red = high == red
    of_green = (high == green) * (1 - of_red)
    of_blue = 1 - of_red - of_green
    sixth = of_red * (green - blue) + of_green * (2 * span + blue - red) + of_blue * (4 * span + red - green)
    sixth = sixth / math.max(span, 1e-6) + 6 * turns
    place = sixth + types.Constant([5.0, 3.0, 1.0], shape=(1, 1, 3), dtype=types.FLOAT)
    place = place - 6 * math.floor(place / 6)
    return high - span * math.clamp(math.min(place, 4 - place), 0.0, 1.0)


def clamped(x: Node) -> Node:
    return math.clamp(x, 0.0, float(LEVELS))
