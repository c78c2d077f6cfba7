"""A secret in a URL is in no file of a run and nowhere in its output; a resumed run takes it from the environment."""

import base64
import json
import os
import subprocess
import sys
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest

from paco_ds.config.load import load_recipe
from paco_ds.data.manifest import open_data
from paco_ds.errors import DataError
from paco_ds.report.run_report import write_report
from tests.commands import run_command
from tests.hostile.web import send, send_file, serving
from tests.recipes import write_tiny_recipe

TRAIN = "paco_ds.train"
SECRETS = ("S3CRET", "S1GNED")


def found_in(text: str) -> list[str]:
    return [secret for secret in SECRETS if secret in text]


def test_a_secret_in_a_url_is_nowhere(striped_shards, tmp_path):
    """Trained from a web server that wants a password, then resumed by the run's own recipe."""
    password = base64.b64encode(b"me:S3CRET").decode()
    (tmp_path / "zero.json").write_text(json.dumps({"zero_optimization": {"stage": 1}}))
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password S3CRET\n")
    (tmp_path / "netrc").chmod(0o600)
    run, recipe = tmp_path / "run", tmp_path / "recipe.yaml"

    def answer(request: BaseHTTPRequestHandler) -> None:
        path = Path(striped_shards, request.path.partition("?")[0].rpartition("/")[2])
        if request.headers.get("Authorization") != f"Basic {password}":
            send(request, 401)
        elif not path.is_file():
            send(request, 404)
        else:
            send_file(request, path.read_bytes())

    write_tiny_recipe(recipe, "engine.deepspeed=zero.json", "schedule.epochs=1", "evaluation.every_epochs=1")
    with serving(answer) as url:
        address = url.replace("//", "//me:S3CRET@") + "?X-Amz-Signature=S1GNED"
        with pytest.raises(DataError, match=r"but http://\*\*\*@127.* has 4 classes"):
            open_data(load_recipe(recipe, [f"data.shards={address}", "data.classes=9"]).data, [])
        stop = ("--stop-at-step", 2)
        first = run_command(TRAIN, "--config", recipe, "--set", f"data.shards={address}", "--output", run, *stop)
        # a process that imports for itself: fsspec reads its variables when it is imported
        environment = os.environ | {
            "NETRC": str(tmp_path / "netrc"),
            "FSSPEC_HTTP_CLIENT_KWARGS": '{"trust_env": true}',
        }
        command = [sys.executable, "-m", TRAIN, "--config", str(run / "recipe.yaml"), "--output", str(run)]
        again = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert again.returncode == 0, again.stderr
    for done in (first, again):
        assert found_in(done.stdout + done.stderr) == []
    assert load_recipe(run / "recipe.yaml").data.shards == url.replace("//", "//***@") + "?X-Amz-Signature=***"
    assert (run / "report.html").is_file()
    for path in run.rglob("*"):
        assert path.is_dir() or found_in(path.read_bytes().decode("latin-1")) == [], path


def test_a_page_of_an_older_run_shows_none(tmp_path):
    """Whose recipe.yaml still has it."""
    (tmp_path / "metrics.jsonl").write_text("")
    (tmp_path / "recipe.yaml").write_text("data: {shards: 'https://me:S3CRET@host/d?sig=S1GNED'}\n")
    page = write_report(tmp_path).read_text()
    assert page.count("https://***@host/d?sig=***") == 3
    assert found_in(page) == []
