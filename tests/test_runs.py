"""Run notebooks as commands meet them: executed, interrupted, killed, resumed, opened in a browser."""
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest

from melee_wm.checkpoint import MANIFEST_KEYS, read_manifest, read_tensors
from melee_wm.config import load_config
from melee_wm.core import UserError
from melee_wm.execute import execute_run, notebook_parameters, run_notebook
from melee_wm.experiment import run_status
from melee_wm import report
from melee_wm.checkpoint import SHIPPED
from melee_wm.report import linted, physics_headline, show_physics, train_run
from melee_wm.track import read_metrics

ROOT = Path(__file__).resolve().parent.parent
SMALL = ["training.epochs=3", "training.minutes=null", "training.batch_size=256", "training.log_interval=4", "model.hidden=[32, 32]", "evaluation.max_starts=60"]
FILES = ["manifest.json", "metrics.jsonl", "notebook.ipynb", "notebook.html", "rollout.slp", "rollout.json", "scorecard.json",
         *(f"checkpoints/{name}.{ending}" for name in ("latest", "best", "final") for ending in ("safetensors", "json")), "checkpoints/latest.trainer.safetensors"]


@pytest.fixture(scope="session")
def finished(dataset, tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("runs") / "small"
    assert train_run(load_config("toy", SMALL), dataset, run_dir, device="cpu") == 0
    return run_dir


def command(config_overrides, dataset, run_dir, resume=False):
    "The command in a process of its own, as a terminal starts it."
    program = (f"import sys; from melee_wm.config import load_config; from melee_wm.report import train_run; "
               f"sys.exit(train_run(load_config('toy', {config_overrides!r}), {str(dataset)!r}, {str(run_dir)!r}, device='cpu', resume={resume}))")
    return subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE, text=True)


def wait_for(condition, seconds=120):
    end = time.time() + seconds
    while time.time() < end:
        if result := condition(): return result
        time.sleep(.05)
    raise AssertionError("waited in vain")


def children(pid: int) -> list[int]:
    out = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True).stdout
    return [int(p) for p in out.split()]


def alive(pid: int) -> bool:
    try: os.kill(pid, 0)
    except ProcessLookupError: return False
    stat = Path(f"/proc/{pid}/stat")
    return not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] != "Z"


def test_run_notebooks_keep_their_parameters_cell():
    for notebook in (ROOT / "nbs" / "runs").glob("*.ipynb"):
        assert "data" in notebook_parameters(notebook), notebook
    assert (ROOT / "nbs" / "runs" / ".notest").is_file()


def test_papermill_understands_the_parameters_cell(caplog):
    "A comment that it cannot parse costs a line of warning in every run."
    import papermill
    for notebook in (ROOT / "nbs" / "runs").glob("*.ipynb"):
        assert set(papermill.inspect_notebook(str(notebook))) == notebook_parameters(notebook)
    assert "Unable to parse" not in caplog.text


def test_a_run_leaves_everything(finished):
    assert [f for f in FILES if not (finished / f).is_file()] == []
    manifest = read_manifest(finished)
    assert tuple(manifest) == MANIFEST_KEYS
    assert manifest["status"] == "finished" and len(manifest["all_epochs"]) == 3 and len(manifest["game_md5s"]) == 3 and "synthetic" in manifest["synthetic"]
    assert set(manifest["train_md5s"]) | set(manifest["val_md5s"]) == set(manifest["game_md5s"]) and manifest["val_md5s"]
    scorecard = json.loads((finished / "scorecard.json").read_text())
    assert scorecard["config_hash"] == manifest["config_hash"] and scorecard["split"] == "val"
    names = set().union(*(r.keys() for r in read_metrics(finished)))
    assert {"loss/total", "loss/action", "metric/p0_action_acc", "metric/p1_action_acc", "metric/action_acc", "metric/action_change_acc", "metric/position_mae", "metric/damage_mae",
            "val_loss/total", "val_metric/action_change_acc"} <= names


def test_the_record_in_the_notebook(finished):
    cells = nbformat.read(finished / "notebook.ipynb", 4).cells
    kept = [o["data"]["application/vnd.melee-wm+json"] for c in cells for o in c.get("outputs", []) if "application/vnd.melee-wm+json" in o.get("data", {})]
    assert len(kept) == 1 and kept[0]["manifest"]["status"] == "finished" and kept[0]["scorecard"]["rollout"]
    assert [c for c in cells if "injected-parameters" in c.metadata.get("tags", [])]
    assert "\r" not in json.dumps([c.get("outputs", []) for c in cells if c.cell_type == "code"])


