"""How other projects lay out their files of weights, and which layouts are written. No torch."""

from typing import Literal, NamedTuple

Branch = Literal["online", "target"]


class EncoderKeys(NamedTuple):
    """Where a file keeps one branch's encoder; of several names the first that is there counts."""

    holders: tuple[str, ...]  # key of the file that holds the weights, "" for the file itself
    prefixes: tuple[str, ...]  # what stands before the encoder's own keys


class Layout(NamedTuple):
    """How one project writes its files."""

    branches: dict[Branch, EncoderKeys]
    heads: tuple[str, ...]  # what else stands beside the encoder's keys, and is left out


_PLAIN = Layout({"online": EncoderKeys(("state_dict", ""), ("",))}, ("fc.",))
LAYOUTS: dict[str, Layout] = {
    "torchvision": _PLAIN,
    "timm": _PLAIN,
    "solo-learn": Layout(
        {
            "online": EncoderKeys(("state_dict",), ("backbone.", "encoder.")),
            "target": EncoderKeys(("state_dict",), ("momentum_backbone.", "momentum_encoder.")),
        },
        ("fc.",),
    ),
    "simsiam": Layout({"online": EncoderKeys(("state_dict",), ("module.encoder.", "encoder."))}, ("fc.",)),
    "dino": Layout(
        {
            "online": EncoderKeys(("student",), ("module.backbone.", "backbone.")),
            "target": EncoderKeys(
                ("teacher", ""), ("module.backbone.", "backbone.", "")
            ),  # the backbone alone is a teacher
        },
        (),
    ),
    "swav": Layout({"online": EncoderKeys(("state_dict", ""), ("module.", ""))}, ("projection_head.", "prototypes.")),
}
EXPORTS = ("torchvision", "timm", "safetensors", "huggingface", "onnx")
"""Layouts that `fastrdm export` writes."""
