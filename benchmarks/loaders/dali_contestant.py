"""A DALI pipeline as its users write it: its own reader, crops and colors, sampled by itself, on 8-bit pixels."""

from collections.abc import Sequence
from typing import Any

import torch
from nvidia.dali import fn, pipeline_def, types
from torch.utils.dlpack import from_dlpack

from benchmarks.loaders.contestants import Batches, Epoch, Setup, paths_of
from fastrdm.loaders.spec import ViewSpec

AHEAD = 2  # batches


def by_dali(views: Sequence[ViewSpec], batch: int, images: int, setup: Setup) -> Epoch:
    """Decoded once; each view cropped, colored and normalized by DALI's fused operators."""
    files = [str(path) for path in paths_of(setup.folder)]
    cuda = setup.device.type == "cuda"

    def graph() -> tuple[Any, ...]:
        encoded, numbers = fn.readers.file(
            files=files, labels=list(range(len(files))), random_shuffle=True, initial_fill=len(files), name="files"
        )
        images = fn.decoders.image(encoded, device="mixed" if cuda else "cpu", output_type=types.RGB)
        return (*[view(images, spec) for spec in views], numbers)

    made = pipeline_def(graph, enable_conditionals=True)
    pipe = made(
        batch_size=batch,
        num_threads=setup.workers,
        device_id=torch.cuda.current_device() if cuda else None,
        seed=0,
        prefetch_queue_depth=AHEAD,
    )
    pipe.build()
    started: list[bool] = []

    def epoch() -> Batches:
        """No more batches are begun than are handed out: what runs on would be done on the clock of another."""
        steps = images // batch
        assert steps >= AHEAD
        for _ in range(AHEAD if started else 1):  # a pipeline's first call begins AHEAD batches
            pipe.schedule_run()
        started.append(True)
        for step in range(steps):
            *outputs, numbers = pipe.share_outputs()
            made = [from_dlpack(output.as_tensor()).permute(0, 3, 1, 2) for output in outputs]
            yield made, from_dlpack(numbers.as_tensor()).flatten().long()
            pipe.release_outputs()
            if step + AHEAD < steps:
                pipe.schedule_run()

    return epoch


def view(images: Any, spec: ViewSpec) -> Any:
    """One view (S, S, 3) float32; what a sample was not drawn for is not computed."""
    kind = types.INTERP_CUBIC if spec.interpolation == "bicubic" else types.INTERP_LINEAR
    x = fn.random_resized_crop(
        images,
        size=(spec.size, spec.size),
        random_area=spec.scale,
        random_aspect_ratio=spec.ratio,
        interp_type=kind,
        antialias=True,
    )
    if chance(spec.jitter):
        x = fn.color_twist(
            x,
            brightness=around(spec.brightness),
            contrast=around(spec.contrast),
            saturation=around(spec.saturation),
            hue=fn.random.uniform(range=(-360 * spec.hue, 360 * spec.hue)),
        )
    if chance(spec.grayscale):
        x = fn.saturation(x, saturation=0.0)
    if spec.blur > 0 and chance(spec.blur):
        x = fn.gaussian_blur(x, sigma=fn.random.uniform(range=spec.blur_sigma), window_size=spec.blur_kernel)
    if spec.solarize > 0 and chance(spec.solarize):
        over = x >= spec.solarize_threshold
        x = fn.cast(over * (255 - x) + (1 - over) * x, dtype=types.UINT8)
    return fn.crop_mirror_normalize(
        x,
        mirror=fn.random.coin_flip(probability=spec.flip),
        mean=[255 * mean for mean in spec.mean],
        std=[255 * std for std in spec.std],
        output_layout="HWC",
    )


def chance(probability: float) -> Any:
    return fn.random.coin_flip(probability=probability, dtype=types.BOOL)


def around(strength: float) -> Any:
    return fn.random.uniform(range=(max(0.0, 1 - strength), 1 + strength))