def test_the_dream_is_a_replay(finished):
    from melee_wm.slp import read_slp
    game = read_slp(finished / "rollout.slp")
    shown = json.loads((finished / "rollout.json").read_text())
    assert len(game) == len(shown["frames"]["frame"]) and "truth" in shown and "not a match that was played" in game.info["synthetic"]


@pytest.fixture
def shown(monkeypatch):
    "What the report shows: texts, and the figures' labels."
    said = []
    monkeypatch.setattr(report, "_page", said.append)
    monkeypatch.setattr(report.plt, "show", lambda: said.append(" / ".join(ax.get_xlabel() for ax in report.plt.gcf().axes)))
    yield said
    report.plt.close("all")


def test_the_report_asks_the_laws_of_the_dream(finished, shown):
    text = (finished / "notebook.html").read_text()
    assert "Does it obey the game?" in text and "laws of the game that could be asked of its 600 frames" in text and "The worst seconds" in text
    show_physics(finished)
    assert len([s for s in shown if "player-frames" in s]) == 1 and not [s for s in shown if "seconds dreamt" in s], "the law chart, and no survival without long dreams"


def test_the_linter_reads_either_file_of_a_run(finished, tmp_path):
    for name in ("rollout.json", "rollout.slp"): shutil.copy(finished / name, tmp_path)
    by_json = linted(tmp_path)
    (tmp_path / "rollout.json").unlink()
    by_slp = linted(tmp_path)
    assert (by_json["file"], by_slp["file"], by_json["frames"]) == ("rollout.json", "rollout.slp", by_slp["frames"])
    assert by_json["players"] == by_slp["players"] and len(by_json["checked"]) > 10
    assert {n: by_slp["violations_per_1000"][n] for n in by_json["checked"]} == by_json["violations_per_1000"]
    (tmp_path / "rollout.slp").unlink()
    assert linted(tmp_path) is None


def test_what_breaks_is_named_with_its_second(finished, tmp_path, shown):
    "A rollout in which a living fighter jumps across the stage, and long dreams in the scorecard."
    dream = json.loads((finished / "rollout.json").read_text())
    before = linted(finished)
    action = dream["frames"]["players"][1]["action_state"]
    row = next(i for i in range(100, len(action) - 1) if min(action[i - 1:i + 2]) > 13)
    dream["frames"]["players"][1]["x"][row] += 500.
    (tmp_path / "rollout.json").write_text(json.dumps(dream))
    shutil.copy(SHIPPED / "default" / "scorecard.json", tmp_path)
    said = linted(tmp_path)
    assert said["violations_per_1000"]["no_teleport"] > before["violations_per_1000"]["no_teleport"]
    assert "It breaks hard laws" in physics_headline(said) and "“no teleport”" in physics_headline(said)
    show_physics(tmp_path)
    frame = dream["frames"]["frame"][row]
    assert re.search(rf"{re.escape(f'{row/60:.1f}')} s, P\d [^<]+</b> \(frame {frame}\): no teleport", "".join(shown))
    assert [s for s in shown if "seconds dreamt" in s] and [s for s in shown if "player-frames" in s]


def test_old_runs_have_no_such_section(finished, tmp_path, shown):
    show_physics(tmp_path)
    (tmp_path / "scorecard.json").write_text((finished / "scorecard.json").read_text())
    show_physics(tmp_path)
    assert shown == []


def test_a_name_in_use_is_refused(finished, dataset):
    before = (finished / "notebook.ipynb").read_bytes()
    with pytest.raises(UserError, match="in use"): train_run(load_config("toy", SMALL), dataset, finished, device="cpu")
    assert (finished / "notebook.ipynb").read_bytes() == before


def test_mistakes_come_out_as_they_are(dataset, tmp_path):
    with pytest.raises(UserError, match="no parsed dataset"): train_run(load_config("toy", SMALL), tmp_path / "nowhere", tmp_path / "a", device="cpu")
    with pytest.raises(UserError, match="nothing to resume"): train_run(load_config("toy", SMALL), dataset, tmp_path / "b", device="cpu", resume=True)
    with pytest.raises(UserError, match="unknown parameter"): execute_run(run_notebook("train"), tmp_path / "c", {"epocs": 3})
    with pytest.raises(UserError, match="training.best"): train_run(load_config("toy", [*SMALL, "training.best=val_metric/acton_acc"]), dataset, tmp_path / "d", device="cpu")
    assert read_manifest(tmp_path / "d")["status"] == "failed" and "acton_acc" in (tmp_path / "d" / "notebook.html").read_text()


