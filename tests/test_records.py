"""Records of runs: real ones, damaged ones, the team's, wandb's; what is new and what changed; and the page that compares them."""
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from melee_wm.checkpoint import update_manifest
from melee_wm.compare import best_of, compare, comparison_html, comparison_text, verdict
from melee_wm.config import load_config, to_dict
from melee_wm.core import UserError
from melee_wm.experiment import run_experiment
from melee_wm.records import (Record, all_records, changes, closest, comparable, config_diff, find_record, local_records, new_features, plain_metrics, runs_table, show, team_records,
                              variables_changed, wandb_record, wandb_records)
from melee_wm.timing import data_facts, fit_calibration

SMALL = ["training.epochs=2", "training.batch_size=256", "training.log_interval=4", "model.hidden=[32, 32]", "evaluation.max_starts=20", "evaluation.bootstrap=20"]
TEAM_RUN = load_config("mamba2-medium-gpu", ["training.epochs=3", "training.log_interval=1000", "training.scheduled_sampling={}"])
SET = "0a1b2c3d4e5f"


@pytest.fixture(scope="module")
def real(dataset, tmp_path_factory):
    "A folder of two real finished runs, and the card of one."
    folder = tmp_path_factory.mktemp("records")
    for name, more in (("plain", []), ("weights", ["training.loss_weights.action=4"])):
        run_experiment(load_config("toy", [*SMALL, *more]), dataset, folder / "runs" / name, device="cpu", progress=False,
                       launch={"card_id": "weights", "estimate": {"hours": .001, "cost": 0.}, "price": 0.} if more else None)
    (folder / "cards").mkdir()
    (folder / "cards" / "weights.md").write_text("a card")
    return folder


@pytest.fixture
def runs(tmp_path, monkeypatch):
    monkeypatch.setenv("MELEE_WM_RUNS", str(tmp_path / "runs"))
    return tmp_path / "runs"


def manifest(folder: Path, name: str, config=TEAM_RUN, **more):
    update_manifest(folder / name, **dict(name=name, status="finished", experiment=config.name, config=to_dict(config), game_md5s=["a", "b"], val_md5s=["b"], data_fingerprint=SET, frames={"train": 1, "val": 1},
                                          all_epochs=[{"epoch": 1, "val_loss/total": .3}], best={"epoch": 1}, seconds=3600., machine={"gpus": []}, started="2026-11-20T08:00:00Z") | more)


def test_a_real_run_becomes_a_record(real, dataset, monkeypatch):
    monkeypatch.setenv("MELEE_WM_RUNS", str(real / "runs"))
    plain, weights = local_records()
    assert (plain.name, plain.source, plain.status, plain.experiment, plain.games, plain.epochs, plain.hardware) == ("plain", "local", "finished", "toy", 3, 2, "CPU")
    assert plain.synthetic and plain.fingerprint == data_facts(dataset, load_config("toy", SMALL)).fingerprint and plain.hours > 0 and plain.parameters and plain.config_hash != weights.config_hash
    assert {"action_change_acc", "action_acc", "position_mae", "damage_mae", "val_loss", "rollout_mae_k20"} <= set(plain.metrics) and not any("/" in n for n in plain.metrics)
    assert (weights.card_id, weights.estimate["hours"], weights.cost) == ("weights", .001, 0) and plain.card_id is None
    assert "SYNTHETIC" in show("plain") and "loss: action 2.0 → 4.0" in show("weights") and "estimated 4 s: " in show("weights")
    assert fit_calibration(local_records()).runs == 0 and fit_calibration(local_records(), shortest=0).runs == 1     # seconds tell nothing
    assert find_record(str(real / "runs" / "plain")) == plain


