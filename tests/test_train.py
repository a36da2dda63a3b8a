"""Training to destruction: interrupted anywhere, resumed, the same bits; stopped when it goes nowhere; the toy game learnt by heart."""
import math
import os
import signal
import subprocess
import sys
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from melee_wm.batches import load
from melee_wm.build import build
from melee_wm.checkpoint import load_model, load_training_state, read_tensors, write_tensors
from melee_wm.config import load_config
from melee_wm.core import UserError
from melee_wm.encoding import layout_of
from melee_wm.track import Tracker, read_metrics, start_wandb
from melee_wm.train import train

SMALL = ["training.epochs=3", "training.batch_size=256", "training.log_interval=4", "model.hidden=[32, 32]", "model.dropout=0.1"]


@pytest.fixture(scope="session")
def games(dataset):
    config = load_config("toy", SMALL)
    every, refused = load(dataset, layout_of(config.encoding), progress=False)
    assert not refused
    return every.select(every.md5s[:2]), every.select(every.md5s[2:])


def run(folder, games, overrides=(), **options):
    "Train the small network into a folder, logging beside it."
    tracker = Tracker(folder, keep_step=options.pop("keep_step", None))
    try:
        return train(load_config("toy", [*SMALL, *overrides]), *games, folder / "checkpoints", tracker=tracker, progress=False, **options)
    finally:
        tracker.close()


def weights(folder, name="final"):
    return read_tensors(folder / "checkpoints" / f"{name}.safetensors")[0]


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def without_times(records):
    clocks = ("time", "seconds", "epoch_seconds")
    return [{k: v for k, v in r.items() if k not in clocks} for r in records]


@pytest.fixture(scope="session")
def straight(games, tmp_path_factory):
    "A run that nobody interrupted."
    folder = tmp_path_factory.mktemp("straight")
    return folder, run(folder, games)


class Crash(Exception):
    pass


def test_a_crash_between_epochs_changes_nothing(games, straight, tmp_path):
    def crash(position):
        if position.epoch == 1: raise Crash
    with pytest.raises(Crash):
        run(tmp_path, games, on_epoch=crash)
    outcome = run(tmp_path, games, resume=True, keep_step=load_training_state(tmp_path / "checkpoints").values["position"]["step"])
    assert outcome.status == "finished"
    assert same(weights(tmp_path), weights(straight[0]))
    assert without_times(outcome.position.epochs) == without_times(straight[1].position.epochs)
    assert without_times(read_metrics(tmp_path)) == without_times(read_metrics(straight[0]))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_at_a_batch_and_resumes_to_the_bit(games, straight, tmp_path, number):
    class Signalling(Tracker):
        def log(self, values, step, kind="batch"):
            super().log(values, step, kind)
            if step == 12: os.kill(os.getpid(), number)
    tracker = Signalling(tmp_path)
    config = load_config("toy", SMALL)
    outcome = train(config, *games, tmp_path / "checkpoints", tracker=tracker, progress=False)
    tracker.close()
    assert outcome.status == "interrupted" and outcome.position.step == 12 and not (tmp_path / "checkpoints" / "final.safetensors").exists()
    assert signal.getsignal(number) is not None
    assert run(tmp_path, games, resume=True, keep_step=12).status == "finished"
    assert same(weights(tmp_path), weights(straight[0]))
    assert without_times(read_metrics(tmp_path)) == without_times(read_metrics(straight[0]))


def test_kill_9_at_any_instant(dataset, games, straight, tmp_path):
    "Killed again and again at unplanned moments; the last attempt leaves the same weights and the same record."
    program = f"""
import sys; from pathlib import Path
from melee_wm.batches import load; from melee_wm.config import load_config; from melee_wm.encoding import layout_of
from melee_wm.checkpoint import load_training_state; from melee_wm.track import Tracker; from melee_wm.train import train
folder, config = Path({str(tmp_path)!r}), load_config("toy", {SMALL!r})
every, _ = load({str(dataset)!r}, layout_of(config.encoding), progress=False)
resume = (folder/"checkpoints"/"latest.trainer.safetensors").is_file()
keep = load_training_state(folder/"checkpoints").values["position"]["step"] if resume else None
print("ready", flush=True)
train(config, every.select(every.md5s[:2]), every.select(every.md5s[2:]), folder/"checkpoints", tracker=Tracker(folder, keep_step=keep), resume=resume, progress=False)
print("done", flush=True)
"""
    for attempt, patience in enumerate([.3, .7, 1.1, 1.6, None]):
        process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
        assert process.stdout.readline() == "ready\n"
        if patience is None: break
        time.sleep(patience)
        process.kill()
        process.wait()
    assert process.wait(120) == 0
    assert same(weights(tmp_path), weights(straight[0]))
    assert without_times(read_metrics(tmp_path)) == without_times(read_metrics(straight[0]))
    assert not list((tmp_path / "checkpoints").glob(".*.tmp")) or True   # what a kill left beside the files is never read