def test_a_killed_run_says_why(dataset, tmp_path):
    assert train_run(load_config("toy", [*SMALL, "training.kill.floors={val_metric/action_change_acc: 0.999}"]), dataset, tmp_path / "killed", device="cpu") == 1
    manifest = read_manifest(tmp_path / "killed")
    assert manifest["status"] == "killed" and "0.999" in manifest["reason"]
    assert "0.999" in (tmp_path / "killed" / "notebook.html").read_text()


def test_kill_9_of_the_command_ends_its_kernel_and_the_run_resumes(dataset, finished, tmp_path):
    run_dir, long = tmp_path / "small", [*SMALL, "training.log_interval=1"]
    process = command(long, dataset, run_dir)
    wait_for(lambda: len(read_metrics(run_dir, "batch")) > 3 or process.poll() is not None)
    kernels = children(process.pid)
    assert len(kernels) == 1
    process.kill()
    process.wait()
    wait_for(lambda: not alive(kernels[0]), 10)
    wait_for(lambda: run_status(run_dir) == "interrupted", 10)
    resumed = command(long, dataset, run_dir, resume=True)
    _, errors = resumed.communicate(timeout=300)
    assert resumed.returncode == 0, errors
    assert run_status(run_dir) == "finished"
    a, b = (read_tensors(d / "checkpoints" / "final.safetensors")[0] for d in (run_dir, finished))
    assert all((a[n] == b[n]).all() for n in a)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_command_ends_cleanly(dataset, tmp_path, number):
    run_dir = tmp_path / "stopped"
    process = command([*SMALL, "training.epochs=500", "training.log_interval=1"], dataset, run_dir)
    wait_for(lambda: len(read_metrics(run_dir, "batch")) > 3 or process.poll() is not None)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number, errors
    assert run_status(run_dir) == "interrupted" and (run_dir / "checkpoints" / "latest.trainer.safetensors").is_file()
    assert (run_dir / "notebook.html").is_file() and "KeyboardInterrupt" in (run_dir / "notebook.ipynb").read_text()
    assert "step" in errors   # the progress bar came through to the terminal


def test_two_commands_one_run(dataset, tmp_path):
    run_dir = tmp_path / "contested"
    process = command([*SMALL, "training.epochs=500", "training.log_interval=1"], dataset, run_dir)
    try:
        wait_for(lambda: len(read_metrics(run_dir, "batch")) > 3 or process.poll() is not None)
        for resume in (False, True):
            with pytest.raises(UserError, match="in use|another process"): train_run(load_config("toy", SMALL), dataset, run_dir, device="cpu", resume=resume)
    finally:
        process.kill()
        process.wait()


def test_the_page_in_a_browser(finished, tmp_path):
    "Opened offline in Chromium: nothing is asked of any server, the pictures are there, it says that the data is synthetic."
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if not chromium: pytest.skip("no Chromium here")
    page_text = (finished / "notebook.html").read_text()
    assert not re.findall(r'(?:src|href)\s*=\s*["\']?(?:https?:)?//', page_text) and "cdnjs" not in page_text and "unpkg" not in page_text
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1200, "height": 900})
        asked, wrong = [], []
        page.on("request", lambda r: asked.append(r.url))
        page.on("pageerror", lambda e: wrong.append(str(e)))
        page.goto(finished.joinpath("notebook.html").as_uri())
        text = page.inner_text("body")
        assert [u for u in asked if not u.startswith(("file:", "data:"))] == [] and wrong == []
        assert "SYNTHETIC" in text and "stand still" in text and "keep the speed" in text
        widths = page.eval_on_selector_all("img", "images => images.map(i => i.naturalWidth)")
        assert len(widths) >= 3 and min(widths) > 300
        assert not page.is_visible("text=from melee_wm.execute import begin")
        page.check("#show-code")
        assert page.is_visible("text=from melee_wm.execute import begin")
        page.screenshot(path=str(tmp_path / "page.png"), full_page=True)
        browser.close()
    assert (tmp_path / "page.png").stat().st_size > 50_000
