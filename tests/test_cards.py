"""Cards from their first line to their last: signed, tampered with, refused, launched, closed, listed. Real files, real edits, real runs."""
import json
import re
import threading
import time
from pathlib import Path

import pytest
import yaml

from melee_wm import cards
from melee_wm.cards import Card, Finding, Review, Target, index, new_card, read_card, reviewers_of, write_card
from melee_wm.review import answer, block, check_cards, close, mark, sign
from melee_wm.checkpoint import update_manifest
from melee_wm.config import config_hash, load_config, to_dict
from melee_wm.core import UserError
from melee_wm.experiment import run_experiment, run_folder
from melee_wm.gate import gate, significance, with_card_kill
from melee_wm.records import Record, local_records, team_records
from melee_wm.timing import data_facts, estimate, fit_calibration, hardware, step_time

SMALL = ["training.epochs=1", "training.minutes=null", "training.batch_size=256", "training.log_interval=4", "model.hidden=[32, 32]", "evaluation.max_starts=10", "evaluation.bootstrap=20"]
REVIEWERS = ("mattie", "scav", "scaviefae")
GPU = "A100-40GB"


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch) -> Path:
    "Cards and runs of our own."
    monkeypatch.setenv("MELEE_WM_CARDS", str(tmp_path / "cards"))
    monkeypatch.setenv("MELEE_WM_RUNS", str(tmp_path / "runs"))
    (tmp_path / "runs").mkdir()
    return tmp_path


def experiment(folder: Path, name="night", **training) -> Path:
    "An experiment that takes a night: a YAML that a test may edit."
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump({"base": "mamba2-medium-gpu", "training": {"epochs": 3, **training}}))
    return path


def make(path, data="22k", hw_name=GPU, card_id=None, overrides=(), body=None, **values) -> Card:
    "A card as its generator makes it, less the prose."
    config = load_config(path, list(overrides))
    facts, hw = data_facts(data, config), hardware(hw_name)
    card = new_card(card_id or config.name, config, path, hw, facts, estimate(config, facts, hw, step_time(config, hw)), overrides, **values)
    write_card(card, body or f"# {card.id}\n\n## Goal\n\nDoes it dream longer?\n\n## Target metrics\n\n| a | table |\n| --- | --- |\n\n## Sign-off\n\n## Review\n")
    return read_card(card.id)[0]


def approve(card_id: str) -> Card:
    for name in [r.name for r in reviewers_of(read_card(card_id)[0].kind)]:
        card = sign(card_id, name)
    return card


def edit(card_id: str, before: str, after: str):
    path = cards.cards_folder() / f"{card_id}.md"
    assert before in path.read_text()
    path.write_text(path.read_text().replace(before, after))


# ---- every card of the project

def test_the_projects_own_cards_are_in_order(monkeypatch):
    monkeypatch.delenv("MELEE_WM_CARDS")
    assert check_cards() == []


# ---- the file

def test_a_card_survives_the_file(folders):
    card = make(experiment(folders), targets=[Target(metric="val_loss/total", target=.2, note="pipe | and -- dash\nnew line: äöü")], concerns=["100K batches: too many", "- looks like a list"], fallback="mamba2-22k-noss")
    text = (folders / "cards" / "night.md").read_text()
    again, body = read_card("night")
    assert again == card and text.startswith("---\nid: night\n") and body.startswith("# night")
    assert write_card(again, body).read_text() == text and read_card(folders / "cards" / "night.md")[0] == card
    assert [line for line in text.splitlines() if line.startswith("## ")] == ["## Goal", "## Target metrics", "## Sign-off", "## Review"]
    assert not list((folders / "cards").glob(".*.tmp"))


