"""Trainings on a machine reached by ssh: a real server on this machine's loopback, with its own keys, port and configuration."""
import getpass
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from melee_wm.core import UserError
from melee_wm.launch import Ended, state_of, where_to_look
from melee_wm.ssh import ask, check_machine, machine_at, pull, send, start_there, state_there, stop_there, tail_there
from test_launch import one_line, pretend, toy, wait_for  # noqa: F401 (fixtures)

ROOT = Path(__file__).resolve().parent.parent
SSHD = shutil.which("sshd") or ("/usr/sbin/sshd" if Path("/usr/sbin/sshd").is_file() else None)


@pytest.fixture(scope="module")
def sshd(tmp_path_factory):
    "An ssh server for this user alone; yields what the `ssh` setting is to be."
    if not (SSHD and shutil.which("ssh")): pytest.skip("OpenSSH's server or client is not installed")
    folder = tmp_path_factory.mktemp("sshd")
    folder.chmod(0o700)
    for key in ("host", "client"): subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / key)], check=True)
    shutil.copy(folder / "client.pub", folder / "authorized_keys")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (folder / "sshd_config").write_text(f"Port {port}\nListenAddress 127.0.0.1\nHostKey {folder}/host\nPidFile {folder}/pid\nAuthorizedKeysFile {folder}/authorized_keys\n"
                                        "StrictModes no\nUsePAM no\nPasswordAuthentication no\nKbdInteractiveAuthentication no\nPermitRootLogin yes\n")
    (folder / "config").write_text(f"Host desk\n HostName 127.0.0.1\n Port {port}\n User {getpass.getuser()}\n IdentityFile {folder}/client\n IdentitiesOnly yes\n"
                                   f" UserKnownHostsFile {folder}/known\n StrictHostKeyChecking accept-new\n LogLevel ERROR\n")
    if os.geteuid() == 0: Path("/run/sshd").mkdir(exist_ok=True)      # where a server of root's keeps nothing, but insists
    server = subprocess.Popen([SSHD, "-D", "-e", "-f", str(folder / "sshd_config")], stderr=open(folder / "log", "w"))
    command = f"ssh -F {folder}/config"
    for _ in range(100):
        if subprocess.run([*command.split(), "-o", "BatchMode=yes", "desk", "true"], capture_output=True).returncode == 0: break
        time.sleep(.05)
    else: pytest.fail((folder / "log").read_text())
    yield command
    server.terminate()
    server.wait()


@pytest.fixture
def desk(sshd, tmp_path, monkeypatch):
    "A clone on the other side: this one's code, its own settings, runs, cards and interpreter."
    clone = tmp_path / "clone"
    (clone / ".venv" / "bin").mkdir(parents=True)
    for name in ("melee_wm", "nbs", "pyproject.toml", "settings.ini"): (clone / name).symlink_to(ROOT / name)
    python = clone / ".venv" / "bin" / "python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    monkeypatch.setenv("MELEE_WM_SSH", sshd)
    monkeypatch.setenv("MELEE_WM_RUNS", str(tmp_path / "here"))
    yield machine_at(f"ssh:desk:{clone}")
    for beat in (clone / "runs").glob("*/heartbeat.json"):
        pid = json.loads(beat.read_text())["pid"]
        subprocess.run([str(python), "-c", "import sys; from melee_wm.launch import state_of, LIVE; import os; s = state_of(sys.argv[1]); s.pid and os.kill(s.pid, 9)", str(beat.parent)], check=True)
        wait_for(lambda: not Path(f"/proc/{pid}").exists() or "Z" in Path(f"/proc/{pid}/stat").read_text().split()[2], 10)


