"""Cards are worked out, not typed: the team's example from its inputs, every flag, every finding of its review, and what a changed input changes."""
import json
import re
from pathlib import Path

import pytest
import torch

from melee_wm import forcing
from melee_wm.cards import STATUSES, Finding, own_text, read_card, write_card
from melee_wm.review import mark, sign
from melee_wm.config import config_hash, diff, load_config
from melee_wm.core import UserError
from melee_wm.experiment import run_experiment, run_folder
from melee_wm.policy_card import make_policy_card, plan_policy, policy_flags, policy_sections, world_of
from melee_wm.records import team_records
from melee_wm.run_card import SECTIONS, flags, make_run_card, plan_run, remaining, seen_disturbed, stops_of, summary, targets_of, write_run_card

ROOT = Path(__file__).resolve().parent.parent
SECTIONS_OF_A_RUN = ["Goal", "Target metrics", "Data", "Model", "Training", "Infrastructure", "Logging & monitoring", "Timing & cost", "Escape hatches", "Prior comparable runs", "What's new in this run", "Launch command", "Sign-off", "Review"]
FALLBACK = "mamba2-22k-noss, or the 2K set for 10 epochs"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    "No card and no run of this machine takes part."
    monkeypatch.setenv("MELEE_WM_CARDS", str(tmp_path / "cards"))
    monkeypatch.setenv("MELEE_WM_RUNS", str(tmp_path / "runs"))


@pytest.fixture(scope="module")
def as_given(): return make_run_card(**example())


def example(**changed):
    given = dict(experiment="mamba2-22k-ss", run_name="mamba2-22k-ss", data="22k", hw_name="A100-40GB", fallback=FALLBACK, tracking="online", records=team_records())
    return given | changed


def section(text, title):
    return re.search(rf"^## {re.escape(title)}$(.*?)(?=^## |\Z)", text, re.M | re.S)[1]


# ---- the team's example

def test_the_teams_example_from_its_inputs():
    card, text = make_run_card(**example())
    timing = section(text, "Timing & cost")
    for figure in ("185,648,963 // 1,024 = **181,297**", "0.06 s", "**3.0 h**", "**9.1 h**", "**$25**", "$2.78/h", "27–45 h, $75–125", "**86,400 s**, 2.6x", "27.3 h"): assert figure in timing, figure
    for figure in ("22,000", "206,754,081", "74.4 GB", "20,885,118"): assert figure in section(text, "Data"), figure
    for row in ("| parameters | 4,282,386 |", "| context K | 10 frames |", "| d_model | 384 |", "| n_layers | 4 |", "| d_state | 64 |", "| chunk size | 10 |"): assert row in section(text, "Model"), row
    for row in ("| epochs | 3 |", "| batch | 1,024 windows |", "0.0005", "| weight decay | 1e-05 |", "0.3/0.1/3/3"): assert row in section(text, "Training"), row
    assert "1,000 batches, **60 s**" in section(text, "Logging & monitoring")
    assert "| action_change_acc | 68.4% (k60-compare) | > 75% | < 60% after an epoch |" in text
    assert "| position_mae | 0.632 (k60-compare) | < 0.55 | > 0.80 after an epoch |" in text
    assert "| val_loss | 0.271 (k60-compare) | < 0.20 | training loss not falling after 5% of epoch 1 |" in text
    assert "**3 remain**" in section(text, "Escape hatches") and FALLBACK in section(text, "Escape hatches")
    assert card.kill["floors"] == {"val_metric/action_change_acc": .6, "val_metric/position_mae": .8} and card.kill["no_decrease_after"] == .05


def test_the_flags_of_the_example():
    card, _ = make_run_card(**example())
    wanted = ["platform's 24 h: three times the estimate would be 27.3 h", "does not cover the pessimistic estimate, 27–45 h", "181,297 batches an epoch, more than 100,000", "no finished run has used: ", "3 variables changed at once"]
    assert len(card.concerns) == len(wanted) and all(w in c for w, c in zip(wanted, card.concerns)), card.concerns
    assert all(v in card.concerns[4] for v in ("data scale", "scheduled sampling", "combat heads"))


def test_the_sections_come_in_the_teams_order():
    _, text = make_run_card(**example())
    assert re.findall(r"^## (.+)$", text, re.M) == SECTIONS_OF_A_RUN == list(SECTIONS)


