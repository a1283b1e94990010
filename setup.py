"""Packaging: `fastrdm.loaders` and `fastrdm.kernels` are links to the top-level folders, so find_packages sees them."""

import re
from collections.abc import Sequence
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.sdist import sdist

HERE = Path(__file__).parent
LINKS = (("fastrdm", "kernels"), ("fastrdm", "loaders"))


def match(pattern: str, file: str) -> str:
    """The first group of `pattern` in a file beside this one."""
    found = re.search(pattern, (HERE / file).read_text(encoding="utf-8"), re.MULTILINE)
    if found is None:
        raise ValueError(f"{file} holds no {pattern}")
    return found[1]


def long_description() -> str:
    """The README. Its links to files lead to the repository that CITATION.cff names; without one they become text."""
    target = rf"[\1]({REPOSITORY}/blob/main/\2)" if REPOSITORY else r"\1"
    return re.sub(r"!?\[([^\]]+)\]\((?!https?:|#)([^)]+)\)", target, (HERE / "README.md").read_text(encoding="utf-8"))


class SourceDistribution(sdist):
    """A source archive in which `fastrdm/kernels` and `fastrdm/loaders` are links, as in a checkout."""

    def make_release_tree(self, base_dir: str, files: Sequence[str]) -> None:
        """Leave out what stands below the links, then make the links."""
        super().make_release_tree(base_dir, [f for f in files if Path(f).parts[:2] not in LINKS])
        for package, name in LINKS:
            Path(base_dir, package, name).symlink_to(Path("..", name))


CITATION = (HERE / "CITATION.cff").read_text(encoding="utf-8")
repository = re.search(r"^repository-code: *\"?([^\s\"]+)", CITATION, re.MULTILINE)
REPOSITORY = repository[1] if repository else ""
VISION = ["torchvision>=0.26"]
PLOTS = ["matplotlib>=3.8"]
TEST = [*VISION, "pytest>=8", "pytest-timeout", "pytest-xdist"]
TEST += ["setuptools>=70.1", "timm>=1.0.20", "lightly>=1.5", "tensorboard", *PLOTS]
ONNX = ["onnx>=1.17", "onnxruntime>=1.20", "onnxscript>=0.5"]
TEST += [*ONNX, "transformers>=4.51"]
TEST += ["h5py>=3.11", "pyarrow>=18", "fsspec>=2024.6", "aiohttp>=3.9", "s3fs>=2024.6", "moto[server]>=5"]

setup(
    name="fastrdm",
    version=match(r'^__version__ = "(.+)"$', "fastrdm/__init__.py"),
    description="A fast trainer for non-contrastive self-supervised learning that shows why a run collapses or not",
    long_description=long_description(),
    long_description_content_type="text/markdown",
    author=match(r"^authors:\n  - name: (.+)$", "CITATION.cff"),
    license="MIT",
    project_urls={
        **({"Source": REPOSITORY} if REPOSITORY else {}),
        "Paper": match(r"^    url: (https://arxiv\.org/\S+)$", "CITATION.cff"),
    },
    keywords=[
        "self-supervised learning",
        "representation learning",
        "SimSiam",
        "BYOL",
        "SwAV",
        "DINO",
        "effective rank",
    ],
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Environment :: GPU :: NVIDIA CUDA",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: Scientific/Engineering :: Image Recognition",
        "Typing :: Typed",
    ],
    packages=find_packages(include=["fastrdm", "fastrdm.*"]),
    package_data={
        "fastrdm": ["py.typed", "recipes/**/*.yaml", "recipes/*.yaml"],
        "fastrdm.explore": ["page.html"],
        "fastrdm.report": ["assets/*"],
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
        "tqdm>=4.66",
    ],
    extras_require={
        "test": TEST,
        "bench": [*VISION, *PLOTS, "kornia>=0.8", "albumentations>=2.0"],
        "dev": [*TEST, "ruff", "mypy", "types-PyYAML"],
        "docs": ["mkdocs-material>=9.5", "mkdocstrings[python]>=0.27", "nbclient", "nbformat", "ipykernel"],
        "remote": ["fsspec>=2024.6", "aiohttp>=3.9", "s3fs>=2024.6"],
        "dali": ["nvidia-dali-cuda130>=2.2"],
        "ffcv": ["ffcv>=1.0.2", "opencv-python-headless"],
        "torchcodec": ["torchcodec>=0.16"],
        "onnx": ONNX,
        "parquet": ["pyarrow>=18"],
        "explore": ["umap-learn>=0.5.7"],
        "timm": [*VISION, "timm>=1.0.20"],
        "tensorboard": ["tensorboard", *PLOTS],
        "wandb": ["wandb", *PLOTS],
    },
    cmdclass={"sdist": SourceDistribution},
    entry_points={"console_scripts": ["fastrdm=fastrdm.cli:entry"]},
)