@pytest.mark.parametrize("before, after, said", [
    ("status: pending review", "status: running", "status.*'pending review', 'blocked'.*running"),
    ("epochs: 3", "epochs: '3'", "epochs"), ("epochs: 3", "epochs: 0", "epochs"), ("id: night", "id: ../night", "id"),
    ("kind: run", "kind: runn", "kind"), ("fallback: null", "fallbck: null", "fallbck"), ("  frames: ", "  framess: ", "data.frames"),
    ("loss_above: 10.0", "los_above: 10.0", "kill.los_above"), ("  timeout_seconds:", "  timeout:", "estimate.timeout_seconds"), ("fallback: null", "fallback: [", "YAML"), ("---\nid", "id", "between two lines"),
])
def test_a_card_that_is_none_is_one_clear_line(folders, before, after, said):
    make(experiment(folders))
    edit("night", before, after)
    with pytest.raises(UserError, match=said) as error: read_card("night")
    assert "night.md" in str(error.value) and "\n" not in str(error.value)
    assert len(check_cards()) >= 1 and re.search(said, "\n".join(check_cards()))


def test_a_file_that_is_no_text(folders):
    make(experiment(folders))
    (folders / "cards" / "binary.md").write_bytes(b"\xff\xfe\x00---")
    with pytest.raises(UserError, match="binary.md.*UTF-8"): read_card("binary")
    assert any("binary.md" in line for line in check_cards()) and "[night]" in index()


def test_no_such_card_names_the_nearest(folders):
    make(experiment(folders))
    with pytest.raises(UserError, match="did you mean night"): read_card("nigth")


def test_findings_cannot_break_the_page(folders):
    "Headings, tables and comments in what people write stay text."
    make(experiment(folders))
    block("night", "scav", "## Sign-off\n---\n| x | <!-- end --> ## Results", blocking=False)
    sign("night", "mattie", note="fine\n## Review\n\n---\n")
    card, body = read_card("night")
    assert card.findings[0].text.startswith("## Sign-off") and [l for l in body.splitlines() if l.startswith("## ")] == ["## Goal", "## Target metrics", "## Sign-off", "## Review"]
    assert check_cards() == []


# ---- its life

def test_the_life_of_a_card(folders):
    card = make(experiment(folders))
    assert card.status == "pending review" and sign("night", "mattie").status == "pending review"
    assert block("night", "scav", "who watches overnight?").status == "blocked"
    with pytest.raises(UserError, match="your own blocking finding is open"): sign("night", "scav")
    assert sign("night", "scaviefae", "clear targets").status == "blocked"
    assert answer("night", 1, "no_decrease_after ends it").status == "pending review"      # scav has to look again
    card = sign("night", "scav")
    assert card.status == "approved" and {r.name: r.decision for r in card.reviewers} == dict.fromkeys(REVIEWERS, "approved") and all(re.fullmatch(r"[\dT:-]+Z", r.date) for r in card.reviewers)
    assert mark("night", "launched").status == "launched"
    with pytest.raises(UserError, match="review of this card is over"): block("night", "mattie", "too late")
    assert mark("night", "killed", reason="loss 12").results == {"reason": "loss 12"}
    with pytest.raises(UserError, match="from killed to killed"): mark("night", "launched")
    body = read_card("night")[1]
    assert "**Blocking**, answered (scav" in body and "*Answer:* no_decrease_after ends it" in body and "- scaviefae: clear targets" in body and "Status: **killed**" in body and "reason: loss 12" in body


def test_a_finding_that_does_not_block_still_wants_an_answer(folders):
    make(experiment(folders))
    approve("night")
    card = block("night", "mattie", "is 0.3 not too much noise?", blocking=False)
    assert card.status == "pending review" and all(r.decision == "approved" for r in card.reviewers)
    assert answer("night", 1, "the paper's value").status == "approved"


def test_a_blocker_takes_back_an_approval(folders):
    make(experiment(folders))
    approve("night")
    assert block("night", "mattie", "the timeout is below the pessimistic estimate").status == "blocked"
    answer("night", 1, "checkpoints are committed, it resumes")
    card, body = read_card("night")
    assert card.status == "pending review" and cards.objections(card, body) == ["blocked by mattie, who has not signed since"]