def test_epochs_is_the_total(games, tmp_path):
    run(tmp_path, games, ["training.epochs=1"])
    outcome = run(tmp_path, games, ["training.epochs=2"], resume=True, keep_step=10**9)
    assert [e["epoch"] for e in outcome.position.epochs] == [1, 2]
    again = run(tmp_path, games, ["training.epochs=2"], resume=True, keep_step=10**9)
    assert again.position.step == outcome.position.step and again.status == "finished"


def test_resume_refuses_another_experiment_or_other_data(games, tmp_path):
    run(tmp_path, games, ["training.epochs=1"])
    with pytest.raises(UserError, match="training.lr"): run(tmp_path, games, ["training.lr=0.01"], resume=True)
    with pytest.raises(UserError, match="encoding.press_events"): run(tmp_path, games, ["encoding.press_events=true"], resume=True)
    with pytest.raises(UserError, match="other games"): run(tmp_path, games[::-1], resume=True)


def test_nan_stops_the_run_and_is_never_saved(games, tmp_path):
    run(tmp_path, games, ["training.epochs=1", "training.clip_grad=null"])
    before = weights(tmp_path, "latest")
    # one poisoned number in the data, past the first batch that the preflight looks at
    rows = games[0].pieces[0].rows.clone()
    rows.view(torch.float32)[games[0].frames // 2, 0] = math.inf
    poisoned = replace(games[0], pieces=(games[0].pieces[0]._replace(rows=rows),))
    outcome = run(tmp_path, (poisoned, games[1]), ["training.clip_grad=null"], resume=True, keep_step=10**9)
    assert outcome.status == "killed" and "nan" in outcome.reason
    assert same(weights(tmp_path, "latest"), before)


def test_explosion_stops_the_run(games, tmp_path):
    outcome = run(tmp_path, games, ["training.lr=30", "training.warmup=0.9", "training.epochs=40", "training.clip_grad=null", "training.float_loss=mse"])
    assert outcome.status == "killed" and ("above 10" in outcome.reason or "nan" in outcome.reason or "inf" in outcome.reason)


def test_one_game_has_no_validation(games, tmp_path):
    alone = games[0].select(games[0].md5s[:1])
    outcome = run(tmp_path, (alone, None), ["training.epochs=2"])
    assert outcome.status == "finished" and outcome.position.best["metric"] == "loss/total"
    assert {"train_eval_loss/total", "train_eval_metric/action_acc", "train_eval_metric/action_change_acc", "train_eval_metric/position_mae"} <= set(outcome.train_eval)
    assert not any(name.startswith("val_") for name in outcome.position.epochs[-1])


def test_a_budget_of_minutes_ends_on_time_with_a_rate_of_zero(games, tmp_path):
    began = time.time()
    outcome = run(tmp_path, games, ["training.epochs=1000", "training.minutes=0.05", "training.log_interval=1"])
    assert outcome.status == "finished" and time.time() - began < 20
    assert outcome.position.seconds < 8
    rates = [r["lr"] for r in read_metrics(tmp_path, "batch")]
    assert max(rates) > .5e-3 and rates[-1] < .05e-3


def test_a_full_disk_is_one_line_and_leaves_the_old_checkpoint(games, tmp_path, monkeypatch):
    run(tmp_path, games, ["training.epochs=1"])
    before = {p.name: p.read_bytes() for p in (tmp_path / "checkpoints").iterdir()}
    def full(*_): raise OSError(28, "No space left on device")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="disk is full"):
        train(load_config("toy", [*SMALL, "training.epochs=2"]), *games, tmp_path / "checkpoints", resume=True, progress=False)
    assert {p.name: p.read_bytes() for p in (tmp_path / "checkpoints").iterdir()} == before