def test_a_training_over_there(desk, dataset, pretend, tmp_path, capfd):
    "Start, tail, a second start refused by the lock, chain, stop, pull: with a real training, from an experiment file of ours."
    mine = tmp_path / "mine.yaml"
    mine.write_text((ROOT / "melee_wm" / "experiments" / "toy.yaml").read_text())
    words = ["train", str(mine), *toy(dataset, "long", "training.epochs=5000", "training.log_interval=1")[2:]]
    state = start_there(desk, words, "long")
    assert state.state == "running" and state.step >= 1
    said = capfd.readouterr().err
    assert f"{desk}: Python 3" in said and "torch" in said and ("accelerator" in said or "NVIDIA" in said)
    clone = Path(desk.folder)
    assert (clone / "runs" / ".sent" / "long" / "mine.yaml").read_text() == mine.read_text() and (clone / "runs" / "long" / "metrics.jsonl").is_file() and not (tmp_path / "here").exists()
    assert f"runs stop long --on {desk}" in where_to_look(state, "runs/long", str(desk))

    refused = one_line(lambda: start_there(desk, [str(clone / "runs" / "second"), "9", ""], "second", program=pretend))
    assert "this machine is training already" in refused and "got long since" in refused and f"process {state.pid}" in refused and f"melee-wm runs stop long --on {desk}" in refused
    assert not (clone / "runs" / "second").exists()

    text = "".join(tail_there(desk, "long", 5))
    assert "toy" in text or "step" in text
    chained = start_there(desk, [str(clone / "runs" / "second"), "9", ""], "second", after="long", after_failed=True, program=pretend)
    assert chained.state == "waiting" and "until long has ended" in chained.words and state_there(desk, "long").state == "running"

    stopped = stop_there(desk, "long")
    assert stopped.state == "interrupted" and "nothing to stop" in one_line(lambda: stop_there(desk, "long"))
    assert "step 9\n" in "".join(tail_there(desk, "second", follow=True)) and state_there(desk, "second").state == "finished"

    home = pull(desk, "long")
    assert home == tmp_path / "here" / "long" and (home / "checkpoints" / "latest.trainer.safetensors").is_file() and not list(home.glob("*.lock"))
    assert json.loads((home / "manifest.json").read_text())["status"] == "interrupted"
    assert state_of(home).state == "interrupted" and f"on {desk}, as it was at" in state_of(home).words
    assert pull(desk, "long") == home and not list((tmp_path / "here").glob(".*"))


def test_a_system_python_is_found_out_before_anything_starts(desk):
    bare = Path(desk.folder) / "python-without-packages"
    bare.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S -E "$@"\n')
    bare.chmod(0o755)
    said = one_line(lambda: start_there(desk._replace(python=str(bare)), ["train", "toy"], "never"))
    assert "the interpreter there cannot train" in said and "torch" in said and "pip install" in said and not (Path(desk.folder) / "runs").exists()
    assert "no interpreter there" in one_line(lambda: check_machine(desk._replace(python=".venv/bin/pythn")))
    assert "no clone of the project there" in one_line(lambda: check_machine(desk._replace(folder="no/such/place")))
    if Path("/usr/bin/python3").is_file() and "/usr/bin" != str(Path(sys.executable).parent):
        found = subprocess.run(["/usr/bin/python3", "-c", "import torch"], capture_output=True).returncode
        if found: assert "cannot train" in one_line(lambda: check_machine(desk._replace(python="/usr/bin/python3")))


def test_a_machine_that_is_not_there(desk, monkeypatch):
    assert "cannot reach the machine (desk-2)" in one_line(lambda: check_machine(desk._replace(host="desk-2")))
    monkeypatch.setenv("MELEE_WM_SSH", "no-such-ssh")
    assert "no such program" in one_line(lambda: ask(desk, "true"))


def test_what_fails_over_there_is_one_line_here(desk, pretend, tmp_path):
    there = f"{desk.folder}/runs/crash"
    with pytest.raises(Ended) as caught: start_there(desk, [there, "0", "RuntimeError: expected 46, got 44"], "crash", program=pretend)
    assert str(caught.value) == f"on {desk}: crash failed before its first batch: RuntimeError: expected 46, got 44: its log: {there}/log.txt" and caught.value.exit_code == 1
    assert "no such run" in one_line(lambda: state_there(desk, "nobody")) and "no such run" in one_line(lambda: list(tail_there(desk, "nobody")))
    (Path(desk.folder) / "runs" / "crash" / "log.txt").unlink()
    assert "no log" in one_line(lambda: list(tail_there(desk, "crash")))
    (tmp_path / "here" / "crash").mkdir(parents=True)
    assert "another run of this name is here" in one_line(lambda: pull(desk, "crash"))


def test_names_and_words_are_not_the_shells(desk, tmp_path):
    odd = tmp_path / "a card; touch oops $(touch oops).md"
    odd.write_text("signed")
    send(desk, {odd: f"cards/{odd.name}"})
    assert (Path(desk.folder) / "cards" / odd.name).read_text() == "signed" and not list(tmp_path.rglob("oops"))
    with pytest.raises(UserError, match="no such file"): send(desk, {tmp_path / "nothing": "x"})
    assert ask(desk, "echo", "$HOME `id` 'x'").decode() == "$HOME `id` 'x'\n"