@pytest.mark.parametrize("do", [lambda: sign("night", "eve"), lambda: block("night", "eve", "no"), lambda: sign("night", ""), lambda: sign("night", "Mattie")])
def test_only_listed_reviewers_have_a_say(folders, do):
    make(experiment(folders), reviewers=[Review(name="eve")])       # written into the file, but not listed in the settings
    with pytest.raises(UserError, match="not a reviewer.*mattie, scav, scaviefae"): do()


def test_a_policy_card_has_two_reviewers(folders):
    long = load_config("fighter", ["training.minutes=600"])
    with pytest.raises(UserError, match="card policy 22000 --experiment fighter --hardware A100-40GB.*signed by mattie, scav, or"): gate(long, "22000", GPU)
    make("fighter", data="5000", hw_name="M3 Pro")
    with pytest.raises(UserError, match="expected one of mattie, scav, got|expected one of mattie, scav$"): sign("fighter", "scaviefae")
    sign("fighter", "mattie")
    assert sign("fighter", "scav").status == "approved"


def test_wrong_numbers_and_empty_words(folders):
    make(experiment(folders))
    for do, said in ((lambda: answer("night", 1, "x"), "no such finding"), (lambda: block("night", "scav", " "), "empty finding"), (lambda: mark("night", "running"), "cannot go this way"), (lambda: mark("night", "launched"), "cannot go this way")):
        with pytest.raises(UserError, match=said): do()
    block("night", "scav", "a"), block("night", "scav", "b", blocking=False)
    for number, text, said in ((0, "x", "expected 1 to 2"), (3, "x", "expected 1 to 2"), (2, " ", "empty answer")):
        with pytest.raises(UserError, match=said): answer("night", number, text)
    assert [f.open for f in answer("night", 2, "done").findings] == [True, False]


def test_all_sign_at_the_same_moment(folders):
    "Nobody's signature is lost."
    make(experiment(folders))
    threads = [threading.Thread(target=sign, args=("night", name)) for name in REVIEWERS] + [threading.Thread(target=block, args=("night", "mattie", f"finding {i}", False)) for i in range(4)]
    for t in threads: t.start()
    for t in threads: t.join()
    card = read_card("night")[0]
    assert all(r.decision == "approved" for r in card.reviewers) and {f.text for f in card.findings} == {f"finding {i}" for i in range(4)} and check_cards() == []


# ---- what a signature covers

TAMPERED = {
    "a softer threshold": ("val_metric/action_change_acc: 0.6", "val_metric/action_change_acc: 0.1"), "a lower target": ("  target: 0.75", "  target: 0.5"), "a cheaper estimate": ("  hours: ", "  hours: 1"), "less data": ("  games: 22000", "  games: 2000"),
    "the price's place": (f"hardware: {GPU}", "hardware: H100"), "another hash": ("config_hash: ", "config_hash: 0"), "other overrides": ("overrides: []", "overrides: [training.lr=0.1]"), "a concern dropped": ("concerns:\n- three new variables\n", "concerns: []\n"),
    "another kind": ("kind: run", "kind: policy"), "the text": ("Does it dream longer?", "Does it dream at all?"), "more epochs": ("epochs: 3", "epochs: 30"), "no kill switch": ("loss_above: 10.0", "loss_above: 10000.0"),
}


@pytest.mark.parametrize("what", TAMPERED)
def test_tampering_is_noticed(folders, what):
    path = experiment(folders, kill={"floors": {"val_metric/action_change_acc": .6}})
    make(path, targets=[Target(metric="val_metric/action_change_acc", target=.75, kill=.6)], concerns=["three new variables"])
    approve("night")
    assert check_cards() == [] and gate(load_config(path), "22k", GPU).card_id == "night"
    edit("night", *TAMPERED[what])
    assert any("changed after mattie, scav, scaviefae signed it" in line for line in check_cards()), check_cards()
    with pytest.raises(UserError, match="changed after mattie, scav, scaviefae signed it.*melee-wm card sign night --by NAME|no such card"): gate(load_config(path), "22k", GPU)