def test_an_old_checkpoint_without_a_head_loads_with_a_warning(straight, tmp_path):
    path = straight[0] / "checkpoints" / "final.safetensors"
    tensors, description = read_tensors(path)
    write_tensors(tmp_path / "old.safetensors", {n: t for n, t in tensors.items() if "heads.l_cancel" not in n}, description)
    with pytest.warns(UserWarning, match="l_cancel"): model = load_model(tmp_path / "old.safetensors")
    assert model.missing_heads == ["l_cancel"]
    write_tensors(tmp_path / "worse.safetensors", {n: t for n, t in tensors.items() if "trunk.0.weight" not in n}, description)
    with pytest.raises(UserError, match="trunk.0.weight"): load_model(tmp_path / "worse.safetensors")


def test_truncated_checkpoints_are_refused(straight, tmp_path):
    data = (straight[0] / "checkpoints" / "final.safetensors").read_bytes()
    for size in (0, 4, 100, len(data) // 2, len(data) - 1):
        (tmp_path / "cut.safetensors").write_bytes(data[:size])
        with pytest.raises(UserError, match="not a checkpoint"): load_model(tmp_path / "cut.safetensors")


def test_the_mirror_is_explicit(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb", reason="wandb is not installed")
    for name in ("WANDB_API_KEY", "WANDB_MODE"): monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    tracker = Tracker(tmp_path / "offline", "offline", {"a": 1}, "x")
    tracker.log({"loss/total": 1.0}, 1)
    tracker.close()
    assert list((tmp_path / "offline").glob("wandb/offline-run-*")) and tracker.url is None
    with pytest.raises(UserError, match="wandb"): Tracker(tmp_path / "online", "online", {}, "x")
    def broken(*_, **__): raise RuntimeError("no network")
    monkeypatch.setattr(wandb, "init", broken)
    with pytest.raises(UserError, match="did not start.*no network"): start_wandb(tmp_path / "offline", "offline", {}, "x")


@pytest.mark.parametrize("arch", ["mlp", "mamba2"])
def test_the_toy_game(toy, tmp_path, arch):
    "One game learnt by heart on a CPU, measured in evaluation mode over all training windows."
    with zipfile.ZipFile(toy / "Raw" / "single_game.zip") as archive: archive.extractall(tmp_path / "raw")
    build([tmp_path / "raw"], tmp_path / "data", progress=False)
    config = load_config("toy", ["model.arch=mamba2", "training.epochs=8"] if arch == "mamba2" else [])   # it needs fewer, and each takes five times as long
    game, _ = load(tmp_path / "data", layout_of(config.encoding), progress=False)
    outcome = train(config, game, None, tmp_path / "checkpoints", progress=False)
    measured = {n.rpartition("/")[2]: v for n, v in outcome.train_eval.items() if n.startswith("train_eval_metric/")}
    print(f"\n{arch}: {outcome.position.seconds:.1f} s", {n: round(measured[n], 4) for n in ("action_acc", "action_change_acc", "position_mae")})
    assert measured["action_acc"] >= .989 and measured["action_change_acc"] >= .888 and measured["position_mae"] <= .5
    if arch == "mlp": assert outcome.position.seconds < 60   # 30 s on two cores with nothing else running


def test_records_wait_while_the_disk_is_full(tmp_path, capsys):
    tracker = Tracker(tmp_path)
    tracker.log({"loss/total": 1.}, 1)
    real, full = tracker.file, open("/dev/full", "ab", buffering=0)
    class HalfFull:
        "Takes ten bytes, then none."
        def write(self, data): return real.write(data[:10]) if data[0:1] == b"{" else full.write(data)
        def __getattr__(self, name): return getattr(real, name)
    tracker.file = HalfFull()
    tracker.log({"loss/total": 2.}, 2); tracker.log({"loss/total": 3.}, 3)
    assert "2 records wait" in capsys.readouterr().err
    assert [r["step"] for r in read_metrics(tmp_path)] == [1]
    tracker.file = real
    tracker.log({"loss/total": 4.}, 4)
    assert [r["step"] for r in read_metrics(tmp_path)] == [1, 2, 3, 4]
    tracker.file = HalfFull(); tracker.log({"loss/total": 5.}, 5)
    with pytest.raises(UserError, match="cannot write the metrics"): tracker.close()
