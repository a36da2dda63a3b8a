"""Shared fixtures. With MELEE_WM_NO_SKIP=1 (as in CI) a test that would be skipped fails instead."""
import os
import shutil
import signal
from pathlib import Path
import pytest

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")   # several workers share the cores; read when torch is imported

from melee_wm.core import replays_dir

# Started in the background (nohup ... &) a process is born deaf to Ctrl-C, and so would be the programs whose Ctrl-C is tested.
signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).resolve().parent.parent


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    report = (yield).get_result()
    if report.skipped and os.environ.get("MELEE_WM_NO_SKIP") and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"skipped, which MELEE_WM_NO_SKIP forbids: {report.longrepr}"


@pytest.fixture(scope="session")
def replays() -> Path:
    "The folder of real replays."
    folder = replays_dir()
    if folder is None:
        pytest.skip("no real replays here (settings.ini: replays)")
    return folder


@pytest.fixture(scope="session")
def toy(replays) -> Path:
    "slippi-ai's toy data set, one game raw and parsed."
    folder = replays.parent / "slippi-ai-toy"
    if not folder.is_dir():
        pytest.skip("slippi-ai's toy data set is not here")
    return folder


@pytest.fixture(scope="session")
def practice_slp(tmp_path_factory) -> Path:
    "One synthetic practice match as a .slp file."
    from melee_wm.practice import write_practice
    return write_practice(tmp_path_factory.mktemp("practice"), games=1, seed=0)[0]


@pytest.fixture(scope="session")
def dataset(tmp_path_factory) -> Path:
    "A parsed dataset of three synthetic practice matches."
    from melee_wm.build import build
    from melee_wm.practice import write_practice
    folder = tmp_path_factory.mktemp("dataset")
    write_practice(folder / "slp", games=3, seed=0)
    build([folder / "slp"], folder / "data", progress=False)
    return folder / "data"


# The files that take longest come first, so that with `-n 2` no process is left alone with one of them at the end.
LONGEST = ["test_house", "test_demo", "test_runs", "test_train", "test_static", "test_remote", "test_ssh", "test_launch", "test_resume", "test_play", "test_page", "test_site", "test_batches"]


def pytest_configure(config):
    if hasattr(config.option, "loadscopereorder"): config.option.loadscopereorder = False


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))


def pytest_addoption(parser):
    parser.addoption("--mutations", type=int, default=40, help="how many damaged replays tests/test_fuzz.py makes (in full: 1000)")
    parser.addoption("--kills", type=int, default=3, help="how often tests/test_resume.py kills training processes (in full: 20)")
    parser.addoption("--fuzz-seconds", type=float, default=4, help="how long tests/test_play.py sends rubbish to a server (in full: 60)")
    parser.addoption("--static-frames", type=int, default=120, help="how many frames tests/test_static.py compares with PyTorch in Chromium (in full: 600)")


@pytest.fixture(scope="module")
def browser():
    "The system's Chromium."
    playwright = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if not chromium:
        pytest.skip("Chromium is not installed")
    with playwright.sync_playwright() as p:
        opened = p.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        yield opened
        opened.close()
