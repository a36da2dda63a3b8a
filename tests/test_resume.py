"""Killed anywhere, in any mode of training, and resumed: not one bit differs. Several processes give the losses of one, and exchange checkpoints with it.

`python -m pytest tests/test_resume.py --kills 20` spreads twenty kills over all modes; the suite makes three.
"""
import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from terminal import torchrun
from torch.optim.optimizer import register_optimizer_step_pre_hook

from melee_wm.batches import from_games
from melee_wm.checkpoint import has_training_state, load_training_state, read_tensors
from melee_wm.config import load_config
from melee_wm.core import UserError, quick_replays
from melee_wm.devices import Team, leave
from melee_wm.encoding import layout_of
from melee_wm.practice import practice_match
from melee_wm.slp import read_slp
from melee_wm.track import Tracker, read_metrics
from melee_wm.train import train

ROOT = Path(__file__).resolve().parent.parent
SMALL = ["training.epochs=2", "training.log_interval=5", "model.dropout=0.1", "model.context_len=4", "evaluation.horizon=4"]
MLP = ["model.hidden=[32, 32]", "training.batch_size=64"]
MAMBA2 = ["model.arch=mamba2", "model.d_model=32", "model.d_state=8", "model.headdim=16", "model.chunk_size=8", "training.batch_size=96"]
SEQUENCES = [*MAMBA2, "training.sequence_len=16", "training.batch_size=3"]
MODES = {
    "sequences, forcing": [*SEQUENCES, "training.self_forcing={share: 0.5, steps: 2}", "training.scheduled_sampling={rate: 0.5, anneal_epochs: 1}", "training.context_noise=0.01"],
    "windows, mlp": MLP,
    "sequences, mamba2, accumulate": [*SEQUENCES, "training.accumulate=2"],
    "sequences, mamba2": SEQUENCES,
    "windows, mamba2": MAMBA2,
    "windows, mlp, accumulate": [*MLP, "training.accumulate=2"],
}


def pytest_generate_tests(metafunc):
    if "mode" in metafunc.fixturenames: metafunc.parametrize("mode", list(shared_out(metafunc.config.getoption("--kills"))))


def shared_out(kills: int) -> dict[str, int]:
    "How often the training of each mode is killed."
    counts = {mode: len(range(i, kills, len(MODES))) for i, mode in enumerate(MODES)}
    return {mode: n for mode, n in counts.items() if n}


# What the training processes do: this file is also their program.

def games(config):
    "The first seconds of three games to train on and of one to validate: real ones where there are any."
    layout, real = layout_of(config.encoding), [(p.stem, read_slp(p)) for p in quick_replays()[:4]]
    def cut(game, frames): return replace(game, columns={k: v[200:200 + frames] for k, v in game.columns.items()}, items=None, stage_events=None)
    every = from_games([(md5, cut(game, frames)) for (md5, game), frames in zip(real or [(f"practice-{seed}", practice_match(seed, frames=700)) for seed in range(4)], (470, 400, 310, 150))], layout)
    return every.select(every.md5s[:3]), every.select(every.md5s[3:])


def learn(folder: Path, config, some, **options):
    "Train into a folder, or go on with what is there; `metrics.jsonl` as a run keeps it."
    resume, main = has_training_state(folder / "checkpoints"), os.environ.get("RANK", "0") == "0"
    tracker = Tracker(folder, keep_step=load_training_state(folder / "checkpoints").values["position"]["step"] if resume else None) if main else None
    return train(config, *some, folder / "checkpoints", tracker=tracker, resume=resume, progress=False, **options)


