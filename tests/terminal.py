"""The program as tests call it."""
import contextlib
import io
from types import SimpleNamespace

import pytest

from melee_wm.cli import main


def melee_wm(*words):
    "The program, in this process: its exit code and what it printed."
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as end:
        main([str(w) for w in words])
    return SimpleNamespace(returncode=end.value.code, stdout=out.getvalue(), stderr=err.getvalue())
