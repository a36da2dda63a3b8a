"""The one door: what every command that trains asks for, from a refusal to a closed card, by the program itself."""
import json

import pytest
from terminal import torchrun

from melee_wm.build import build
from melee_wm.cards import new_card, read_card, write_card
from melee_wm.cli import main
from melee_wm.config import load_config
from melee_wm.practice import write_practice
from melee_wm.review import sign
from melee_wm.timing import data_facts, estimate, hardware, step_time

TINY = ["training.epochs=1", "training.minutes=null", "training.batch_size=256", "training.log_interval=2", "model.hidden=[16, 16]", "evaluation.max_starts=20"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("door")
    write_practice(folder / "slp", games=2, seed=0, frames=1600)
    build([folder / "slp"], folder / "data", progress=False)
    return folder / "data"


@pytest.fixture
def program(tmp_path, monkeypatch, capsys):
    "The program, in folders of its own, where every run is significant: (exit code, stdout, stderr)."
    for key, value in dict(RUNS=tmp_path / "runs", CARDS=tmp_path / "cards", SIGNIFICANT_HOURS="0.0000001").items(): monkeypatch.setenv(f"MELEE_WM_{key}", str(value))
    def run(*words):
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended: main([str(w) for w in words])
        said = capsys.readouterr()
        return ended.value.code or 0, said.out, said.err
    return run


def options(*changed): return [word for key in [*TINY, *changed] for word in ("--set", key)]


def test_refused_unsigned_started_signed_refused_changed(program, data, tmp_path):
    "A significant run: refused by every command, made a card, signed, trained, closed; then a changed one."
    toy = ("toy", "--data", data, "--run-name", "door", *options())
    for words in (("train", *toy), ("launch", *toy), ("policy", "train", "fighter", "--data", data, "--run-name", "door", "--epochs", 1, "--set", "training.minutes=null")):
        code, out, said = program(*words)
        assert code == 2 and said.splitlines()[-1].count("this run needs a card") == 1 and "melee-wm card" in said and not out, said
        assert not (tmp_path / "runs" / "door").exists()
    code, out, _ = program("card", "run", "toy", "--data", 3, "--run-name", "door", "--goal", "Does the door open?", *options())
    assert code == 0 and "Nothing was launched" in out
    assert program("train", *toy)[0] == 2                                                   # made, but not signed
    for name in ("mattie", "scav", "scaviefae"): code, out, _ = program("card", "sign", "door", "--by", name)
    assert code == 0 and "door: approved" in out
    assert program("train", *toy)[0] == 0
    manifest, card = json.loads((tmp_path / "runs/door/manifest.json").read_text()), read_card("door")[0]
    assert (manifest["status"], manifest["card_id"], manifest["override"], manifest["cost"]) == ("finished", "door", None, 0) and manifest["estimate"]["hours"] > 0
    assert card.status == "finished" and card.results["verdict"]
    code, _, said = program("train", "toy", "--data", data, "--run-name", "changed", *options("training.lr=0.002"))
    assert code == 2 and "needs a card" in said
    assert program("card", "check")[0] == 0


def test_an_override_is_recorded(program, data, tmp_path):
    "Launched, detached, without a card: the reason is in the run's record."
    code, out, said = program("launch", "toy", "--data", data, "--run-name", "hurry", *options(), "--override", "the demo is tonight", "--wait")
    assert code == 0, out + said
    manifest = json.loads((tmp_path / "runs/hurry/manifest.json").read_text())
    assert (manifest["status"], manifest["card_id"], manifest["override"]) == ("finished", None, "the demo is tonight")
    code, out, _ = program("runs", "list")
    assert code == 0 and "override" in out and "hurry" in out


def test_a_card_kills_all_processes_of_a_team(program, data, tmp_path):
    "The floor stands on the card alone; both processes must know it, or one would wait for the other for ever."
    changed = [*TINY, "training.epochs=2"]
    config, hw = load_config("toy", changed), hardware("local")
    facts = data_facts(data, config)
    write_card(new_card("team", config, "toy", hw, facts, estimate(config, facts, hw, step_time(config, hw)), changed, kill={"floors": {"val_metric/action_change_acc": .999}}), "# team\n\n## Goal\n\nTo be ended.\n")
    for name in ("mattie", "scav", "scaviefae"): sign("team", name)
    done = torchrun(2, "-m", "melee_wm", "train", "toy", "--data", data, "--run-name", "team", "--device", "cpu", *options("training.epochs=2"), timeout=240)
    manifest = json.loads((tmp_path / "runs/team/manifest.json").read_text())
    assert done.returncode and manifest["status"] == "killed" and "its floor 0.999" in manifest["reason"] and len(manifest["all_epochs"]) == 1, done.stderr
    assert manifest["card_id"] == "team" and read_card("team")[0].status == "killed"