@pytest.mark.parametrize("before, after", [("decision: null", "decision: approved"), ("status: pending review", "status: approved"), ("reviewers:\n- name: mattie\n  decision: null\n  date: null\n  note: ''\n  digest: null\n", "reviewers:\n"), ("status: pending review", "status: launched")])
def test_what_is_written_by_hand_signs_nothing(folders, before, after):
    path = experiment(folders)
    make(path)
    edit("night", before, after)
    assert any(re.search("not signed by|changed after|sign-off, review or results were edited", line) for line in check_cards()), check_cards()
    with pytest.raises(UserError, match="this run needs a card"): gate(load_config(path), "22k", GPU)


def test_a_blocker_turned_into_a_signature_by_hand(folders):
    path = experiment(folders)
    make(path)
    sign("night", "mattie"), sign("night", "scaviefae"), block("night", "scav", "no")
    edit("night", "decision: blocked", "decision: approved"), edit("night", "open: true", "open: false"), edit("night", "status: blocked", "status: approved")
    assert any("changed after scav signed it" in line for line in check_cards())
    with pytest.raises(UserError, match="changed after scav"): gate(load_config(path), "22k", GPU)


def test_harmless_edits_are_no_tampering(folders):
    "Another line width, blank lines, and what is generated anyway."
    path = experiment(folders)
    make(path)
    approve("night")
    edit("night", "Does it dream longer?", "Does it\ndream   longer?\n\n")
    values, body = read_card("night")
    assert cards.altered(values, body) == [] and gate(load_config(path), "22k", GPU).card_id == "night"
    edit("night", "Status: **approved**", "Status: **killed**")
    assert any("edited by hand" in line for line in check_cards()) and gate(load_config(path), "22k", GPU).card_id == "night"
    write_card(*read_card("night"))
    assert check_cards() == []


def test_a_changed_experiment_needs_a_new_review(folders):
    path = experiment(folders)
    make(path)
    approve("night")
    assert check_cards() == []
    experiment(folders, lr=.001, scheduled_sampling={"rate": .5})
    assert any("needs a new review" in line and "training.lr was 0.0005 and is 0.001" in line and "scheduled_sampling" in line for line in check_cards())
    with pytest.raises(UserError, match="card night, in which .*training.lr is 0.0005 and not 0.001"): gate(load_config(path), "22k", GPU)
    experiment(folders)
    assert check_cards() == [] and gate(load_config(path), "22k", GPU).card_id == "night"
    experiment(folders, log_interval=1000, kill={"floors": {}})      # changes nothing that results depend on
    assert check_cards() == [] and gate(load_config(path), "22k", GPU).card_id == "night"


def test_an_outdated_card_cannot_be_signed(folders):
    path = experiment(folders)
    make(path)
    experiment(folders, lr=.002)
    with pytest.raises(UserError, match="out of date.*training.lr"): sign("night", "scav")
    path.unlink()
    with pytest.raises(UserError, match="out of date.*no such experiment"): sign("night", "scav")


# ---- every card, checked

def test_check_cards_finds_what_is_wrong(folders):
    path = experiment(folders, kill={"floors": {"val_metric/action_change_acc": .6}})
    make(path)
    (folders / "cards" / "copy.md").write_text((folders / "cards" / "night.md").read_text())
    make(path, card_id="paper", targets=[Target(metric="val_metric/action_change_acc", target=.75, kill=.7), Target(metric="val_metric/position_mae", kill=.8)])
    make(path, card_id="early", status="finished")
    said = "\n".join(check_cards())
    for line in ("copy.md: its id is night, its file's name copy", "night: an id that two cards have", "paper.md: the kill threshold of val_metric/action_change_acc, 0.7, is not among those", "paper.md: the kill threshold of val_metric/position_mae, 0.8", "early.md: its run is finished, its results are missing", "README.md: the index is not up to date"):
        assert line in said, said


