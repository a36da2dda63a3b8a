"""The README's first command, shortened: the whole road from matches to a model, its record and a dreamt match."""
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
RUN_FILES = ["manifest.json", "metrics.jsonl", "notebook.ipynb", "notebook.html", "scorecard.json", "rollout.slp", "rollout.json",
             *[f"checkpoints/{name}.safetensors" for name in ("latest", "best", "final")], *[f"checkpoints/{name}.json" for name in ("latest", "best", "final")]]
MANIFEST_KEYS = {"name", "status", "started", "finished", "data_fingerprint", "game_md5s", "config", "config_hash", "git_commit", "machine", "versions", "all_epochs", "card_id", "cost"}


def demo(folder: Path, *options: str) -> str:
    done = subprocess.run([sys.executable, "-m", "melee_wm", "demo", "--out", str(folder), *options], cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def synthetic(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "first"
    return folder, demo(folder, "--minutes", ".5")


@pytest.mark.timeout(900)
def test_run_folder_is_complete(synthetic):
    folder, printed = synthetic
    assert not [name for name in RUN_FILES if not (folder / name).is_file()]
    manifest = json.loads((folder / "manifest.json").read_text())
    assert not MANIFEST_KEYS - manifest.keys()
    assert manifest["status"] == "finished" and manifest["all_epochs"]
    assert "SYNTHETIC" in printed and "notebook.html" in printed


def test_scorecard_stands_beside_doing_nothing(synthetic):
    card = json.loads((synthetic[0] / "scorecard.json").read_text())
    for part in ("all", "calm"):
        position = card["rollout"][part]["position_mae"]
        assert len(position["model"]) == len(position["persistence"]) == len(position["constant_velocity"]) == 20
    assert card["split"] == "val" and card["games"] >= 1
    assert card["teacher_forced"]["action_acc"] > 0.8
    assert card["rollout"]["all"]["position_mae"]["model"][0] < card["rollout"]["all"]["position_mae"]["persistence"][0]


def test_dreamt_match_is_a_replay(synthetic):
    from melee_wm.slp import read_slp
    game = read_slp(synthetic[0] / "rollout.slp")
    assert len(game) > 60 and "synthetic" in str(game.info["synthetic"]).lower()
    dream = json.loads((synthetic[0] / "rollout.json").read_text())
    assert {"schema", "source", "stage", "players", "fps", "frames", "truth"} <= dream.keys() and dream["fps"] == 60


def test_report_opens_in_a_browser(synthetic):
    playwright = pytest.importorskip("playwright.sync_api")
    import shutil
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if not chromium:
        pytest.skip("Chromium is not installed")
    page_file = synthetic[0] / "notebook.html"
    assert not re.findall(r"""(?:src|href)=["']https?://""", page_file.read_text()), "the report must need no server"
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page()
        problems = []
        page.on("pageerror", lambda e: problems.append(str(e)))
        page.on("console", lambda m: problems.append(m.text) if m.type == "error" else None)
        page.on("request", lambda r: problems.append(f"fetches {r.url}") if r.url.startswith("http") else None)
        page.goto(page_file.as_uri())
        text = page.inner_text("body")
        pictures = page.evaluate("[...document.images].map(i => i.complete && i.naturalWidth)")
        browser.close()
    assert not problems
    assert "synthetic" in text.lower() and "keep the speed" in text.lower()
    assert len(pictures) >= 3 and all(pictures)


@pytest.mark.timeout(900)
def test_real_replays_take_the_same_road(replays, tmp_path):
    printed = demo(tmp_path / "real", "--replays", str(replays / "quick"), "--minutes", "0.5")
    assert "SYNTHETIC" not in printed and not [name for name in RUN_FILES if not (tmp_path / "real" / name).is_file()]
    card = json.loads((tmp_path / "real" / "scorecard.json").read_text())
    manifest = json.loads((tmp_path / "real" / "manifest.json").read_text())
    assert card["split"] == "val" and card["games"] == len(manifest["val_md5s"]) == 1 and len(manifest["train_md5s"]) == 3
    assert "synthetic" not in (tmp_path / "real" / "notebook.html").read_text().split("<body")[1].lower()
