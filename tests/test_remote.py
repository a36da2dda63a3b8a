"""The Modal app without an account: every function by `.local()`, containers that are killed, a volume that forgets, and the errors a person meets."""
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest

from melee_wm import remote, remote_client
from melee_wm.checkpoint import load_training_state, read_manifest, update_manifest
from melee_wm.config import config_hash, load_config
from melee_wm.core import UserError, write_json
from melee_wm.execute import notebook_parameters, run_notebook
from melee_wm.practice import write_practice
from melee_wm.track import read_metrics
from melee_wm.volume import extract, pack
from stand_in import StandIn

ROOT = Path(__file__).resolve().parent.parent
TINY = "training.epochs=8; training.minutes=null; training.batch_size=256; training.log_interval=4; model.hidden=[32, 32]; evaluation.max_starts=60"
TRAIN = dict(experiment="toy", data="shards/matches", run_name="night", overrides=TINY, tracking="off")
pytestmark = pytest.mark.filterwarnings("ignore:.*executing locally")


@pytest.fixture(scope="session")
def project(tmp_path_factory) -> Path:
    "What a container has of this project: the files that go along, and no .git."
    folder = tmp_path_factory.mktemp("container") / "root"
    for name in remote.GOES_ALONG:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_file(): shutil.copy(ROOT / name, folder / name)
        else: shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    return folder


@pytest.fixture(scope="session")
def durable(tmp_path_factory) -> Path:
    "A volume that holds one uploaded tar of practice matches."
    folder = tmp_path_factory.mktemp("durable")
    write_practice(folder / "matches", games=3, seed=0, frames=1700)
    (folder / "volume" / "uploads").mkdir(parents=True)
    pack(folder / "matches", folder / "volume" / "uploads" / "matches.tar")
    return folder / "volume"


def travelling(project, path) -> dict[str, str]:
    "The environment of a container."
    return remote.environment() | {"MELEE_WM_RUNS": str(path / "runs"), "MELEE_WM_COMMIT": "c0ffee", "MELEE_WM_DIRTY": "1", "PYTHONPATH": str(project), "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"}