def test_the_committed_cards_follow_from_their_inputs(monkeypatch):
    "Made again, they are the same to the letter: nothing on them was typed. Only their review was."
    def same(name, card, text):
        kept, body = read_card(ROOT / "cards" / f"{name}.md")
        assert own_text(text).split() == own_text(body).split()
        review = {"created", "reviewers", "findings", "status"}
        assert card.model_dump(exclude=review) == kept.model_dump(exclude=review)
        return kept
    monkeypatch.setenv("MELEE_WM_CARDS", str(ROOT / "cards"))
    kept = same("mamba2-22k-ss", *make_run_card(**example()))
    assert kept.status == "blocked" and [f.blocking for f in kept.findings] == [True] + 6*[False] and {f.by for f in kept.findings} == {"review"}
    same("policy-22k", *make_policy_card("match", "both", run_name="policy-22k", world_model="mamba2-22k-ss", hw_name="M3 Pro", tracking="online", records=team_records()))


def test_the_fallback_differs_in_one_thing():
    assert set(diff(load_config("mamba2-22k-ss"), load_config("mamba2-22k-noss"))) == {"training.scheduled_sampling.rate", "training.scheduled_sampling.noise", "training.scheduled_sampling.anneal_epochs", "training.scheduled_sampling.corrupt"}


@pytest.mark.parametrize("changed, setting, where, then, now", [
    (dict(overrides=["training.batch_size=512"]), None, "Timing & cost", "181,297", "362,595"),
    (dict(overrides=["training.epochs=2"]), None, "Escape hatches", "**3 remain**", "**2 remain**"),
    (dict(overrides=["training.log_interval=500"]), None, "Logging & monitoring", "**60 s**", "**30 s**"),
    (dict(overrides=["model.n_layers=3"]), None, "Model", "4,282,386", "3,338,222"),
    (dict(overrides=["training.scheduled_sampling.corrupt=2"]), None, "Training", "the last 3 frames", "the last 2 frames"),
    (dict(overrides=["training.kill.floors={val_metric/position_mae: 0.7}"]), None, "Escape hatches", "above 0.80", "above 0.70"),
    (dict(overrides=["evaluation.targets={val_loss/total: 0.1}"]), None, "Target metrics", "< 0.20", "< 0.10"),
    (dict(data="2k"), None, "Data", "206,754,081", "18,000,000"),
    (dict(fallback="nothing"), None, "Escape hatches", "mamba2-22k-noss", "Fallback: nothing"),
    (dict(goal="To see."), None, "Goal", "scheduled sampling", "To see."),
    ({}, ("MODAL_PRICES", "A100-40GB 5.56"), "Timing & cost", "$25", "$50"),
    ({}, ("MODAL_LIMIT_HOURS", "30"), "Timing & cost", "86,400 s", "98,393 s"),
    ({}, ("MODAL_WORKSPACE", "somebody"), "Infrastructure", "scaviefae", "somebody"),
    ({}, ("WANDB_PROJECT", "other"), "Logging & monitoring", "melee-worldmodel", "other"),
])
def test_a_changed_input_changes_the_card(changed, setting, where, then, now, as_given, monkeypatch):
    before = section(as_given[1], where)
    if setting: monkeypatch.setenv(f"MELEE_WM_{setting[0]}", setting[1])
    after = section(make_run_card(**example(**changed))[1], where)
    assert then in before and now not in before and now in after and then not in after, after


def test_a_baseline_is_the_best_finished_run_of_the_architecture():
    records = [r._replace(metrics=r.metrics | {"action_change_acc": .70}) if r.name == "k10-compare" else r for r in team_records()]
    def of(records): return next((t.baseline, t.source) for t in targets_of(plan_run(**example(records=records))) if t.metric == "val_metric/action_change_acc")
    assert of(records) == (.70, "k10-compare")
    assert of([r._replace(status="killed") if r.name == "k10-compare" else r for r in records]) == (.684, "k60-compare")
    assert of([r._replace(synthetic="made up") if r.name == "k10-compare" else r for r in records]) == (.684, "k60-compare")
    assert of([]) == (None, None)


# ---- flags, each provoked

QUIET = dict(experiment="mamba2-1a", run_name="quiet", data="2k", hw_name="A100-40GB", overrides=["model.heads=[core, kinematics]", "training.kill.no_decrease_after=0.5", "evaluation.targets={val_loss/total: 0.2}"], records=team_records())

