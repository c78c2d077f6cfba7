"""The metadata is in pyproject.toml. This is the one rule by which a wheel carries ds_configs/ and shards/."""

import shutil

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildPy(build_py):
    """Puts recipes, tables, DeepSpeed JSON and cards into the package, where paco_ds/config/shipped.py looks."""

    def run(self):
        super().run()
        if self.editable_mode:  # a checkout is used as it is
            return
        for folder in ("ds_configs", "shards"):
            target = f"{self.build_lib}/paco_ds/shipped/{folder}"
            shutil.rmtree(target, ignore_errors=True)  # of an earlier build
            shutil.copytree(folder, target, ignore=shutil.ignore_patterns("*.py", "__pycache__"))


setup(cmdclass={"build_py": BuildPy})