def test_open_findings_and_missing_signatures(folders):
    path = experiment(folders)
    make(path, findings=[Finding(text="who watches?", blocking=True, by="scav", date="2026-11-22T05:00:00Z")])
    edit("night", "status: blocked", "status: approved"), edit("night", "Status: **blocked**", "Status: **approved**")
    index()
    line, = check_cards()
    assert line == "night.md: it says approved and is blocked: not signed by mattie, scav, scaviefae; finding 1 is open: who watches?"


# ---- the gate

def test_the_life_of_a_significant_run(folders):
    "Refused unsigned; allowed signed; refused again when changed, when its data has grown, on another machine, and when it has ended."
    path = experiment(folders)
    config = load_config(path)
    with pytest.raises(UserError) as error: gate(config, "22k", GPU)
    for words in (r"cost \$25 \(limit \$5\)", r"take 9.1 h \(limit 2 h\)", config_hash(config), "no such card", "melee-wm card run night --data 22k --hardware A100-40GB", "mattie, scav, scaviefae", "--override REASON"): assert re.search(words, str(error.value)), error.value
    assert "\n" not in str(error.value)
    make(path)
    with pytest.raises(UserError, match="card night: not signed by mattie, scav, scaviefae.*melee-wm card sign night"): gate(config, "22k", GPU)
    approve("night")
    allowed = gate(config, "22k", GPU)
    assert allowed.card_id == "night" and allowed.override is None and len(allowed.reasons) >= 2 and allowed.price == hardware(GPU).price
    assert allowed.launch == dict(card_id="night", override=None, estimate=allowed.estimate, hardware=GPU, price=allowed.price) and json.dumps(allowed.launch) and allowed.estimate["hours"] == pytest.approx(9.06, .01)
    for changed, data, gpu, said in ((["training.lr=0.001"], "22k", GPU, "card night, in which training.lr is 0.0005 and not 0.001"), ([], "25000", GPU, "it is for 22,000 games"), ([], "22k", "H100", "it is for A100-40GB, not H100")):
        with pytest.raises(UserError, match=said) as error: gate(load_config(path, changed), data, gpu)
        assert "card run night" in str(error.value)
    assert gate(config, "23000", GPU).card_id == "night"       # less than a tenth more
    mark("night", "launched")
    assert gate(config, "22k", GPU).card_id == "night"         # it may be resumed
    mark("night", "finished", exit=0)
    with pytest.raises(UserError, match="its run is finished; a new run needs a new card"): gate(config, "22k", GPU)


def test_an_override_needs_a_reason_and_is_recorded(folders):
    path = experiment(folders)
    for empty in ("", "  \n"):
        with pytest.raises(UserError, match="an override needs a reason"): gate(load_config(path), "22k", GPU, override=empty)
    allowed = gate(load_config(path), "22k", GPU, override=" the machine is ours until Monday ")
    assert allowed.card_id is None and allowed.launch["override"] == "the machine is ours until Monday" and allowed.reasons
    make(path)
    assert gate(load_config(path), "22k", GPU, override="we talked about it").card_id == "night"
    card = mark("night", "launched", override="we talked about it")
    assert card.status == "launched" and "Launched without approval: we talked about it" in read_card("night")[1] and check_cards() == []
    make(path, card_id="other")
    approve("other")
    assert mark("other", "launched", override="to be on the safe side").override is None      # it was approved


def test_small_runs_need_no_card_and_no_probe(folders, dataset, monkeypatch):
    "Local experiments, smoke runs on paid hardware, runs with a budget: allowed at once, though a file among the cards is broken."
    monkeypatch.setattr("melee_wm.timing.probe", lambda *_, **__: pytest.fail("a probe, for a run that is small by any reckoning"))
    (folders / "cards").mkdir(), (folders / "cards" / "broken.md").write_text("not a card")
    begun = time.process_time()
    for config, data, hw_name in ((load_config("toy", SMALL), dataset, "local"), (load_config("mamba2-22k-ss", ["training.minutes=15"]), "22k", GPU), (load_config("mamba2-22k-ss", ["data.max_games=50"]), "22k", GPU), (load_config("demo"), dataset, "local")):
        allowed = gate(config, data, hw_name)
        assert allowed.card_id is None and allowed.reasons == [] and allowed.hardware == hw_name
    assert time.process_time() - begun < 5
    with pytest.raises(UserError, match="not readable: not a card"): gate(load_config("mamba2-22k-ss"), "22k", GPU)


