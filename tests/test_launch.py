"""Launched trainings: one at a time on a machine, seen to start, told in a line when they fail, not lost when something is killed."""
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from melee_wm import launch as launching
from melee_wm.cards import new_card, read_card, reviewers_of, write_card
from melee_wm.review import sign
from melee_wm.config import load_config
from melee_wm.core import UserError, write_json
from melee_wm.launch import LIVE, Ended, State, ending, held, holder, launch, start_local, state_of, stop, tail, where_to_look, without_record
from melee_wm.timing import data_facts, estimate, hardware, step_time
from melee_wm.track import read_metrics

SMALL = ["training.epochs=3", "training.batch_size=256", "training.log_interval=4", "model.hidden=[32, 32]", "evaluation.max_starts=20", "training.kill.loss_above=1000"]

# A training that is pretended: DIR STEPS LAST_WORDS [SECONDS BEFORE IT]; it waits at each step, and writes what a training writes.
PRETEND = '''
import json, sys, time
from pathlib import Path
run_dir, steps, last_words, before = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], float([*sys.argv, 0][4])
time.sleep(before)
for step in range(1, steps + 1):
    with open(run_dir/"metrics.jsonl", "a") as f: f.write(json.dumps({"kind": "batch", "step": step, "time": time.time()}) + "\\n")
    print(f"step {step}", flush=True); time.sleep(.05)
if last_words: sys.exit(last_words)
'''


