import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent


def version() -> str:
    text = (ROOT / "gn_det" / "__init__.py").read_text(encoding="utf-8")
    return re.search(r'^__version__ = "(.+)"$', text, re.MULTILINE)[1]


setup(
    name="gn_det",
    version=version(),
    description="Group Normalization for Detectron2, beside its frozen-BatchNorm baselines",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    project_urls={
        "Paper": "https://arxiv.org/abs/1803.08494",
        "Detectron2": "https://github.com/facebookresearch/detectron2",
    },
    python_requires=">=3.10",
    classifiers=[
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        *(f"Programming Language :: Python :: 3.{minor}" for minor in (10, 11, 12, 13)),
        "Topic :: Scientific/Engineering :: Image Recognition",
        "Typing :: Typed",
    ],
    # `configs/` stands at the top of a checkout, and inside the package once installed
    packages=[*find_packages(include=["gn_det", "gn_det.*"]), "gn_det.configs"],
    package_dir={"gn_det.configs": "configs"},
    package_data={
        "gn_det": ["py.typed"],
        "gn_det.configs": ["**/*.yaml", "**/*.py"],
        "gn_det.evaluation": ["templates/*"],
    },
    entry_points={"console_scripts": ["gn-det = gn_det.cli:main"]},
    # Detectron2, torch and torchvision are left to the user: see README
    install_requires=[
        *("filelock>=3.8", "jinja2>=3.0", "matplotlib>=3.6", "numpy>=1.24", "pillow>=9.4"),
        *("pycocotools>=2.0.11", "safetensors>=0.4", "shapely>=2.0", "tqdm>=4.60"),
    ],
    extras_require={
        "onnx": ["onnx>=1.16", "onnxruntime>=1.18"],
        "openvino": ["onnx>=1.16", "openvino>=2024.4"],
        "video": ["av>=12"],
        "wandb": ["wandb>=0.16"],
        "mlflow": ["mlflow-skinny>=2.10"],
        # timm is what conversions are compared with
        "dev": [
            *("mypy==2.4.1", "playwright", "pytest>=8", "pytest-xdist>=3", "ruff==0.17.6"),
            *("timm>=1.0", "onnx>=1.16", "onnxruntime>=1.18", "openvino>=2024.4", "av>=12"),
        ],
    },
)
