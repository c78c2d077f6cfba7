"""The container and the citation of the project."""

import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
DOCKERFILE = (ROOT / "Dockerfile").read_text()


@pytest.mark.skipif(shutil.which("hadolint") is None, reason="there is no hadolint for this kind of machine")
@pytest.mark.parametrize(
    ("change", "status"), [(("", ""), 0), (("USER 10001\n", "USER root\n"), 1), (("FROM", "FORM"), 1)]
)
def test_the_dockerfile_passes_hadolint(change, status):
    """And what is wrong with one is found."""
    done = subprocess.run(["hadolint", "-"], input=DOCKERFILE.replace(*change), capture_output=True, text=True)
    assert done.returncode == status, done.stdout


def test_what_the_dockerfile_copies_is_sent_to_the_builder():
    """.dockerignore sends nothing else, and each thing is there."""
    copied = {word for line in re.findall(r"^COPY (?!--)(.+) \S+$", DOCKERFILE, re.MULTILINE) for word in line.split()}
    sent = set(re.findall(r"^!(.+)$", (ROOT / ".dockerignore").read_text(), re.MULTILINE))
    assert copied == sent
    assert all((ROOT / name).exists() for name in sent)


def test_the_citation_has_what_the_format_requires():
    """Citation File Format 1.2.0; with the license of the package and the paper of the method."""
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0"
    for work in (citation, *citation["references"]):
        assert work["title"]
        assert all(
            author.get("name") or (author["family-names"] and author["given-names"]) for author in work["authors"]
        )
    assert citation["message"]
    assert citation["license"] == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["license"]
    assert "Parametric Contrastive Learning" in [work["title"] for work in citation["references"]]


def test_each_command_is_a_module_too():
    """`deepspeed --module` and `python -m` run it; one that only defines functions would end well and do nothing."""
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    for entry in scripts.values():
        module = ROOT / (entry.partition(":")[0].replace(".", "/") + ".py")
        assert re.search(r'\nif __name__ == "__main__":\n.*main\(\)', module.read_text()), module