def die_while_writing(countdown: int):
    "Make this process kill itself at one of its next file operations: before it, after it, or half-way through a write."
    left = [countdown]
    def deadly(operation, half=None):
        def call(*arguments, **options):
            left[0] -= 1
            if left[0] == 0:
                if half: half(*arguments)
                elif countdown % 2: operation(*arguments, **options)
                os.kill(os.getpid(), signal.SIGKILL)
            return operation(*arguments, **options)
        return call
    for name in ("fsync", "replace", "link"): setattr(os, name, deadly(getattr(os, name)))
    whole = Path.write_bytes
    Path.write_bytes = deadly(whole, lambda path, data: whole(path, data[:len(data) // 2]))


def die_while_training(steps: int, seconds: float):
    "Make this process kill itself some seconds after so many steps, whatever it is doing then."
    left = [steps]
    def count(*_):
        left[0] -= 1
        if left[0] == 0: threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL)).start()
    register_optimizer_step_pre_hook(count)


def in_child(action) -> bool:
    "Run something in a process of its own; whether it came to its end, and was not killed."
    child = os.fork()
    if not child:
        try:
            action()
            os._exit(0)
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, "training failed"
    return os.WIFEXITED(status)


def kill_and_resume(folder: Path, mode: str, kills: int, chance: random.Random) -> list[str]:
    "A run that nobody disturbs, and one that is killed so often; what was done to it."
    config = load_config("toy", [*SMALL, *MODES[mode]])
    often, some, done = load_config("toy", [*SMALL, *MODES[mode], "training.checkpoint_minutes=0.001"]), games(config), []
    assert in_child(lambda: learn(folder / "straight", config, some))
    while len(done) < kills:
        way, number = (die_while_writing, (chance.randrange(1, 100),)) if chance.random() < .5 else (die_while_training, (chance.randrange(1, 40 // kills), chance.uniform(0, .1)))
        def go_on():
            way(*number)
            learn(folder / "killed", often, some)
        if in_child(go_on):    # too late: from the beginning
            shutil.rmtree(folder / "killed")
            done.clear()
            continue
        saved = load_training_state(folder / "killed" / "checkpoints").values["position"]["step"] if has_training_state(folder / "killed" / "checkpoints") else 0
        done.append(f"{way.__name__}{number}, saved at step {saved}")
    assert in_child(lambda: learn(folder / "killed", often, some))
    return done


def kill_in_last_save(folder: Path) -> int:
    "A run that nobody disturbs, and its last steps as often as they have file operations, killed at one operation after another; how many there were."
    config = load_config("toy", [*SMALL, *MLP, "training.batch_size=48", "training.log_interval=1", "training.checkpoint_minutes=0.0001"])
    some, straight, kills = (games(config)[1], None), folder / "straight", 0
    learn(straight, config, some)    # in this process: its children then have everything loaded
    while True:
        killed = folder / f"killed{kills}"
        shutil.copytree(straight, killed)
        os.replace(killed / "checkpoints" / "previous.trainer.safetensors", killed / "checkpoints" / "latest.trainer.safetensors")
        for name in ("latest", "final"): (killed / "checkpoints" / f"{name}.safetensors").unlink()
        def go_on():
            die_while_writing(kills + 1)
            learn(killed, config, some)
        if in_child(go_on): return kills
        assert in_child(lambda: learn(killed, config, some))
        kills += 1


class Enough(Exception):
    "The team goes home after its first epoch."


def as_a_team(folder: Path, modes: list[str]):
    "One rank of several: an epoch of each mode, then nothing more."
    def forbidden(*_): raise AssertionError("only the main process writes")
    def enough(position): raise Enough
    if os.environ["RANK"] != "0": os.replace = forbidden
    for mode in modes:
        config = load_config("toy", [*SMALL, *MODES[mode], "model.dropout=0"])
        try: learn(folder / mode, config, games(config), on_epoch=enough)
        except Enough: continue


# What is asked of them.

def without_clocks(value):
    if isinstance(value, dict): return {k: without_clocks(v) for k, v in value.items() if k not in ("time", "seconds", "epoch_seconds")}
    return [without_clocks(v) for v in value] if isinstance(value, list) else value


def differences(a: dict, b: dict) -> list[str]:
    "Names of tensors that are not the same bits."
    def bits(t): return t.contiguous().reshape(-1).view(torch.uint8)
    return [n for n in {**a, **b} if n not in a or n not in b or a[n].shape != b[n].shape or a[n].dtype != b[n].dtype or not torch.equal(bits(a[n]), bits(b[n]))]


def program(*arguments: str) -> str:
    "This file as a program, in one process; what it printed."
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run([sys.executable, __file__, *arguments], capture_output=True, text=True, timeout=800, env=environment)
    assert done.returncode == 0, f"{arguments}: {done.stderr}"
    return done.stdout


def assert_same_run(straight: Path, resumed: Path, story):
    a, b = (load_training_state(run / "checkpoints") for run in (straight, resumed))
    assert not differences(a.tensors, b.tensors), story
    assert any(n.startswith("optimizer.") for n in a.tensors)
    assert without_clocks(a.values["position"]) == without_clocks(b.values["position"]), story
    for name in ("best", "final", "latest"):
        (weights, said), (others, also) = (read_tensors(run / "checkpoints" / f"{name}.safetensors") for run in (straight, resumed))
        assert not differences(weights, others) and without_clocks(said["metrics"]) == without_clocks(also["metrics"]), (name, story)
    assert without_clocks(read_metrics(straight)) == without_clocks(read_metrics(resumed)), story
    assert len(read_metrics(straight, "epoch")) == 2 and len(read_metrics(straight, "batch")) >= 5
    assert not list((resumed / "checkpoints").glob(".*.tmp"))   # what kills left is swept away


@pytest.fixture(scope="module")
def killed(request, tmp_path_factory) -> tuple[Path, dict]:
    "All runs, straight and killed, made by one process and its children; what was done to each mode."
    folder, plan, seed = tmp_path_factory.mktemp("killed"), shared_out(request.config.getoption("--kills")), time.time_ns() % 10**6
    print(said := program("kill", str(folder), str(seed), json.dumps(plan)))
    return folder, json.loads(said)


@pytest.mark.timeout(900)
def test_killed_and_resumed_to_the_bit(mode, killed, request):
    folder, story = killed
    assert len(story[mode]) == shared_out(request.config.getoption("--kills"))[mode]
    assert_same_run(folder / mode / "straight", folder / mode / "killed", story[mode])
    assert any(n.startswith("memory.") for n in load_training_state(folder / mode / "killed" / "checkpoints").tensors) == ("sequences" in mode)


@pytest.mark.timeout(900)
def test_killed_at_every_file_operation_of_the_last_save(tmp_path):
    kills = int(program("last", str(tmp_path)))
    assert kills >= 12
    for i in range(kills): assert_same_run(tmp_path / "straight", tmp_path / f"killed{i}", f"file operation {i + 1} of {kills}")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    "One short run that nobody disturbs: folder, configuration, games."
    folder, config = tmp_path_factory.mktemp("whole"), load_config("toy", [*SMALL, *MLP, "training.checkpoint_minutes=0.0001"])
    some = games(config)
    assert learn(folder, config, some).status == "finished"
    return folder, config, some


def final(folder): return read_tensors(folder / "checkpoints" / "final.safetensors")[0]


def test_a_floor_is_asked_again_of_a_resumed_run(whole, tmp_path):
    "A run may be killed between the state of its last epoch and the question whether it may go on."
    folder, config, some = whole
    def resumed(floor):
        shutil.copytree(folder, tmp_path / str(floor))
        kill = config.training.kill.model_copy(update={"floors": {"val_metric/action_acc": floor}})
        return learn(tmp_path / str(floor), config.model_copy(update={"training": config.training.model_copy(update={"kill": kill})}), some)
    assert resumed(.01).status == "finished"
    outcome = resumed(.999)
    assert outcome.status == "killed" and "its floor 0.999" in outcome.reason


@pytest.mark.parametrize("damage", [lambda data: data[:len(data) // 3], lambda data: data[:-4096] + bytes(4096), lambda data: b""], ids=["half-written", "zeros at the end", "empty"])
def test_a_torn_state_costs_minutes_not_the_run(whole, tmp_path, damage):
    folder, config, some = whole
    def enough(position): raise Enough
    with pytest.raises(Enough): learn(tmp_path, config, some, on_epoch=enough)
    latest, previous = (tmp_path / "checkpoints" / f"{name}.trainer.safetensors" for name in ("latest", "previous"))
    steps = [read_tensors(path)[1]["position"]["step"] for path in (latest, previous)]
    assert steps[0] > steps[1] > 0
    latest.write_bytes(damage(latest.read_bytes()))
    with pytest.warns(UserWarning, match="resuming from previous.trainer.safetensors"): assert learn(tmp_path, config, some).status == "finished"
    assert not differences(final(folder), final(tmp_path)) and without_clocks(read_metrics(folder)) == without_clocks(read_metrics(tmp_path))


def test_a_disk_that_is_full_for_a_while(whole, tmp_path, monkeypatch, capfd):
    "Checkpoints fail in the middle of the run, loudly; training goes on, and its end is the same. Full at the end, it is an error."
    folder, config, some = whole
    sync, calls = os.fsync, []
    def fsync(file):
        calls.append(file)
        if 20 < len(calls) <= 40: raise OSError(errno.ENOSPC, "No space left on device")
        sync(file)
    monkeypatch.setattr(os, "fsync", fsync)
    assert learn(tmp_path, config, some).status == "finished"
    problems = [r for r in read_metrics(tmp_path) if r["kind"] == "problem"]
    assert len(problems) >= 15 and "disk is full" in problems[0]["problem"] and "NO CHECKPOINT at step" in capfd.readouterr().err
    assert not differences(final(folder), final(tmp_path)) and not list((tmp_path / "checkpoints").glob(".*.tmp"))
    monkeypatch.setattr(os, "fsync", lambda file: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device")))
    before = final(tmp_path)
    with pytest.raises(UserError, match="disk is full"): train(config.model_copy(update={"training": config.training.model_copy(update={"epochs": 3})}), *some, tmp_path / "checkpoints", resume=True, progress=False)
    assert not differences(final(tmp_path), before)


TEAM_MODES = ["windows, mlp", "sequences, mamba2"]


@pytest.fixture(scope="module")
def team(tmp_path_factory) -> Path:
    "An epoch of each mode, trained by two processes."
    folder = tmp_path_factory.mktemp("team")
    done = torchrun(2, __file__, "team", folder, *TEAM_MODES, timeout=300)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.timeout(300)
@pytest.mark.parametrize("team_mode", TEAM_MODES)
def test_two_processes_begin_and_one_goes_on(team_mode, team, tmp_path):
    "The losses of one process, to the rounding of sums; and what two saved, one continues."
    config = load_config("toy", [*SMALL, *MODES[team_mode], "model.dropout=0"])
    some = games(config)
    assert learn(tmp_path, config, some).status == "finished"
    assert len(read_metrics(team / team_mode, "epoch")) == 1
    assert learn(team / team_mode, config, some).status == "finished"
    alone, shared = (without_clocks(read_metrics(run)) for run in (tmp_path, team / team_mode))
    assert [(r["kind"], r["step"]) for r in alone] == [(r["kind"], r["step"]) for r in shared]
    for one, two in zip(alone, shared):
        assert {n: v for n, v in two.items() if "loss/" in n or n == "lr"} == pytest.approx({n: v for n, v in one.items() if "loss/" in n or n == "lr"}, rel=2e-5)
    first, same = alone[0], shared[0]
    assert same["loss/total"] == pytest.approx(first["loss/total"], rel=1e-5)   # before roundings have grown


if __name__ == "__main__":
    torch.set_num_threads(1)
    what, folder, *rest = sys.argv[1:]
    if what == "team":
        as_a_team(Path(folder), rest)
        leave(Team(int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))))
    elif what == "last": print(kill_in_last_save(Path(folder)))
    else: print(json.dumps({mode: kill_and_resume(Path(folder) / mode, mode, kills, random.Random(f"{rest[0]} {mode}")) for mode, kills in json.loads(rest[1]).items()}))