@pytest.mark.parametrize("changed, more, flag", [
    ({}, ["training.log_interval=100000"], "between log lines, more than 300: set training.log_interval=1000"),
    (dict(data="22k"), ["training.epochs=20", "data.max_games=null"], r"the timeout is only \d\.\dx the estimate"),
    (dict(data="22k"), ["training.epochs=20", "data.max_games=null"], "cut off at the platform's 24 h"),
    (dict(data="22k"), ["training.epochs=20", "data.max_games=null"], "the timeout of 24 h does not cover"),
    (dict(data="22k"), ["training.epochs=40", "data.max_games=null"], r"it costs \$\d+, more than \$50: somebody must confirm"),
    (dict(data="22k"), ["data.max_games=null"], "batches an epoch, more than 100,000"),
    ({}, ["training.self_forcing={}"], "no finished run has used: self-forcing"),
    ({}, ["training.lr=1e-4", "training.batch_size=256"], "variables changed at once against k10-compare: .*learning rate.*batch size"),
    ({}, ["model.chunk_size=7"], "chunk_size 7 does not divide the 10 frames"),
    (dict(hw_name="CPU"), [], "up to .* and no monitoring: tracking is off"),
    (dict(hw_name="CPU", tracking="online"), ["training.kill.no_decrease_after=null"], "no kill threshold in training.kill: nothing stops a run that learns nothing"),
    (dict(hw_name="CPU", tracking="online"), ["training.checkpoint_minutes=120"], "checkpoints within an epoch only every 120 min"),
])
def test_flags(changed, more, flag):
    found = flags(plan_run(**QUIET | changed | {"overrides": QUIET["overrides"] + more}))
    assert any(re.search(flag, line) for line in found), found


def test_a_run_without_a_target_is_flagged():
    assert flags(plan_run(**QUIET)) == []
    assert any("no target" in line for line in flags(plan_run(**QUIET | {"overrides": QUIET["overrides"][:2]})))


# ---- the review's findings

def test_finding_4_several_changes_are_flagged_and_listed():
    _, text = make_run_card(**example())
    assert "3 variables changed at once against mamba2-first" in text
    assert all(f"| **{v}** |" in section(text, "What's new in this run") for v in ("data scale", "combat heads", "scheduled sampling"))


def test_finding_5_the_card_says_what_stops_the_run_when_nobody_watches():
    plan = plan_run(**example())
    assert [*stops_of(plan)] == ["the loss is not a number", "the training loss is above 10", "the training loss has not fallen after 5% of epoch 1", "action_change_acc is below 60% after an epoch",
        "position_mae is above 0.80 after an epoch", "the timeout, 86,400 s, is over: it can cost $67 until then"]
    assert "27–45 h" in make_run_card(**example())[1]


def test_finding_6_the_mask_on_the_card_is_what_a_training_step_does(monkeypatch):
    config = load_config("mamba2-22k-ss")
    noisy, frames = seen_disturbed(config)
    assert frames == 3 and set(noisy) == {"x", "y", "shield", "speed_air_x", "speed_y", "speed_ground_x", "knockback_x", "knockback_y"}
    monkeypatch.setattr(forcing, "_mask", lambda layout, names, device: torch.ones(len(layout.float_fields), device=device))     # a mask that is not wired
    assert {"percent", "stocks", "hitlag", "combo_count"} <= set(seen_disturbed(config)[0])
    assert "stocks" in re.search(r"noise was seen in \| (.*) \|", make_run_card(**example())[1])[1]


def test_finding_7_epochs_are_a_total_and_the_card_says_how_many_remain(dataset):
    small = ["training.epochs=2", "training.minutes=null", "model.hidden=[16, 16]", "training.batch_size=512", "evaluation.max_starts=5", "evaluation.horizon=5"]
    def card(): return plan_run("toy", "again", dataset, "CPU", overrides=small, records=[])
    assert remaining(card()) == (0, 2)
    run_experiment(load_config("toy", [*small, "training.epochs=1"]), dataset, run_folder("again"), "cpu", progress=False)
    assert remaining(card()) == (1, 1)
    assert "1 done, **1 remain**" in make_run_card("toy", "again", dataset, "CPU", overrides=small, records=[])[1]
    manifest = run_experiment(load_config("toy", small), dataset, run_folder("again"), "cpu", resume=True, progress=False)
    assert len(manifest["all_epochs"]) == 2 and remaining(card()) == (2, 0)       # one more, not two


# ---- written, made again, read in a terminal

def test_a_card_with_data_has_an_appendix(dataset, tmp_path):
    path = write_run_card("toy", "small", dataset, "local", overrides=["model.hidden=[32, 32]"], device="cpu", records=team_records())
    card, text = read_card(path)
    assert card.estimate["how"].startswith("measured here") and any("synthetic" in line for line in card.concerns)
    assert card.status == "pending review" and card.data["fingerprint"] and "(small.html)" in text and "synthetic" in section(text, "Data")
    page = (path.parent / "small.html").read_text()
    assert page.count('src="data:image/png') == 4 and "SYNTHETIC" in page and "every number is finite" in page and not re.search(r'(?:src|href)="https?:', page)
    cells = json.loads((path.parent / "small.ipynb").read_text())["cells"]
    assert not [o for c in cells for o in c.get("outputs", []) if o["output_type"] == "error"]


