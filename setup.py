"""Installation of paco_ds; tested versions stand in constraints.txt."""

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="paco_ds",
    version="0.8.0",
    description="Long-tailed image recognition with PaCo at cluster scale: DeepSpeed, webdataset, Prometheus",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["paco_ds", "paco_ds.*"]),
    package_data={"paco_ds.report": ["templates/*.j2"], "paco_ds": ["py.typed"]},
    install_requires=[
        "torch>=2.9,<3",
        "torchvision>=0.24,<1",
        "deepspeed>=0.19,<0.20",
        "ninja>=1.11",
        "psutil>=5.9,<8",
        "webdataset>=1.0,<2",
        "fsspec>=2025.3",
        "filelock>=3.13,<5",
        "numpy>=2,<3",
        "opencv-python-headless>=4.11,<6",
        "pillow>=11,<14",
        "simplejpeg>=1.8,<2",
        "ijson>=3.3,<4",
        "isal>=1.6,<2",
        "braceexpand>=0.1.7,<1",
        "pydantic>=2.11,<3",
        "pyyaml>=6,<7",
        "safetensors>=0.5,<1",
        "prometheus-client>=0.21,<1",
        "rich>=13,<16",
        "jinja2>=3.1,<4",
        "matplotlib>=3.9,<4",
    ],
    extras_require={
        "dev": [
            "pytest>=8,<10",
            "pytest-timeout>=2.3,<3",
            "ruff>=0.9,<1",
            "mypy>=1.15,<3",
            "types-PyYAML>=6,<7",
            "scikit-learn>=1.5,<2",
            "torchmetrics>=1.6,<2",
            "hypothesis>=6.100,<7",
            "s3fs>=2025.3",
            "moto[server]>=5.1,<6",
            "scipy>=1.11,<2",
            "timm>=1.0.15,<2",
            "fonttools>=4.50,<5",
        ],
        "s3": ["s3fs>=2025.3"],
        "docs": ["mkdocs>=1.6,<2"],
    },
    entry_points={
        "console_scripts": [
            "paco-build-shards = paco_ds.data.pack.command:main",
            "paco-evaluate = paco_ds.evaluate:main",
        ]
    },
)
