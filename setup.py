from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="gn_det",
    version="0.1.0",
    description="Group Normalization for Detectron2, beside its frozen-BatchNorm baselines",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    # `configs/` stands at the top of a checkout, and inside the package once installed
    packages=[*find_packages(include=["gn_det", "gn_det.*"]), "gn_det.configs"],
    package_dir={"gn_det.configs": "configs"},
    package_data={"gn_det.configs": ["**/*.yaml", "**/*.py"], "gn_det.evaluation": ["templates/*"]},
    # Detectron2, torch and torchvision are left to the user: see README
    install_requires=[
        *("jinja2", "matplotlib", "numpy", "pillow", "pycocotools", "safetensors", "shapely>=2"),
    ],
    # timm is what conversions are compared with
    extras_require={"dev": ["mypy", "playwright", "pytest", "pytest-xdist", "ruff", "timm"]},
)
