"""torch's compiler after a start that was killed while it compiled."""

import shutil
import subprocess
import sys

import pytest

pytestmark = [pytest.mark.soak, pytest.mark.timeout(900)]

SUM = "import torch; torch.compile(lambda values: values.exp() + 2)(torch.zeros(9))"
MEND = "from paco_ds.models.compile_cache import mend_compile_cache; mend_compile_cache();"


def test_torch_goes_on_after_a_kill(tmp_path, monkeypatch, record):
    """Every library and header cut short; without the mending that is the end of every start."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)

    def run(code):
        return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)

    def cut():
        for path in (*tmp_path.rglob("*.so"), *tmp_path.rglob("*.gch")):
            path.write_bytes(path.read_bytes()[:2000])
        for kept in ("fxgraph", "aotautograd"):
            for folder in tmp_path.rglob(kept):
                shutil.rmtree(folder)

    assert run(SUM).returncode == 0
    cut()
    assert run(SUM).returncode != 0
    cut()
    mended = run(MEND + SUM)
    assert mended.returncode == 0, mended.stderr
    record("engine.compile after a start killed while it compiled", "goes on", True)