@pytest.fixture(scope="session")
def pretend(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("pretend") / "pretend.py"
    path.write_text(PRETEND)
    return str(path)


@pytest.fixture
def runs(tmp_path, monkeypatch):
    "A folder of runs; whatever is still alive in it at the end is ended."
    monkeypatch.setenv("MELEE_WM_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("MELEE_WM_CARDS", str(tmp_path / "cards"))
    yield tmp_path / "runs"
    for beat in (tmp_path / "runs").glob("*/heartbeat.json"):
        if (state := state_of(beat.parent)).pid: psutil.Process(state.pid).kill()
        assert wait_for(lambda: state_of(beat.parent).state not in LIVE, 10)


def go(runs, name, steps=400, last_words="", before=0, pretend=None, **options) -> State:
    "Launch the pretended training."
    return start_local([str(runs / name), str(steps), last_words, str(before)], runs / name, program=pretend, **options)


def toy(dataset, name, *overrides) -> list[str]:
    "The words after `melee-wm` for a real training that takes a second."
    return ["train", "toy", "--data", str(dataset), "--run-name", name, "--device", "cpu", *(word for o in [*SMALL, *overrides] for word in ("--set", o))]


def wait_for(condition, seconds=120., every=.05):
    end = time.time() + seconds
    while time.time() < end:
        if result := condition(): return result
        time.sleep(every)
    raise AssertionError("waited in vain")


def beat_of(run_dir) -> dict: return json.loads((run_dir / "heartbeat.json").read_text())


def one_line(call) -> str:
    with pytest.raises(UserError) as caught: call()
    assert "\n" not in str(caught.value) and "Traceback" not in str(caught.value)
    return str(caught.value)


# Real trainings

def test_a_run_killed_by_its_cards_threshold_is_told(dataset, runs):
    "The experiment has no floor; the signed card does, and the training, which nobody watches, obeys it."
    changed = [*SMALL, "training.epochs=2", "training.log_interval=1000"]
    config = load_config("toy", changed)
    facts, hw = data_facts(dataset, config), hardware("local")
    card = new_card("hopeless", config, "toy", hw, facts, estimate(config, facts, hw, step_time(config, hw)), changed, kill={"floors": {"val_metric/action_change_acc": .999}})
    write_card(card, "# hopeless\n\n## Goal\n\nTo be ended.\n")
    for reviewer in reviewers_of("run"): sign("hopeless", reviewer.name)
    said = one_line(lambda: start_local(toy(dataset, "hopeless", *changed[-2:]), runs / "hopeless"))
    assert "hopeless was killed" in said and "its floor 0.999" in said and "log.txt" in said
    assert state_of(runs / "hopeless").state == "killed" and beat_of(runs / "hopeless")["exit_code"] == 1
    assert json.loads((runs / "hopeless" / "manifest.json").read_text())["card_id"] == "hopeless" and read_card("hopeless")[0].status == "killed"


def test_wandb_that_cannot_start_is_told(dataset, runs, monkeypatch, tmp_path):
    for name in ("WANDB_API_KEY", "WANDB_MODE"): monkeypatch.delenv(name, raising=False)
    for name in ("NETRC", "WANDB_CONFIG_DIR"): monkeypatch.setenv(name, str(tmp_path / name))      # no key of the machine's owner
    with pytest.raises(Ended) as caught: start_local([*toy(dataset, "blind"), "--tracking", "online"], runs / "blind")
    said = str(caught.value)
    assert "\n" not in said and "blind failed before its first batch: no wandb key (tracking online)" in said and "--tracking off" in said and "log.txt" in said
    assert caught.value.exit_code == 2 and state_of(runs / "blind").state == "failed" and not read_metrics(runs / "blind")


def test_a_machine_without_memory_is_told(dataset, runs):
    "The training's kernel is ended by signal 9, as Linux does it; the supervisor sees a command that failed, and what it last held."
    launched = launch(toy(dataset, "large", "training.epochs=2000", "training.log_interval=100000"), runs / "large")
    kernel = wait_for(lambda: launched.poll() is None and [p for p in psutil.Process(launched.pid).children(recursive=True) if "ipykernel_launcher" in " ".join(p.cmdline())], every=.5)[0]
    kernel.kill()
    said = one_line(lambda: launching._stay(runs / "large", launched, 300, False))
    assert "died without a word" in said and "kill -9" in said and "runs out of memory" in said and "GB taken" in said and "training.batch_size" in said


# What does not depend on what is trained

def test_a_launch_is_told_where_to_look_and_nobody_else_may_train(runs, pretend):
    state = go(runs, "long", pretend=pretend)
    told = where_to_look(state, runs / "long")
    for word in (str(runs / "long"), "log.txt", "melee-wm runs tail long --follow", "melee-wm runs stop long", f"process {state.pid}"): assert word in told
    assert "launched already" in one_line(lambda: launch([str(runs / "long"), "1", ""], runs / "long", program=pretend))
    refused = one_line(lambda: go(runs, "second", pretend=pretend))
    assert "got long since 20" in refused and f"process {state.pid}" in refused and "--after long" in refused and "runs stop long" in refused
    assert not (runs / "second").exists(), "a refused launch leaves nothing behind"
    beat = beat_of(runs / "long")
    assert beat["memory"]["held"] > 10e6 and beat["child"] != beat["pid"] and beat["state"] == "running"
    ended = stop(runs / "long")
    assert (ended.state, ended.exit_code) == ("interrupted", -15) and holder(runs) is None and ended.step >= state.step
    again = go(runs, "long", before=1, pretend=pretend)
    assert again.state == "running" and again.step < ended.step + 60 and (runs / "long" / "log.txt").read_text().count("--- 20") == 2, "batches of this launch, not of the one before; one log"


def test_of_four_launches_at_once_one_trains(runs, pretend):
    racers = [subprocess.Popen([sys.executable, "-m", "melee_wm.launch", "start", f"racer{i}", "--program", pretend, "--", str(runs / f"racer{i}"), "60", ""], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for i in range(4)]
    said = [racer.communicate(timeout=60) for racer in racers]
    won = [i for i, racer in enumerate(racers) if racer.returncode == 0]
    assert len(won) == 1 and [r.returncode for i, r in enumerate(racers) if i not in won] == [2 if "melee-wm: this machine" in said[i][1] else 1 for i in range(4) if i not in won]
    for i in range(4):
        if i not in won: assert "this machine is training already" in said[i][1] and said[i][1].count("\n") == 1
    assert json.loads(said[won[0]][0])["state"] == "running" and sum((d / "metrics.jsonl").is_file() for d in runs.iterdir() if d.is_dir()) == 1


@pytest.mark.parametrize("words, code", [("ModuleNotFoundError: No module named 'mamba'", 1), ("", 0)])
def test_a_crash_at_start_up_is_one_line_for_whoever_launched(runs, pretend, words, code):
    done = subprocess.run([sys.executable, "-m", "melee_wm.launch", "start", "crash", "--program", pretend, "--", str(runs / "crash"), "0", words], capture_output=True, text=True)
    assert done.returncode == code
    if code: assert done.stderr == f"melee-wm: crash failed before its first batch: {words}: its log: {runs / 'crash' / 'log.txt'}\n" and not done.stdout
    else: assert json.loads(done.stdout)["state"] == "finished", "a run may be over before a batch is logged"


def test_a_supervisor_killed_hard_takes_its_child_along_and_the_next_launch_works(runs, pretend):
    state = go(runs, "orphan", pretend=pretend)
    child = psutil.Process(beat_of(runs / "orphan")["child"])
    psutil.Process(state.pid).kill()
    assert not psutil.wait_procs([child], timeout=5)[1]
    lost = state_of(runs / "orphan")
    assert lost.state == "lost" and lost.pid is None and f"process {state.pid}" in lost.words and "--resume orphan" in lost.words
    assert holder(runs) is None and go(runs, "next", steps=4, pretend=pretend, to_the_end=True).state == "finished"


def test_a_supervisor_killed_before_its_first_batch_is_told(runs, pretend):
    process = launch([str(runs / "gone"), "400", "", "30"], runs / "gone", program=pretend)
    wait_for(lambda: (runs / "gone" / "heartbeat.json").is_file() and beat_of(runs / "gone")["child"])
    process.kill()
    assert "gone was lost before its first batch" in one_line(lambda: launching._stay(runs / "gone", process, 30, False))


def test_a_closed_terminal_ends_the_launcher_only(runs, pretend):
    launcher = subprocess.Popen([sys.executable, "-m", "melee_wm.launch", "start", "night", "--program", pretend, "--", str(runs / "night"), "400", "", "1"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
    wait_for(lambda: (runs / "night" / "heartbeat.json").is_file())
    for number in (signal.SIGINT, signal.SIGHUP): os.killpg(launcher.pid, number)
    launcher.communicate(timeout=10)
    wait_for(lambda: state_of(runs / "night").state == "running")


def test_runs_stand_in_line(runs, pretend):
    "b waits for a and c for b; b fails, so c does not start, and d, which was told to start anyway, does."
    go(runs, "a", steps=40, pretend=pretend)
    assert go(runs, "b", steps=2, last_words="RuntimeError: no", after="a", pretend=pretend).state == "waiting"
    assert go(runs, "c", after="b", pretend=pretend).state == "waiting"
    assert go(runs, "d", steps=2, after="c", after_failed=True, pretend=pretend).state == "waiting"
    assert [(s.name, s.state) for s in without_record(runs)] == [("a", "running"), ("b", "waiting"), ("c", "waiting"), ("d", "waiting")]
    assert "until a has ended, which is running" in state_of(runs / "b").words and "waits until b" in where_to_look(state_of(runs / "c"), runs / "c")
    wait_for(lambda: state_of(runs / "d").state == "finished")
    assert [state_of(runs / n).state for n in "abcd"] == ["finished", "failed", "not started", "finished"]
    assert "b, which it was to follow, failed: RuntimeError: no" in state_of(runs / "c").words
    times = {n: dict((s, t) for s, t in beat_of(runs / n)["history"]) for n in "abd"}
    assert times["a"]["finished"] <= times["b"]["starting"] and times["b"]["failed"] <= times["d"]["starting"]


def test_who_waits_can_be_stopped_and_lets_others_pass(runs, pretend):
    go(runs, "a", pretend=pretend)
    go(runs, "b", after="a", pretend=pretend)
    assert stop(runs / "b").state == "interrupted" and "while it was waiting" in state_of(runs / "b").words
    assert state_of(runs / "a").state == "running"
    assert stop(runs / "a").state == "interrupted"
    assert "nothing to stop" in one_line(lambda: stop(runs / "a"))
    assert "no such run" in one_line(lambda: go(runs, "c", after="nobody", pretend=pretend))
    assert "a, which it was to follow, was interrupted" in one_line(lambda: go(runs, "c", after="a", pretend=pretend))


def test_a_slow_start_is_not_called_training(runs, pretend):
    state = go(runs, "slow", before=30, wait_seconds=.5, pretend=pretend)
    assert state.state == "starting" and "has NOT trained a batch yet" in where_to_look(state, runs / "slow")


def test_the_log_is_followed_to_its_last_word(runs, pretend):
    go(runs, "loud", steps=40, last_words="ValueError: the end", pretend=pretend)
    text = "".join(tail(runs / "loud", 3, follow=True))
    assert text.endswith("step 40\nValueError: the end\n") and state_of(runs / "loud").state == "failed"
    (runs / "loud" / "log.txt").write_bytes(b"before\ntoy:  1%|a\rtoy:  2%|b\r")
    assert list(tail(runs / "loud", 2)) == ["before\ntoy:  2%|b\r\n"]
    assert "no log" in one_line(lambda: list(tail(runs / "silent")))


def test_a_full_disk_does_not_end_the_supervisor(tmp_path, monkeypatch):
    beat = {"state": "running", "history": []}
    def full(*_): raise UserError("the disk is full", tmp_path)
    monkeypatch.setattr(launching, "write_json", full)
    launching._beat(tmp_path, beat, "running", "step 9")
    assert "the disk is full" in beat["missed"]
    monkeypatch.undo()
    launching._beat(tmp_path, beat, "running", "step 10")
    assert "the disk is full" in json.loads((tmp_path / "heartbeat.json").read_text())["missed"]


def test_states_of_runs_that_were_not_launched(tmp_path):
    for name, manifest in (("done", {"status": "finished", "finished": "2026-11-22T05:00:00Z"}), ("cut", {"status": "running", "started": "2026-11-22T05:00:00Z"})):
        (tmp_path / name).mkdir()
        write_json(tmp_path / name / "manifest.json", manifest)
    assert (state_of(tmp_path / "done").state, state_of(tmp_path / "cut").state) == ("finished", "interrupted")
    beat = dict(state="running", words="step 3", time="2026-11-22T04:00:00Z", pid=1, step=3, url=None, exit_code=None)
    write_json(tmp_path / "done" / "heartbeat.json", beat)
    assert state_of(tmp_path / "done").state == "finished", "resumed in a terminal after its supervisor was lost"
    with launching.FileLock(tmp_path / "cut" / launching.RUN_LOCK):
        assert state_of(tmp_path / "cut").state == "running"
        assert "not a launched run" in one_line(lambda: stop(tmp_path / "cut"))
    shutil.copy(tmp_path / "done" / "heartbeat.json", tmp_path / "cut")
    assert state_of(tmp_path / "cut").state == "lost" and not held(tmp_path / "cut" / launching.LAUNCH_LOCK)


@pytest.mark.parametrize("code, said, status, stopped, expected", [
    (0, "", None, False, "finished"), (1, "x", "killed", False, "killed"), (143, "", None, True, "interrupted"), (-15, "", None, False, "interrupted"),
    (-9, "", None, False, "failed"), (1, "DeadKernelError: Kernel died", None, False, "failed"), (2, "no such experiment", None, False, "failed")])
def test_endings(code, said, status, stopped, expected):
    memory = {"held": 1e9, "taken": 2e9, "total": 4e9}
    state, words = ending(code, said, status and {"status": status, "reason": "too bad"}, stopped, memory)
    assert state == expected and "\n" not in words and words
    assert "ran out of memory: can't allocate memory" in ending(1, "can't allocate memory: 9 bytes", None, False, memory)[1]
    if "Kernel died" in said: assert "its system ended the training" in ending(code, said, None, False, memory, ended_by_system=True)[1]