def test_a_machine_of_ones_own_is_measured_before_a_run_is_refused(folders, dataset):
    "By the recorded speeds this takes half a day; by a few real steps, minutes."
    config = load_config("toy", [*SMALL, "training.epochs=40000"])
    facts, hw = data_facts(dataset, config), hardware("local")
    by_record = estimate(config, facts, hw, step_time(config, hw))
    assert by_record.hours > 2, "the recorded speed of this machine would not have asked"
    try: allowed = gate(config, dataset)
    except UserError as error: assert "take" in str(error)
    else: assert allowed.reasons == []
    kept = json.loads(run_folder("timings.json").read_text())
    assert [config_hash(config) in known for known in kept.values()] == [True]
    measured = estimate(config, facts, hw, step_time(config, hw))
    assert measured.how.startswith("measured here") and measured.batch_seconds != by_record.batch_seconds


def test_significance_by_the_settings(folders, monkeypatch):
    config, hw, records = load_config("mamba2-22k-ss"), hardware(GPU), team_records()
    facts = data_facts("22k", config)
    base = estimate(config, facts, hw, step_time(config, hw))
    def reasons(hours, cost, c=config, hw=hw, records=records, facts=facts): return significance(base._replace(hours=hours, cost=cost), hw, c, records, facts)
    assert reasons(.3, .9) == [] and len(reasons(.7, 2.)) == 1 and re.search("no finished run has had .*scheduled sampling", reasons(.7, 2.)[0])
    seen = [*records, Record("before", "local", "finished", config=to_dict(config), games=22_000)]
    assert reasons(.7, 2., records=seen) == [] and len(reasons(.7, 5.01, records=seen)) == 1 and len(reasons(2.01, .5, records=seen)) == 1
    assert reasons(.7, 2., records=[*records, seen[-1]._replace(status="killed")]) != []          # a run that did not finish proves nothing
    assert reasons(1.9, 0., hw=hardware("local")) == [] and len(reasons(2.1, 0., hw=hardware("local"))) == 1
    assert "data scale" in reasons(.7, 2., records=seen, facts=facts._replace(games=30_000))[0]
    monkeypatch.setenv("MELEE_WM_SIGNIFICANT_COST", "50"), monkeypatch.setenv("MELEE_WM_SIGNIFICANT_HOURS", "10")
    assert reasons(9.1, 25., records=seen) == []


def test_the_cards_thresholds_are_the_trainers(folders, dataset):
    "A run is killed by what its card says, not by what the YAML says meanwhile; and the card's hash is still its own."
    path = folders / "short.yaml"
    path.write_text(yaml.safe_dump({"base": "toy", "training": {"kill": {"floors": {"val_metric/action_change_acc": .999}}}}))
    card = make(path, data=str(dataset), hw_name="local", overrides=SMALL, targets=[Target(metric="val_metric/action_change_acc", target=.9999, kill=.999)])
    approve("short")
    path.write_text(yaml.safe_dump({"base": "toy"}))
    config = load_config(path, SMALL)
    allowed = gate(config, dataset)
    strict = with_card_kill(config, card)
    assert allowed.card_id == "short" and config_hash(strict) == card.config_hash and config.training.kill.floors == {} and strict.training.kill.floors == {"val_metric/action_change_acc": .999}
    manifest = run_experiment(strict, dataset, run_folder("short"), device="cpu", launch=allowed.launch, progress=False)
    assert manifest["status"] == "killed" and manifest["card_id"] == "short" and manifest["estimate"]["hours"] == allowed.estimate["hours"]
    card = close("short", run_folder("short"))
    assert card.status == "killed" and card.results["verdict"].startswith("Killed: val_metric/action_change_acc is 0.") and "says nothing of the estimate" in card.results["timing"]
    assert check_cards() == []