def test_made_again_it_keeps_what_was_said_and_loses_what_was_signed():
    write_run_card(**example())
    card, text = read_card("mamba2-22k-ss")
    write_card(card.model_copy(update={"findings": [Finding(text="why?", blocking=False, by="scav", date=card.created)]}), text)
    sign("mamba2-22k-ss", "mattie")
    write_run_card(**example(overrides=["training.lr=1e-4"]))
    again, _ = read_card("mamba2-22k-ss")
    assert again.findings[0].text == "why?" and again.status == "pending review" and again.created == card.created and again.config_hash != card.config_hash
    mark("mamba2-22k-ss", "launched", override="a test")
    with pytest.raises(UserError, match="belongs to a run that was launched"): write_run_card(**example())


def test_the_summary_and_the_commands():
    card, text = make_run_card(**example())
    said = summary(card, text)
    for word in ("goal", "data", "model", "training", "timing", "logging", "timeout", "concerns"): assert re.search(rf"^  {word} ", said, re.M), word
    assert "4,282,386" in said and "86,400 s, 2.6x" in said and card.status in STATUSES
    for line in re.findall(r"melee-wm launch .*", text):
        assert load_config(line.split()[2]) and "--on modal" in line and "--tracking online" in line
    with pytest.raises(UserError, match="melee-wm card policy"): make_run_card("fighter", "x", "2k", records=[])
    with pytest.raises(UserError, match="did you mean mamba2-22k-ss"): make_run_card("mamba2-22k-sss", "x", "2k", records=[])
    with pytest.raises(UserError, match="no such data"): make_run_card("toy", "x", "22kk", records=[])


# ---- policies

POLICY = dict(games=22_000, player="both", world_model="mlp-ceiling", hw_name="M3 Pro", tracking="online", records=team_records())

def test_the_policy_card_for_22000_games():
    card, text = make_policy_card(**POLICY)
    assert policy_flags(*plan_policy(**POLICY)) == [] and card.kind == "policy" and [r.name for r in card.reviewers] == ["mattie", "scav"] and card.id == "policy-22k"
    data, timing = section(text, "Data"), section(text, "Timing & cost")
    assert "206,800,000" in data and "186,120,000" in data and "| loading the data | 15 min |" in timing and card.epochs == 8
    assert re.findall(r"^## (.+)$", text, re.M) == ["Goal", "Distribution match", "Target metrics", "Data", "Model", "Training", "Infrastructure", "Logging & monitoring", "Timing & cost", "Escape hatches", "Prior baselines",
        "What's new in this run", "Launch command", "After the run", "Sign-off", "Review"] == list(policy_sections(world_of("default", [])))
    assert "imitation-4k" in section(text, "Prior baselines") and all(m in section(text, "Prior baselines") for m in ("stick_mae", "button_pressed_acc", "val_loss"))
    for row in ("| architecture | policy-mlp |", "| context K | 16 frames |", "| width | 256 |", "| blocks | 2 |", "| dropout | 0.0 |"): assert row in section(text, "Model"), row
    commands = re.findall(r"melee-wm launch .*", section(text, "Launch command"))
    assert [re.search(r"predict_player=(\w+)", c)[1] for c in commands] == ["both", "0", "1"] and commands[1].endswith("--run-name policy-22k-p0")
    sets = [re.findall(r"--set (\S+)", c) for c in commands]
    assert config_hash(load_config("fighter", sets[0])) == card.config_hash and len({config_hash(load_config("fighter", s)) for s in sets}) == 3


@pytest.mark.parametrize("changed, flag", [
    (dict(games=2000), "it learns from 2,000 games, mlp-ceiling from 22,000"),
    (dict(games=6000, world_model="default", overrides=["training.epochs=51"]), "51 epochs on 6,000 games: 5–8 are recommended"),
    (dict(games=6000, world_model="default", hw_name="CPU"), "a CPU for 6,000 games"),
    (dict(tracking="off"), "no tracking")])
def test_policy_flags(changed, flag):
    found = policy_flags(*plan_policy(**POLICY | changed))
    assert len(found) == 1 and flag in found[0]
    assert found[0] in make_policy_card(**POLICY | changed)[0].concerns


def test_a_policy_matches_its_world():
    write_run_card(**example())
    plan, world = plan_policy("match", 0, world_model="mamba2-22k-ss", hw_name="M3 Pro", records=team_records())
    assert plan.data.games == world.games == 22_000 and plan.run_name == "policy-22k-p0" and world.known_from.startswith("its card")
    assert plan_policy("match", 1, records=[])[1].games == len(json.loads((ROOT / "melee_wm/models/default/manifest.json").read_text())["game_md5s"])
    for wrong, message in ((dict(player=2), "no such player"), (dict(experiment="toy"), "not a policy"), (dict(games="many"), "no such data"), (dict(world_model="nobody"), "no checkpoint")):
        with pytest.raises(UserError, match=message): plan_policy(**POLICY | wrong)
