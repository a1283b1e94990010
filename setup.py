"""Packaging: `fastrdm.loaders` and `fastrdm.kernels` are links to the top-level folders, so find_packages sees them."""

from pathlib import Path

from setuptools import find_packages, setup

VISION = ["torchvision>=0.26"]
TEST = [*VISION, "pytest>=8", "pytest-timeout", "pytest-xdist"]
TEST += ["setuptools>=70.1", "timm>=1.0.20", "lightly>=1.5", "tensorboard"]
PLOTS = ["matplotlib>=3.8"]

setup(
    name="fastrdm",
    version="0.1.0",
    description="A fast trainer for non-contrastive self-supervised learning that shows why a run collapses or not",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    packages=find_packages(include=["fastrdm", "fastrdm.*"]),
    package_data={
        "fastrdm": ["py.typed", "recipes/**/*.yaml", "recipes/*.yaml"],
        "fastrdm.loaders.sources": ["class_lists/*.txt"],
        "fastrdm.kernels.augment": ["csrc/*"],
    },
    python_requires=">=3.10",
    install_requires=[
        "torch>=2.11",
        "numpy>=1.26",
        "pyyaml>=6",
        "pydantic>=2.7",
        "safetensors>=0.4.3",
        "scikit-learn>=1.4",
        "scipy>=1.11",
        "simplejpeg>=1.7",
        "pillow>=10",
    ],
    extras_require={
        "test": TEST,
        "bench": [*VISION, *PLOTS, "kornia>=0.8"],
        "dev": [*TEST, *PLOTS, "ruff", "mypy", "types-PyYAML"],
        "dali": ["nvidia-dali-cuda130>=2.2"],
        "ffcv": ["ffcv>=1.0.2", "opencv-python-headless"],
        "torchcodec": ["torchcodec>=0.16"],
        "timm": [*VISION, "timm>=1.0.20"],
        "tensorboard": ["tensorboard"],
        "wandb": ["wandb"],
    },
    entry_points={"console_scripts": ["fastrdm=fastrdm.cli:entry"]},
)
