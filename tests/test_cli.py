"""The program as a terminal runs it: numbers of the contract, one line for each mistake, exit codes."""
import json
import subprocess
import sys
from pathlib import Path

import pytest
from terminal import melee_wm


ROOT = Path(__file__).resolve().parent.parent


def described(name, *options):
    done = melee_wm("describe", name, "--json", *options)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


# per player, frame, input, control_dim, parameters: the team's records (None: not recorded)
RECORDS = {
    "v1": (56, 112, 1120, 0, 931_422), "v2": (72, 148, 1480, 0, 1_116_138), "v2.1": (89, 182, 1820, 0, 1_290_870),
    "baseline-v22": (89, 182, 1846, 26, 1_360_722), "exp-1a-state-age-embed": (96, 196, 1986, 26, 1_433_602),
    "exp-2a-press-events": (89, 182, 1862, 42, None), "exp-3a-lookahead": (89, 182, 1872, 52, None), "exp-3a-1a2a-lookahead": (96, 196, 2028, 68, None),
    "mamba2-1a": (96, 196, None, 26, 1_206_578), "mamba2-1a-3layer": (96, 196, None, 26, 1_638_602),
    "mamba2-medium-gpu": (96, 196, None, 26, 4_282_386), "mamba2-large": (96, 196, None, 26, 10_592_546)}


@pytest.mark.parametrize("name", RECORDS)
def test_describe_gives_the_recorded_numbers(name):
    result, (per_player, frame, width, control, parameters) = described(name), RECORDS[name]
    encoding = result["encoding"]
    assert (encoding["per_player"], encoding["frame"], encoding["control_dim"]) == (per_player, frame, control)
    assert width is None or encoding["input"] == width
    assert parameters is None or result["model"]["parameters"] == parameters


def test_describe_counts_floats_ints_and_heads():
    plain, embedded = described("baseline-v22"), described("exp-1a-state-age-embed")
    assert [(r["encoding"]["floats_per_player"], r["encoding"]["ints_per_frame"], r["encoding"]["embed_dim"]) for r in (plain, embedded)] == [(29, 15, 60), (28, 17, 68)]
    assert sum(plain["heads"].values()) == 1050 and plain["heads"]["action"] == 800


@pytest.mark.parametrize("words, says", [
    (["describe", "toyy"], "did you mean toy"),
    (["describe", "toy", "--set", "encoding.press_event=true"], "did you mean press_events"),
    (["describe", "toy", "--set", "training.epochs=many"], "training.epochs"),
    (["train", "toy", "--data", "no-such-folder"], "no-such-folder"),
    (["eval", "no-such-run", "--data", "no-such-folder"], "no-such-run"),
    (["data", "build", "no-such-file.slp", "--output", "never-made"], "no-such-file.slp"),
    (["data", "info", "no-such-folder"], "no-such-folder"),
    (["rollout", "no-such-run", "--output", "x.mp4"], "x.mp4"),
    (["practice"], "Missing argument"),
    (["dmeo"], "dmeo"),
    (["demo", "--replays", "no-such-folder"], "no-such-folder"),
])
def test_a_mistake_gets_one_line(words, says):
    done = melee_wm(*words)
    assert done.returncode == 2, done.stderr
    assert says in done.stderr and done.stderr.strip().count("\n") == 0 and "Traceback" not in done.stderr
    assert not (ROOT / "never-made").exists()


def test_a_yaml_of_ones_own(tmp_path):
    (tmp_path / "mine.yaml").write_text("base: toy\ntraining: {lr: 0.002}\n")
    assert described(tmp_path / "mine.yaml")["name"] == "mine"
    (tmp_path / "bad.yaml").write_text("training: {lr: [\n")
    (tmp_path / "typo.yaml").write_text("base: toy\ntrainning: {lr: 0.1}\n")
    (tmp_path / "round.yaml").write_text("base: round.yaml\n")
    for name, says in (("bad", "not readable as YAML"), ("typo", "did you mean training"), ("round", "each other's base")):
        done = melee_wm("describe", tmp_path / f"{name}.yaml")
        assert done.returncode == 2 and says in done.stderr, done.stderr


def test_empty_folder_is_said(tmp_path):
    (tmp_path / "empty").mkdir()
    done = melee_wm("data", "build", tmp_path / "empty", "--output", tmp_path / "out")
    assert done.returncode == 2 and done.stderr.strip().count("\n") == 0


def test_practice_build_info(tmp_path):
    assert melee_wm("practice", tmp_path / "slp", "--games", 2).returncode == 0
    built = json.loads(melee_wm("data", "build", tmp_path / "slp", "--output", tmp_path / "data", "--json").stdout)
    assert built["games_added"] == 2 and built["quarantined"] == []
    again = json.loads(melee_wm("data", "build", tmp_path / "slp", "--output", tmp_path / "data", "--json").stdout)
    assert again["games_added"] == 0 and again["games_skipped"] == 2
    info = json.loads(melee_wm("data", "info", tmp_path / "data", "--json").stdout)
    assert info["games"] == 2 and info["frames"] == built["frames"] and {"bytes", "fingerprint", "characters", "stages", "versions"} <= info.keys()


def test_every_command_has_an_example():
    text = melee_wm("--help").stdout
    for command in ("demo", "practice", "data", "experiments", "describe", "train", "eval", "rollout", "doctor"):
        assert command in text
        if command != "data":
            assert "Example:" in melee_wm(command, "--help").stdout


def test_a_process_of_its_own_answers_alike():
    done = subprocess.run([sys.executable, "-m", "melee_wm", "describe", "toyy"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and not done.stdout


def test_doctor_runs():
    done = melee_wm("doctor")
    assert done.returncode == 0 and "torch" in done.stdout


def test_encode_bench_and_sources(tmp_path, monkeypatch):
    monkeypatch.setenv("MELEE_WM_RUNS", str(tmp_path/"runs"))
    from melee_wm.build import build
    from melee_wm.practice import write_practice
    write_practice(tmp_path/"slp", games=2, seed=0, frames=1600)
    build([tmp_path/"slp"], tmp_path/"data", progress=False)
    done = melee_wm("encode", tmp_path/"data", "--experiment", "mamba2-1a", "--output", tmp_path/"shards", "--json")
    result = json.loads(done.stdout)
    assert done.returncode == 0 and result["games"] == 2 and result["bytes"]/result["frames"] < 120
    info = json.loads(melee_wm("data", "info", tmp_path/"shards", "--json").stdout)
    assert (info["games"], info["frames"], info["fingerprint"]) == (2, result["frames"], result["fingerprint"])
    for words, says in ((["encode", tmp_path/"data", "--output", tmp_path/"other"], "--experiment NAME"),
                        (["encode", tmp_path/"data", "--experiment", "mamba2-1b", "--output", tmp_path/"other"], "did you mean mamba2-1a"),
                        (["train", "projectiles", "--data", tmp_path/"shards"], "fewer projectiles"),
                        (["train", "toy", "--data", tmp_path/"shards", "--streaming"], "nothing to stream"),
                        (["train", "toy", "--data", tmp_path/"data", "--buffer-size", "3"], "add --streaming"),
                        (["bench", "parsing"], "unknown benchmark"),
                        (["data", "fetch", "gangs", "--output", tmp_path], "did you mean gang"),
                        (["data", "fetch", "own", "--output", tmp_path], "by hand")):
        done = melee_wm(*words)
        assert done.returncode == 2 and says in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert not (tmp_path/"other").exists()
    assert {"gang", "own"} <= {s["name"] for s in json.loads(melee_wm("data", "sources", "--json").stdout)["sources"]}
