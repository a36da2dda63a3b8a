"""The program as tests call it, in this process or in several."""
import contextlib
import io
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from melee_wm.cli import main

ROOT = Path(__file__).resolve().parent.parent


def melee_wm(*words):
    "The program, in this process: its exit code and what it printed."
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as end:
        main([str(w) for w in words])
    return SimpleNamespace(returncode=end.value.code, stdout=out.getvalue(), stderr=err.getvalue())


def torchrun(ranks: int, *arguments, timeout: int = 120) -> subprocess.CompletedProcess:
    "Processes of this machine, started as anybody would start them."
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])}
    return subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), *map(str, arguments)], capture_output=True, text=True, timeout=timeout, env=environment)