# ---- what came of it

def pretend(name: str, path, status="finished", hours=11.4, **values) -> Path:
    "The record of a long run, as the trainer leaves it."
    config = load_config(path)
    epochs = [{"epoch": i + 1, "val_metric/action_change_acc": .70 + .03 * i, "val_metric/position_mae": .62 - .03 * i, "val_loss/total": .25 - .01 * i} for i in range(3)]
    folder = run_folder(name)
    folder.mkdir(parents=True)
    update_manifest(folder, **{**dict(name=name, status=status, started="2026-11-22T08:00:00Z", finished="2026-11-22T20:00:00Z", seconds=3600 * hours, cost=2.78 * hours, experiment=config.name, config=to_dict(config), config_hash=config_hash(config), card_id=name,
        estimate=gate(config, "22k", GPU, override="for the record").estimate, all_epochs=epochs, best={"metric": "val_loss/total", "value": .23, "epoch": 3}, game_md5s=["0" * 32] * 5, val_md5s=["0" * 32], git_commit="0123456789abcdef"), **values})
    return folder


TARGETS = [Target(metric="val_metric/action_change_acc", baseline=.684, source="k60-compare", target=.75), Target(metric="val_metric/position_mae", baseline=.632, source="k60-compare", target=.55), Target(metric="val_loss/total", target=.2)]


def test_a_card_is_closed_with_what_came_of_it(folders):
    path = experiment(folders)
    make(path, targets=TARGETS)
    approve("night"), mark("night", "launched")
    before = fit_calibration(local_records())
    run = pretend("night", path)
    (run / "notebook.html").write_text("<h1>executed</h1>")
    card = close("night", run)
    r = card.results
    assert card.status == "finished" and r["verdict"] == "Missed 2 of 3 targets: val_metric/position_mae 0.56 for 0.55, val_loss/total 0.23 for 0.2 (on 5 games, not 22,000)" and r["cost"] == pytest.approx(31.69, .01)
    assert [t["is"] for t in r["targets"]] == ["reached", "missed", "missed"] and [t["result"] for t in r["targets"]] == pytest.approx([.76, .56, .23])
    after = fit_calibration(local_records())
    assert after.runs == before.runs + 1 and after.low < before.low and f"{after.low:.2g} to {after.high:.2g}" in r["timing"] and "1.3 times as long as estimated, below the pessimistic range" in r["timing"]
    text = (folders / "cards" / "night.md").read_text()
    assert "## Results" in text and "| time | 9.1 h | " in text and "| 11.4 h |" in text and "[The executed notebook](night.run.html)" in text and (folders / "cards" / "night.run.html").read_text() == "<h1>executed</h1>"
    assert all(r.decision == "approved" for r in card.reviewers) and check_cards() == []
    assert close("night", run).results == r            # again: the same
    readme = (folders / "cards" / "README.md").read_text()
    assert "| [night](night.md) | run | finished | night | 22,000 games | A100-40GB | 9.1 h, $25 | 11.4 h, $32 | Missed 2 of 3 targets" in readme


@pytest.mark.parametrize("values, said", [
    (dict(status="interrupted"), "the run has not ended.*interrupted.*--resume night"), (dict(status="failed"), "the run has not ended"), (dict(config_hash="0" * 12), "not the run of this card"), (dict(card_id="other"), "a run under card other")])
def test_only_its_own_run_closes_a_card(folders, values, said):
    path = experiment(folders)
    make(path)
    approve("night"), mark("night", "launched")
    with pytest.raises(UserError, match=said): close("night", pretend("night", path, **values))
    assert read_card("night")[0].status == "launched"
    with pytest.raises(UserError, match="no run"): close("night", folders / "nowhere")