def test_stale_damaged_and_unfinished_runs(runs):
    for name, status in (("dead", "running"), ("killed", "killed")): manifest(runs, name, status=status, reason="training loss 12 above 10" if status == "killed" else None)
    (runs / "damaged").mkdir(), (runs / "damaged" / "manifest.json").write_text('{"name"')
    (runs / "empty").mkdir(), (runs / "timings.json").write_text("{}")
    manifest(runs, "alive", status="running")
    holder = subprocess.Popen([sys.executable, "-c", f"import sys, time; from filelock import FileLock; lock = FileLock({str(runs/'alive'/'.lock')!r}).acquire(); print('held', flush=True); time.sleep(60)"], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        assert {r.name: r.status for r in local_records()} == {"dead": "interrupted", "killed": "killed", "damaged": "damaged", "alive": "running"}
    finally: holder.kill(), holder.wait()
    assert find_record("alive").status == "interrupted"            # its process was killed; the manifest still says running
    table = runs_table(local_records())
    assert len(table.splitlines()) == 5 and "damaged" in table and "training loss 12" in show("killed")
    assert "damaged" in show("damaged") and local_records(runs / "nowhere") == []
    with pytest.raises(UserError, match="did you mean alive"): find_record("alife")


def test_figures_of_training_games_are_marked(runs):
    manifest(runs, "alone", val_md5s=[], all_epochs=[{"epoch": 1, "loss/total": .5, "metric/action_acc": .9}], train_eval={"train_eval_loss/total": .4, "train_eval_metric/action_acc": .95}, scorecard={"k20": .1})
    assert find_record("alone").metrics == {"train_action_acc": .95, "train_loss": .4, "train_rollout_mae_k20": .1}
    assert plain_metrics({"val_metric/stick_mae": .1, "val_loss/total": 2, "metric/stick_mae": .2, "lr": 1e-3}) == {"stick_mae": .1, "val_loss": 2}


def test_the_teams_records_are_as_recorded():
    records = {r.name: r for r in team_records()}
    def said(name): m = records[name].metrics; return m.get("action_change_acc"), m.get("action_acc"), m.get("position_mae"), m.get("val_loss")
    assert said("v1") == (.298, .879, .72, .930) and said("v2") == (.402, .897, .68, .779) and said("v2.1") == (.362, .884, .78, .807) and said("v2.2") == (.624, .961, .79, .299)
    assert said("baseline-v22") == (.645, .964, .79, None) and said("exp-1a") == (.717, .970, .75, None) and said("exp-2a") == (.653, .963, .78, None) and said("exp-1a2a") == (.701, .967, .75, None)
    assert said("exp-3a") == (.708, .943, .74, None) and said("exp-3a1a") == (.737, .951, .73, None) and said("exp-3a1a2a") == (.670, .938, .92, None) and said("mlp-ceiling") == (.775, .974, .79, None)
    assert said("mamba2-first") == (.672, .967, .64, .290) and said("k10-compare") == (.673, None, .650, .291) and said("k60-compare") == (.684, None, .632, .271)
    assert records["imitation-4k"].metrics == {"button_acc": .992} and records["imitation-4k"].plays and records["team-toy"].games == 1
    assert all(r.epochs == (r.config or {"training": {"epochs": r.epochs}})["training"]["epochs"] and r.status == "finished" and r.source == "team" for r in records.values()) and len(records) == 17


def test_the_teams_large_run_changes_three_things():
    facts, records = data_facts("22k", TEAM_RUN), team_records()
    nearest, difference = closest(TEAM_RUN, records)
    assert nearest.name == "mamba2-first" and difference["training.epochs"] == (2, 3) and difference["training.scheduled_sampling.rate"] == (None, .3)
    assert sorted(variables_changed(TEAM_RUN, facts, nearest)) == ["combat heads", "data scale", "scheduled sampling"]
    assert changes(TEAM_RUN, facts, nearest)["data scale"] == "2,000 games, 2 epochs → 22,000 games, 3 epochs"
    assert new_features(TEAM_RUN, records, facts) == ["combat heads", "scheduled sampling"]
    assert new_features(TEAM_RUN, [r for r in records if r.name != "mlp-ceiling"], facts) == ["combat heads", "scheduled sampling", "data scale"]


def variables(*overrides, name="mamba2-1a", of="mamba2-1a"):
    record = Record("then", "local", "finished", config=to_dict(load_config(of)), games=2000)
    return variables_changed(load_config(name, list(overrides)), None, record)


def test_keys_that_are_one_idea_are_one_variable():
    assert variables() == [] == variables("training.log_interval=7", "training.kill.loss_above=5", "model.chunk_size=5", "evaluation.stride=3", "data.holdout=x", "training.recompute=true")
    assert variables("model.d_model=384", "model.n_layers=4") == ["model size"] and variables("training.lr=0.1", "training.warmup=0.1") == ["learning rate"]
    assert variables("training.self_forcing={}") == ["self-forcing"] and variables("encoding.projectiles=2", "model.heads=[core, kinematics, combat, projectiles]") == ["projectiles"]
    assert variables("training.epochs=4") == ["training length"] and variables("data.max_games=400", "training.epochs=4") == ["data scale"] and variables("training.float_loss=l1", "training.hit_weight=3") == ["loss"]
    assert "architecture" in variables(name="ego") and "model size" not in variables(name="ego")


def test_old_and_foreign_configurations(runs):
    old = to_dict(TEAM_RUN)
    for section, key in (("training", "sequence_len"), ("training", "precision"), ("model", "two_hot"), ("data", "predict_player")): del old[section][key]     # came later
    old["model"]["of_another_project"] = 3
    assert config_diff(old, TEAM_RUN) == {}
    foreign = Record("theirs", "wandb", "finished", config={"model": {"arch": "transformer"}})
    assert "architecture" in variables_changed(TEAM_RUN, None, foreign)
    assert variables_changed(TEAM_RUN, None, Record("bare", "team", "finished")) == ["everything"]
    assert closest(TEAM_RUN, [Record("bare", "team", "finished")]) == (None, {})


def test_only_finished_runs_of_the_same_kind_on_real_games_count():
    same = dict(source="local", config=to_dict(TEAM_RUN), games=30_000)
    others = [Record("failed", status="failed", **same), Record("practice", status="finished", synthetic="practice", **same), Record("fighter", "local", "finished", config=to_dict(load_config("fighter")))]
    assert closest(TEAM_RUN, [*team_records(), *others])[0].name == "mamba2-first" and new_features(TEAM_RUN, others, data_facts("22k", TEAM_RUN))[-1] == "data scale"
    assert comparable(TEAM_RUN, [*team_records(), Record("done", status="finished", **same)])[0].name == "done"
    assert closest(load_config("fighter"), [*team_records(), *others])[0].name == "fighter"


WANDB = {   # the shape of wandb's public API, version 0.31; the values are made up
    "name": "mamba2-smoke", "state": "finished", "created_at": "2026-01-14T09:40:12Z", "url": "https://wandb.ai/team/project/runs/1a2b3c4d",
    "config": {"name": "mamba2-medium-gpu", "data": {"max_games": 2000, "num_games_loaded": 1987, "predict_player": None, "fingerprint": SET}, "model": {"arch": "mamba2", "d_model": 384}, "training": {"epochs": 2, "batch_size": 1024}},
    "summary": {"_runtime": 5520.31, "_step": 31640, "_timestamp": 1768383600.1, "_wandb": {"runtime": 5520}, "epoch": 2, "lr": 0, "loss/total": .31, "val_loss/total": .29, "val_metric/action_change_acc": .672, "val_metric/p0_action_acc": .97,
                "val_metric/action_acc/idle": .99, "metric/action_acc": "NaN", "examples": {"_type": "table-file", "nrows": 3}}}


def test_a_wandb_run_becomes_a_record():
    r = wandb_record(WANDB)
    assert (r.name, r.source, r.status, r.experiment, r.games, r.fingerprint, r.epochs, r.hours, r.started) == ("mamba2-smoke", "wandb", "finished", "mamba2-medium-gpu", 1987, SET, 2, pytest.approx(1.533, abs=.001), "2026-01-14T09:40:12Z")
    assert r.metrics == {"val_loss": .29, "action_change_acc": .672} and not r.plays
    assert "context length" not in variables_changed(TEAM_RUN, None, r)
    assert [wandb_record(WANDB | {"state": s}).status for s in ("running", "crashed", "failed", "killed", "preempted")] == ["running", "failed", "failed", "killed", "interrupted"]


def test_wandb_runs_of_other_shapes():
    dotted = wandb_record(WANDB | {"config": {"_wandb": {"t": 1}, "wandb_version": 1, "data.num_games_loaded": {"value": 4000, "desc": None}, "model": {"value": {"arch": "policy-mlp"}, "desc": None}, "model.width": 9}, "summary": {"val_metric/button_acc": .99, "_runtime": 60}})
    assert dotted.games == 4000 and dotted.config["model"] == {"arch": "policy-mlp", "width": 9} and dotted.plays and dotted.epochs is None and dotted.hours == pytest.approx(1 / 60)
    empty = wandb_record(WANDB | {"config": {}, "summary": {}, "state": "running"})
    assert empty.config is None and empty.metrics == {} and empty.hours is None and empty.games is None
    assert "mamba2-smoke" in runs_table([empty, dotted])


@pytest.fixture
def no_key(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL", "NETRC"): monkeypatch.delenv(name, raising=False)


def test_wandb_without_a_key_is_told_at_once(no_key, monkeypatch, runs):
    began = time.monotonic()
    assert wandb_records() == ([], "no wandb key: set WANDB_API_KEY, or run `wandb login`") and time.monotonic() - began < 1
    records, reason = all_records()
    assert "no wandb key" in reason and len(records) == 17
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert wandb_records() == ([], "WANDB_MODE is offline")


def test_a_wandb_that_never_answers_takes_no_longer_than_allowed(no_key, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
        marker = f"never-{os.getpid()}"
        monkeypatch.setenv("WANDB_ENTITY", marker)
        began = time.monotonic()
        assert wandb_records(timeout=3) == ([], "wandb did not answer within 3 seconds") and time.monotonic() - began < 6
    def left(): return [p for p in Path("/proc").glob("[0-9]*/environ") if marker in _read(p)]
    end = time.monotonic() + 10
    while left() and time.monotonic() < end: time.sleep(.1)
    assert not left()                                              # nothing that the client started lives on


def _read(path: Path) -> str:
    try: return path.read_bytes().decode(errors="replace")
    except OSError: return ""


def test_a_wandb_that_refuses_is_told_in_a_line(no_key, monkeypatch, tmp_path):
    (tmp_path / "wandb.py").write_text("class Api:\n    def __init__(self, timeout): pass\n    def runs(self, path, order, per_page): raise ValueError('Could not find project ' + path)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path)), monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    assert wandb_records() == ([], "wandb could not be asked: ValueError: Could not find project shinewave/melee-worldmodel")


class Graph(BaseHTTPRequestHandler):
    "As much of wandb's server as its own client asks for: who am I, and a page of runs."
    def log_message(self, *words): pass

    def do_POST(self):
        query = json.loads(body).get("query", "") if (body := self.rfile.read(int(self.headers["content-length"]))).startswith(b"{") else ""
        values = {key: {"value": value, "desc": None} for key, value in WANDB["config"].items()} | {"_wandb": {"value": {"cli_version": "0.31.0"}}}
        node = {"id": "UnVu", "tags": [], "sweepName": None, "state": "finished", "config": json.dumps(values), "group": None, "jobType": None, "commit": None, "readOnly": False, "createdAt": WANDB["created_at"], "heartbeatAt": WANDB["created_at"],
                "description": None, "notes": None, "systemMetrics": "{}", "summaryMetrics": json.dumps(WANDB["summary"]), "historyLineCount": 3, "projectId": "1", "user": {"name": "n", "username": "n"}, "historyKeys": None}
        runs = {"edges": [{"node": node | {"name": f"id-{name}", "displayName": name}, "cursor": "c"} for name in ("mamba2-smoke", "mine")], "pageInfo": {"endCursor": "c", "hasNextPage": False}}
        data = {"viewer": {"id": "1", "flags": "{}", "entity": "shinewave", "username": "n", "teams": {"edges": []}}} if "viewer" in query else {"project": {"id": "1", "internalId": "1", "runCount": 2, "readOnly": False, "runs": runs}}
        said = json.dumps({"data": data}).encode()
        self.send_response(200), self.send_header("content-type", "application/json"), self.send_header("content-length", str(len(said))), self.end_headers(), self.wfile.write(said)


def test_wandb_runs_arrive_as_records(no_key, monkeypatch, runs):
    "Through wandb's real client, from a server on loopback."
    pytest.importorskip("wandb")
    with ThreadingHTTPServer(("127.0.0.1", 0), Graph) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.server_port}"), monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
        manifest(runs, "mine")
        records, reason = all_records(timeout=60)
        server.shutdown()
    found = [r for r in records if r.source != "team"]
    assert reason is None and [(r.name, r.source) for r in found] == [("mamba2-smoke", "wandb"), ("mine", "local")]      # what is here is not listed twice
    assert found[0]._replace(note="") == wandb_record(WANDB | {"url": ""}) and found[0].note.endswith("/shinewave/melee-worldmodel/runs/id-mamba2-smoke")


def test_comparison_of_real_runs_for_the_terminal(real, monkeypatch):
    monkeypatch.setenv("MELEE_WM_RUNS", str(real / "runs"))
    c = compare(["plain", "weights"])
    assert c.config == {"training.loss_weights.action": [2., 4.]} and list(c.changed) == ["loss"] and c.best["val_loss"] == []
    text = comparison_text(c)
    assert "SYNTHETIC" in text and "not compared" in text and "variables differ" not in text and text.startswith(verdict(c))
    for names, why in ((["plain"], "two runs or more"), (["plain", "plain"], "two runs or more"), (["plain", "nobody"], "no such run"), (["plain", "imitation-4k"], "no figures in common")):
        with pytest.raises(UserError, match=why): compare(names)


def test_the_best_is_marked_only_where_it_shows():
    assert best_of("action_acc", [.97, .9701, .96]) == [0, 1] and best_of("position_mae", [.5, .4, None]) == [1] and best_of("action_acc", [.97, .9701]) == [] and best_of("val_loss", [.3, None]) == []


def test_what_stands_against_a_comparison_is_said(runs):
    manifest(runs, "one", load_config("mamba2-1a")), manifest(runs, "other", load_config("mamba2-1a", ["training.lr=0.1", "training.seed=1"]), data_fingerprint="ffff", status="killed")
    notes = " ".join(compare(["one", "other", "k10-compare"]).notes)
    assert "different games" in notes and "other is killed" in notes and "not known: k10-compare" in notes
    assert "2 variables differ between one and other (learning rate, seed)" in " ".join(compare(["one", "other"]).notes)


def test_the_page_asks_nobody_and_fits(real, monkeypatch, browser, tmp_path):
    monkeypatch.setenv("MELEE_WM_RUNS", str(real / "runs")), monkeypatch.setenv("MELEE_WM_CARDS", str(real / "cards"))
    path = comparison_html(["plain", "weights", "k60-compare"], tmp_path / "compared.html")
    page, asked = browser.new_page(viewport={"width": 1200, "height": 900}), []
    page.on("request", lambda r: asked.append(r.url))
    page.goto(path.as_uri())
    assert asked == [path.as_uri()] and "1a2b" not in page.content()
    assert page.locator("h2").all_inner_texts() == ["Results", "How they learnt", "What was different", "The runs"]
    header = page.locator("table.figures thead th").all_inner_texts()
    assert [h.strip() for h in header] == ["", "plain", "weights", "k60-compare"] and page.locator("td.best").count() >= 2 and page.locator("svg").count() == 1
    assert page.get_by_role("link", name="card").count() == 1 and (tmp_path / page.get_by_role("link", name="card").get_attribute("href")).resolve() == (real / "cards" / "weights.md").resolve()
    for width in (390, 1440):
        page.set_viewport_size({"width": width, "height": 900})
        assert page.evaluate("document.documentElement.scrollWidth") <= width      # tables scroll, the page does not
    page.close()
    assert not re.search(r"""(?:src|href)=["'](?:https?:)?//""", re.sub(r"<svg.*?</svg>", "", path.read_text(), flags=re.S))
    names = json.dumps([r for r in re.findall(r"xlink:href=\"([^\"]*)", path.read_text()) if not r.startswith("#")])
    assert names == "[]"


def test_names_in_a_page_are_text(runs, tmp_path):
    for name in ("a<b>", "c"): manifest(runs, name, reason="<script>alert(1)</script>")
    text = comparison_html(["a<b>", "c"], tmp_path / "page.html").read_text()
    assert "<script>" not in text and "a&lt;b&gt;" in text
