"""Package `bissl_zoo`, with `configs/` as `bissl_zoo/configs`."""

import re
from pathlib import Path

from setuptools import find_namespace_packages, find_packages, setup

ROOT = Path(__file__).parent
CONFIGS = [f"bissl_zoo.configs.{name}" for name in find_namespace_packages(str(ROOT / "configs"))]
DOCS = ["mkdocs-material>=9.5,<10", "mkdocstrings[python]>=0.27", "latex2mathml>=3.77"]
#: what loading, predicting and the zoo do without
TRAIN = ["pycocotools>=2.0.8", "scipy>=1.11.4", "scikit-learn>=1.4.2", "tensorboard>=2.15.2"]
REPORT = ["matplotlib>=3.8.4", "jinja2>=3.1.4", "scikit-learn>=1.4.2"]
SEARCH = ["optuna>=4"]
HUB = ["huggingface_hub>=1.0"]
ONNX = ["onnx>=1.16", "onnxscript>=0.2"]

setup(
    name="bissl_zoo",
    version=re.search(r'__version__ = "(.+)"', (ROOT / "bissl_zoo" / "__init__.py").read_text()).group(1),
    description="BiSSL: align a self-supervised backbone with its downstream task, and a zoo of the results",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10,<3.14",
    packages=[*find_packages(include=["bissl_zoo", "bissl_zoo.*"]), "bissl_zoo.configs", *CONFIGS],
    package_dir={"bissl_zoo.configs": "configs"},
    package_data={"bissl_zoo.report": ["templates/*"]},
    entry_points={"console_scripts": ["bissl = bissl_zoo.cli:main"]},
    install_requires=[
        # floors as in requirements/floors.txt
        "torch>=2.6",  # loads with weights_only by default
        "torchvision>=0.21",  # the release that belongs to torch 2.6
        "timm>=1.0.31,<2",  # earlier releases cannot load what is published, or fail in Backbone.split
        # the pins of Detectron2, so that both can be installed in one environment
        "omegaconf>=2.3,<2.4",
        "iopath>=0.1.9,<0.1.10",
        "fvcore>=0.1.5.post20221221,<0.1.6",
        "numpy>=1.26.4",
        "pillow>=10.3",
        "pyyaml>=6.0.1",
        "safetensors>=0.4.3",
        "defusedxml>=0.7.1",
        "tabulate>=0.9",
        "rich>=13.7.1",
        "tqdm>=4.66.1",
        "platformdirs>=4.2",
        "portalocker>=3.0",
        "fsspec[http]>=2024.2",
    ],
    extras_require={
        "train": TRAIN,
        "report": REPORT,
        "all": [*TRAIN, *REPORT, *SEARCH, *HUB, *ONNX],
        "s3": ["s3fs>=2023.5"],  # zoos and shards on s3://
        "hub": HUB,  # zoos on hf://; timm brings any release
        "gs": ["gcsfs>=2023.5"],
        "search": SEARCH,  # for bissl search
        "ray": ["ray>=2.9"],  # for bissl search and bissl compare with --engine ray
        "wandb": ["wandb>=0.19"],  # train.writers=[json,tensorboard,wandb]
        "docs": DOCS,
        "onnx": ONNX,
        "test": [
            *("pytest>=8", "pytest-xdist>=3.5", "hypothesis>=6", "ruff>=0.9"),
            *(*TRAIN, *REPORT, *SEARCH, *HUB, *ONNX, "onnxruntime>=1.18"),
            *("lightly>=1.6", "webdataset>=1.0", "torchmetrics>=1.4"),  # references for losses, shards and metrics
            "wandb>=0.19",
            *DOCS,
        ],
    },
    classifiers=[f"Programming Language :: Python :: 3.{minor}" for minor in (10, 11, 12, 13)],
)