def test_no_card_is_running_for_ever(folders):
    "The supervisor died and nobody marked the card: the run's own record tells, in the check and at the gate."
    path = experiment(folders)
    make(path)
    approve("night"), mark("night", "launched")
    assert check_cards() == []
    run = pretend("night", path, status="interrupted")
    assert any("it says launched, and its run is interrupted: go on with it (--resume night)" in line for line in check_cards())
    assert gate(load_config(path), "22k", GPU).card_id == "night"
    update_manifest(run, status="finished")
    assert any("its run is finished, its results are missing: melee-wm card close night" in line for line in check_cards())
    with pytest.raises(UserError, match="its run is finished; a new run needs a new card"): gate(load_config(path), "22k", GPU)
    close("night", run)
    assert check_cards() == []


def test_a_card_is_always_written_with_the_status_of_its_review(folders):
    path = experiment(folders)
    assert make(path, status="approved").status == "pending review"
    approve("night")
    card, body = read_card("night")
    write_card(card.model_copy(update={"epochs": 3, "concerns": ["new"]}), body)          # made again, with something else in it
    assert read_card("night")[0].status == "pending review"


def test_a_real_run_under_a_card(folders, dataset):
    "The gate's permission goes into the run's manifest; the run's figures come back into the card."
    path = folders / "tiny.yaml"
    path.write_text(yaml.safe_dump({"base": "toy"}))
    make(path, data=str(dataset), hw_name="local", overrides=SMALL, targets=[Target(metric="val_metric/action_change_acc", target=.01), Target(metric="val_metric/position_mae", target=0.)])
    approve("tiny")
    config = load_config(path, SMALL)
    allowed = gate(config, dataset)
    mark("tiny", "launched")
    manifest = run_experiment(config, dataset, run_folder("tiny"), device="cpu", launch=allowed.launch, progress=False)
    assert manifest["card_id"] == "tiny" and manifest["cost"] == 0
    card = close("tiny", run_folder("tiny"))
    best = manifest["all_epochs"][manifest["best"]["epoch"] - 1]
    assert card.status == "finished" and card.results["verdict"].startswith("Missed 1 of 2 targets: val_metric/position_mae ") and "games" not in card.results["verdict"] and card.results["targets"][1]["result"] == best["val_metric/position_mae"] and card.results["targets"][1]["is"] == "missed" and card.results["hours"] == pytest.approx(manifest["seconds"] / 3600) and "SYNTHETIC" in read_card("tiny")[1]
    assert check_cards() == []


def test_the_index_keeps_what_people_wrote(folders):
    path = experiment(folders)
    (folders / "cards").mkdir()
    (folders / "cards" / "README.md").write_text("# Our cards\n\nHow to read them.\n")
    make(path, targets=TARGETS)
    first = index()
    assert first.startswith("# Our cards\n\nHow to read them.\n\n<!-- index") and index() == first and "| [night](night.md) | run | pending review |" in first
    (folders / "cards" / "README.md").write_text(first + "\nThe end.\n")
    approve("night"), mark("night", "launched"), close("night", pretend("night", path))
    text = (folders / "cards" / "README.md").read_text()
    assert text.startswith("# Our cards") and text.endswith("The end.\n") and "finished" in text and text.count("<!-- index") == 1
    world = text.partition("## World models")[2].partition("## Fighters")[0]
    order = [float(cell) for cell in re.findall(r"^\| \d+ \| \S+ \| (\S+) \|", world, re.M)]
    assert order == sorted(order, reverse=True) and "[night](night.md) | 0.76 |" in world and "| k60-compare | 0.684 |" in world and len(order) >= 10


def test_cards_of_the_team_in_a_clone_come_out_the_same(folders):
    "The index depends on the repository alone: not on this machine's runs, nor on the time."
    make(experiment(folders))
    first = index()
    pretend("elsewhere", experiment(folders))
    assert index() == first