def container(project, durable, path, *calls):
    "Start a container of its own: another process, its own view of the volume, the environment that travels with a call."
    return subprocess.Popen([sys.executable, str(ROOT / "tests" / "stand_in.py"), str(durable), str(path), json.dumps(calls)], cwd=project, env=os.environ | travelling(project, path), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(condition, process, seconds=120):
    end = time.time() + seconds
    while time.time() < end:
        if result := condition(): return result
        assert process.poll() is None, process.communicate()[1]
        time.sleep(.02)
    raise AssertionError("waited in vain")


@pytest.mark.timeout(600)
def test_encoded_trained_killed_resumed_evaluated(project, durable, tmp_path, monkeypatch):
    "The whole road in two containers: one is killed without warning after the first checkpoint, the other goes on, finishes and evaluates."
    watched = StandIn(durable, tmp_path / "outside")
    first = container(project, durable, tmp_path / "first", ("pre_encode", dict(source="uploads/matches.tar", output="shards/matches", experiment="toy", workers=1)), ("train", TRAIN))
    wait_for(lambda: any("runs/night/checkpoints/latest.trainer.safetensors" in files for files in watched.commits), first)
    first.send_signal(signal.SIGKILL)
    first.wait()
    encoded = json.loads(first.stdout.readline())
    assert encoded["games"] == 3 and encoded["shards"] == "shards/matches"
    kept = read_manifest(durable / "runs" / "night")
    assert kept["status"] == "running" and load_training_state(durable / "runs" / "night" / "checkpoints").values["position"]["epoch"] < 8
    before = watched.commits
    assert len(before) >= 5      # unpacked, parsed, encoded; the run's owner; a checkpoint

    monkeypatch.chdir(project)                                                   # the call begins again, in another container
    for name, value in travelling(project, tmp_path / "second").items(): monkeypatch.setenv(name, value)
    monkeypatch.setattr(remote, "cloud", StandIn(durable, tmp_path / "second"))
    ended = remote.train.local(**TRAIN)
    evaluated, again = remote.evaluate.local(run="night", data="shards/matches"), remote.train.local(**TRAIN)
    found = {e["path"]: e for e in remote.check_volume.local()}
    assert ended == again and (ended["status"], ended["epochs"], ended["git_commit"], ended["git_dirty"]) == ("finished", 8, "c0ffee", True)
    manifest = read_manifest(durable / "runs" / "night")
    assert len(manifest["resumed"]) == 1 and manifest["hardware"] == "A100-40GB" and manifest["cost"] > 0 and manifest["card_id"] is None
    steps = [r["step"] for r in read_metrics(durable / "runs" / "night", "batch")]
    assert steps == sorted(set(steps)) == list(range(4, steps[-1] + 1, 4)), "nothing twice, nothing lost"
    checkpoints = [files for files in watched.commits[len(before):] if "runs/night/checkpoints/latest.trainer.safetensors" in files]
    assert checkpoints and any("runs/night/checkpoints/final.safetensors" in files for files in watched.commits), "every checkpoint is committed when it lands, the last one when the run ends"
    folder = durable / evaluated["folder"]
    assert evaluated["split"] == "val" and evaluated["k20"] > 0 and (folder / "notebook.html").is_file() and "SYNTHETIC" in (folder / "notebook.html").read_text()
    assert found["runs/night"]["status"] == "finished" and found["shards/matches"]["games"] == 3


@pytest.fixture
def here(durable, tmp_path, monkeypatch):
    "This process as a container, with what an earlier test left on the volume, and shards."
    path = tmp_path / "volume"
    monkeypatch.setattr(remote, "cloud", StandIn(tmp_path / "durable", path))
    monkeypatch.setenv("MELEE_WM_RUNS", str(path / "runs"))
    shutil.copytree(durable / "uploads", path / "uploads")
    return remote.cloud


@pytest.fixture(scope="session")
def shards(durable, tmp_path_factory) -> Path:
    folder, cloud = tmp_path_factory.mktemp("shards"), remote.cloud
    shutil.copytree(durable / "uploads", folder / "path" / "uploads")
    remote.cloud = StandIn(folder / "durable", folder / "path")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        remote.pre_encode.local("uploads/matches.tar", "shards/matches", "toy", workers=1)
    remote.cloud = cloud
    return folder / "path" / "shards" / "matches"


@pytest.fixture
def pretended(here, shards, monkeypatch):
    "A training that only writes down what it was called with, and ends as it is told."
    shutil.copytree(shards, here.path / "shards" / "matches")
    seen = SimpleNamespace(calls=[], status="finished", saves=False, code=0)

    def train_run(config, data, run_dir, device, tracking, resume, launch):
        seen.calls.append(SimpleNamespace(config=config, run=run_dir.name, resume=resume, launch=launch))
        run_dir.mkdir(parents=True, exist_ok=True)
        if seen.saves:
            (run_dir / "checkpoints").mkdir(exist_ok=True)
            (run_dir / "checkpoints" / "latest.trainer.safetensors").write_bytes(b"state")
        update_manifest(run_dir, status=seen.status, reason="as it was told", config_hash=config_hash(config))
        return seen.code
    monkeypatch.setattr(remote, "train_run", train_run)
    return seen


def test_a_call_begins_again(pretended, here):
    "What a second attempt does depends on what the first one left."
    state = here.durable / "runs" / "night" / "checkpoints" / "latest.trainer.safetensors"
    pretended.status, pretended.code = "running", 143
    with pytest.raises(KeyboardInterrupt): remote.train.local(**TRAIN)        # taken away before the first checkpoint
    pretended.code, pretended.status = 1, "failed"
    assert remote.train.local(**TRAIN)["status"] == "failed"                  # no checkpoint was saved: it is not tried again
    pretended.saves = True
    assert not state.exists()
    with pytest.raises(RuntimeError, match="as it was told"): remote.train.local(**TRAIN)      # tried again by Modal
    assert state.read_bytes() == b"state"                                     # what landed just before the end is safe
    pretended.status, pretended.code = "killed", 1
    assert remote.train.local(**TRAIN)["status"] == "killed"
    assert [c.resume for c in pretended.calls] == [False, True, True, True]
    assert remote.train.local(**TRAIN)["status"] == "killed" and len(pretended.calls) == 4     # its threshold's word stands


def test_a_run_belongs_to_one_call(pretended, here):
    pretended.status = "running"
    pretended.code = 143
    with pytest.raises(KeyboardInterrupt): remote.train.local(**TRAIN)
    remote.cloud = StandIn(here.durable, here.path, "fc-2", running=("fc-1",))
    with pytest.raises(UserError, match="another call.*fc-1"): remote.train.local(**TRAIN)
    remote.cloud = StandIn(here.durable, here.path, "fc-2")                    # fc-1 has ended
    with pytest.raises(KeyboardInterrupt): remote.train.local(**TRAIN)
    write_json(here.path / "runs" / "night" / "call.json", {"call": "fc-2", "began": time.time() - 7200, "seconds": 3600})
    remote.cloud.commit()
    with pytest.raises(UserError, match="time of this run is used up"): remote.train.local(**TRAIN)
    with pytest.raises(UserError, match="name is in use"): remote.train.local(**TRAIN | {"overrides": "training.lr=0.1"})


def test_the_gate_stands_on_the_other_side_too(pretended, here, monkeypatch, tmp_path):
    monkeypatch.setenv("MELEE_WM_CARDS", str(tmp_path / "cards"))
    (tmp_path / "cards").mkdir()
    long = TRAIN | {"overrides": "training.minutes=null; training.epochs=1000000"}
    with pytest.raises(UserError, match="needs a card"): remote.train.local(**long)
    with pytest.raises(UserError, match="needs a card"): remote.permit.local(**long)
    assert not pretended.calls and not (here.path / "runs").exists()
    remote.train.local(**long | {"override": "the deadline"})
    launch = pretended.calls[0].launch
    assert launch["override"] == "the deadline" and launch["hardware"] == "A100-40GB" and launch["price"] == 2.78 and launch["estimate"]["cost"] > 5
    assert remote.permit.local(**TRAIN | {"run_name": "short"})["override"] is None


def test_a_sweep(pretended, here, monkeypatch, tmp_path):
    monkeypatch.setenv("MELEE_WM_CARDS", str(tmp_path))
    results = remote.sweep.local("toy", "shards/matches", "lr=5e-4,1e-3; K=5,10; hidden=32; weight.action=2", TINY, tracking="off")
    assert list(results) == [f"toy-lr{lr}-K{k}-hidden32-action2" for lr in ("5e-4", "1e-3") for k in (5, 10)] == [c.run for c in pretended.calls]
    assert [(c.config.training.lr, c.config.model.context_len) for c in pretended.calls] == [(5e-4, 5), (5e-4, 10), (1e-3, 5), (1e-3, 10)]
    assert all(c.config.model.hidden == (32, 16) and c.config.training.loss_weights.action == 2 and c.config.training.epochs == 8 for c in pretended.calls)
    assert {r["status"] for r in results.values()} == {"finished"}
    pretended.calls.clear()
    dollars = remote.permit.local(**TRAIN | {"overrides": "training.minutes=null; training.epochs=100000", "override": "to see"})["estimate"]["cost"]/100_000
    epochs = round(.5/dollars)
    alone = dict(data="shards/matches", overrides=f"training.minutes=null; training.epochs={epochs}", tracking="off")
    assert remote.permit.local(experiment="toy", run_name="alone", **alone)["estimate"]["cost"] < 1      # one needs no card,
    with pytest.raises(UserError, match="together these runs are significant"): remote.sweep.local("toy", grid="lr=" + ",".join(f"{i}e-4" for i in range(1, 21)), **alone)
    assert not pretended.calls


def test_a_sweep_goes_on_without_the_run_that_fails(pretended, here, monkeypatch):
    def local(**arguments):
        if "0.2" in arguments["run_name"]: raise RuntimeError("CUDA out of memory")
        return {"run": arguments["run_name"], "status": "finished", "reason": None}
    monkeypatch.setattr(remote, "train", SimpleNamespace(local=local))
    results = remote.sweep.local("toy", "shards/matches", "dropout=0.1,0.2,0.3", tracking="off")
    assert [r["status"] for r in results.values()] == ["finished", "failed", "finished"] and "CUDA" in results["toy-dropout0.2"]["reason"]


@pytest.mark.parametrize("arguments, said", [
    (dict(data="shards/22k"), r"no shards of that name.*parsed/matches|no shards of that name.*pre_encode"), (dict(gpu="NoSuchGPU"), "A100-40GB"), (dict(gpu="local"), "not a graphics card of Modal"), (dict(seconds=10**7), "86,400"),
    (dict(data="../../etc"), "not a place on the volume"), (dict(run_name="../up"), "not a run's name"), (dict(experiment="toys"), "no such experiment"), (dict(overrides="training.lrr=1"), "lrr"), (dict(tracking="online"), "modal secret create wandb-key WANDB_API_KEY")])
def test_mistakes_are_told_before_they_cost(pretended, here, monkeypatch, arguments, said):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    with pytest.raises(UserError, match=said): remote.train.local(**TRAIN | arguments)
    assert not pretended.calls and not (here.path / "runs").exists()


def test_what_is_uploaded_in_other_ways(here, durable):
    "Replays in a folder, a parsed dataset as .tar.gz, a name that is nobody's, a tar that was replaced."
    replays = extract(here.path / "uploads" / "matches.tar")
    made = remote.build.local("uploads/matches.tar", "parsed/dealt", parts=2, workers=1)
    assert made["games"] == 3 and made["parts"] == 2 and not (here.path / "parsed" / "dealt.parts").exists()
    with tarfile.open(here.path / "uploads" / "ready.tar.gz", "w:gz") as tar: tar.add(here.path / "parsed" / "dealt", "dealt")
    commits = len(here.commits)
    packed = remote.pre_encode.local("uploads/ready.tar.gz", "shards/a", "toy", workers=1)
    assert len(here.commits) == commits + 2                                     # unpacked, encoded: it was parsed already
    folder = remote.pre_encode.local("parsed/dealt", "shards/b", "toy", workers=1)
    assert packed["fingerprint"] == folder["fingerprint"] and len(here.commits) == commits + 3
    with pytest.raises(UserError, match="nothing of that name.*uploads/matches.tar.*melee-wm data upload"): remote.pre_encode.local("uploads/none.tar", "shards/c", "toy")
    with tarfile.open(here.path / "uploads" / "matches.tar", "w") as tar: tar.addfile(tarfile.TarInfo("other"), io.BytesIO())
    assert [p.name for p in extract(here.path / "uploads" / "matches.tar").iterdir()] == ["other"] and replays.is_dir()
    (here.path / "uploads" / "taken").mkdir()
    shutil.copy(here.path / "uploads" / "matches.tar", here.path / "uploads" / "taken.tar")
    with pytest.raises(UserError, match="in the way"): extract(here.path / "uploads" / "taken.tar")


class FolderVolume:
    "The client's side of a volume, on a folder: what `upload` and `pull` use of it."
    def __init__(self, root): self.root, self.reads = root, []
    def listdir(self, path, recursive=False): return [SimpleNamespace(path=str(p.relative_to(self.root)), type=SimpleNamespace(name="FILE"), mtime=int(p.stat().st_mtime), size=p.stat().st_size) for p in (self.root / path).rglob("*") if p.is_file()]
    def read_file(self, path):
        self.reads.append(path)
        yield (self.root / path).read_bytes()
    def batch_upload(self): return self
    def __enter__(self): return self
    def __exit__(self, *error): pass
    def put_file(self, source, target):
        target = self.root / target.lstrip("/")
        if target.exists(): raise FileExistsError(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, target)


def test_up_and_down(tmp_path, monkeypatch):
    monkeypatch.setattr(remote_client, "volume", volume := FolderVolume(tmp_path / "volume"))
    monkeypatch.setattr(remote_client, "no_token", lambda: False)
    write_practice(tmp_path / "matches", games=1, seed=1)
    assert remote_client.upload(tmp_path / "matches") == "uploads/matches.tar"
    assert [p.suffix for p in extract(tmp_path / "volume" / "uploads" / "matches.tar").rglob("*") if p.is_file()] == [".slp"]
    with pytest.raises(UserError, match="taken on the volume.*modal volume rm"): remote_client.upload(tmp_path / "matches")
    with pytest.raises(UserError, match="not a place"): remote_client.upload(tmp_path / "matches", "../x")

    run = tmp_path / "volume" / "runs" / "night"
    (run / "checkpoints").mkdir(parents=True)
    (run / "checkpoints" / "best.safetensors").write_bytes(b"weights")
    (run / ".lock").touch()
    update_manifest(run, status="finished", started="2026-11-22T01:00:00Z", config_hash="a")
    home = remote_client.pull("night", tmp_path / "home")
    assert sorted(p.name for p in home.rglob("*") if p.is_file()) == ["best.safetensors", "manifest.json", "pulled.json"] and read_manifest(home)["status"] == "finished"
    volume.reads.clear()
    remote_client.pull("night", home)
    assert volume.reads == ["runs/night/manifest.json"]                         # only asked, nothing fetched again
    update_manifest(run, started="2026-11-22T02:00:00Z")
    with pytest.raises(UserError, match="another run has this name"): remote_client.pull("night", home)
    with pytest.raises(UserError, match="no such run on the volume"): remote_client.pull("day", tmp_path / "day")
    monkeypatch.setattr(volume, "listdir", lambda *a, **k: [SimpleNamespace(path="runs/night/../../../evil", type=SimpleNamespace(name="FILE"), mtime=0, size=1)])
    remote_client.pull("night", tmp_path / "other")
    assert not list(tmp_path.rglob("evil"))


@pytest.fixture
def nobody(tmp_path, monkeypatch):
    "An environment without credentials for Modal."
    for name in [n for n in os.environ if n.startswith("MODAL_")]: monkeypatch.delenv(name)
    monkeypatch.setenv("MODAL_CONFIG_PATH", str(tmp_path / "none.toml"))


def test_modal_run_without_a_token(nobody):
    "Modal's message, and ours beside it."
    done = subprocess.run([sys.executable, "-m", "modal", "run", "-m", "melee_wm.remote::check_volume"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    said = " ".join((done.stdout + done.stderr).split())
    assert done.returncode == 1 and "Token missing" in said and "melee-wm: Modal has no token on this machine: run `modal token new`" in said, said


def test_every_function_is_a_command_of_modal(nobody):
    "`modal run` builds options of the functions' arguments; a function that it cannot read would fail only there."
    from click.testing import CliRunner
    from modal.cli.entry_point import entrypoint_cli
    for name in set(remote.FUNCTIONS) - {"build_part"}:
        shown = CliRunner().invoke(entrypoint_cli, ["run", "-m", f"melee_wm.remote::{name}", "--help"])
        assert shown.exit_code == 0 and "Usage" in shown.output, (name, shown.exception)
        if name == "sweep": assert "--experiments" in shown.output and "--grid" in shown.output


def test_without_a_token_from_our_side(nobody, tmp_path):
    config = load_config("toy")
    (tmp_path / "matches.tar").touch()
    for attempt in (lambda: remote_client.pull("night", tmp_path), lambda: remote_client.launch_modal(config, "shards/matches"), lambda: remote_client.upload(tmp_path / "matches.tar")):
        with pytest.raises(UserError, match="Modal does not know this machine.*modal token new"): attempt()


def test_a_launch_is_checked_before_modal_is_asked(nobody, tmp_path, monkeypatch):
    config = load_config("toy")
    for wrong, said in ((dict(gpu="H1000"), "unknown hardware"), (dict(seconds=10**7), "86,400"), (dict(run_name="a b"), "not a run's name"), (dict(data="/etc"), "not a place")):
        with pytest.raises(UserError, match=said): remote_client.launch_modal(config, **dict(data="shards/a") | wrong)
    monkeypatch.setattr(remote_client, "project_root", lambda: tmp_path)
    with pytest.raises(UserError, match="no clone"): remote_client.launch_modal(config, "shards/a")


def test_what_the_app_asks_for():
    spec = {name: function._spec_ for name, function in remote.FUNCTIONS.items()}
    assert {name for name, s in spec.items() if s.gpus} == {"train", "evaluate"} and spec["train"].gpus == "A100-40GB"
    assert all(list(s.volumes) == ["/volume"] for s in spec.values())
    here = ROOT / "pyproject.toml"
    assert {name for name in remote.GOES_ALONG if not (ROOT / name).exists()} == set() and here.is_file()
    assert {"run", "data", "run_dir", "split", "device"} == notebook_parameters(run_notebook("evaluate"))


def test_modal_is_imported_only_where_it_is_used():
    done = subprocess.run([sys.executable, "-X", "importtime", "-m", "melee_wm", "--help"], cwd=ROOT, capture_output=True, text=True)
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines() if "import time" in line}
    assert done.returncode == 0 and "typer" in imported and not {"modal", "torch", "wandb"} & imported


def test_without_modal(monkeypatch):
    import importlib.util
    monkeypatch.setitem(sys.modules, "modal", None)
    spec = importlib.util.spec_from_file_location("melee_wm.remote_again", remote.__file__)
    with pytest.raises(UserError, match="modal is not installed.*pip install"): spec.loader.exec_module(importlib.util.module_from_spec(spec))
