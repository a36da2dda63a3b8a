"Fighters: what they see, how they decide, how they learn, and what the one in the package is worth."
import melee_wm.core
import melee_wm.imitate
import json
import os
import re
import signal
import threading
from pathlib import Path
import numpy as np
import pytest
import torch
from melee_wm.batches import from_games
from melee_wm.build import build
from melee_wm.checkpoint import SHIPPED, find_checkpoint, read_description, read_manifest, read_tensors, ship
from melee_wm.config import config_hash, experiment_names, load_config, make_config, to_dict
from melee_wm.core import UserError
from melee_wm.encoding import Frames, controls_of, decode
from melee_wm.fields import CONTROLS
from melee_wm.imitate import control_metrics, evaluate_policy, examples, imitate, means_of, policy_loss, policy_report, policy_scores, run_policy
from melee_wm.policy import ANALOG, CHOICES, HEADS_OF, Fighter, build_policy, classes_of, decide, load_fighter, load_policy, places, values_of
from melee_wm.practice import practice_match, write_practice
from melee_wm.symmetry import mirror, mirror_controls, swap_players
from melee_wm.track import read_metrics
from melee_wm.world import spawn_frames

SMALL = ["model.context_len=6", "model.moments=64", "training.batch_size=64", "training.precision=float32", "training.log_interval=5", "training.minutes=null"]
MLP = ["model.looks=[0, 4]", "model.width=32", "model.blocks=1"]
MAMBA2 = ["model.d_model=32", "model.d_state=8", "model.headdim=16"]
KINDS = {"classes": ("fighter", MLP), "regression": ("fighter-regression", MLP), "mamba2": ("fighter-mamba2", MAMBA2), "late": ("fighter", [*MLP, "model.delay=3"]), "late mamba2": ("fighter-mamba2", [*MAMBA2, "model.delay=3"]),
         "v1": ("fighter", [*MLP, "encoding.fields=v1"]), "items": ("fighter", [*MLP, "encoding.projectiles=2"])}


def small(kind: str, *more: str):
    name, overrides = KINDS[kind]
    return load_config(name, [*SMALL, *overrides, *more])


def policy(kind: str, seed: int = 0):
    "One with opinions: its heads are shaken out of their zeros."
    torch.manual_seed(seed)
    model = build_policy(small(kind)).eval()
    for head in model.heads.values(): torch.nn.init.normal_(head.weight, std=.3)
    return model


@pytest.fixture(scope="module")
def matches():
    return [(f"{seed:032x}", practice_match(seed, 500)) for seed in range(3)]


def windows(model, matches, count: int = 60):
    games = from_games(matches, model.layout)
    rows = torch.randperm(len(matches)*400, generator=torch.Generator().manual_seed(1))[:count] % 400 + 20
    return examples(games, rows, model.config)


@pytest.fixture(scope="module", params=list(KINDS))
def case(request, matches):
    model = policy(request.param)
    return model, *windows(model, matches)


def test_the_world_models_keep_their_hashes():
    shipped = read_description(find_checkpoint("default"))
    assert config_hash(make_config(shipped["config"])) == shipped["config_hash"]
    assert config_hash(load_config("toy", ["data.predict_player=both"])) == config_hash(load_config("toy"))
    assert config_hash(load_config("fighter", ["data.predict_player=0"])) != config_hash(load_config("fighter"))
    assert set(experiment_names(plays=True)) >= {"fighter", "fighter-mamba2", "fighter-regression"} and not set(experiment_names()) & set(experiment_names(plays=True))
    for name in experiment_names(plays=True): assert make_config(to_dict(load_config(name))) == load_config(name)


def test_bad_experiments_are_refused():
    for override, said in (("model.looks=[16]", "below context_len"), ("model.delay=-1", "delay"), ("model.hidden=[1, 2]", "unknown key"), ("data.predict_player=2", "predict_player"), ("training.sequence_len=8", "memory")):
        with pytest.raises(UserError, match=said): load_config("fighter", [override])


def test_every_class_comes_back_as_itself():
    last = torch.zeros(1, 13); last[0, :ANALOG] = torch.tensor([.0125, .0125, .0125, .0125, 1/140])    # on the grid, nowhere in the table
    for head, names in HEADS_OF.items():
        for i in range(len(places(head)) + 1):
            ids = {h: torch.zeros(1, dtype=torch.long) for h in HEADS_OF} | {head: torch.tensor([i])}
            coming = torch.cat([values_of(last, ids), last[:, ANALOG:]], -1)
            assert {h: int(v) for h, v in classes_of(last, coming).items()} == {h: int(v) for h, v in ids.items()}


def test_players_and_mirrors_are_exchanged_exactly(case):
    model, frames, me, _ = case
    u = torch.rand(len(me), CHOICES, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        pads = decide(model(frames, me), u)
        torch.testing.assert_close(decide(model(swap_players(frames), 1 - me), u), pads)
        image = decide(model(mirror(frames, model.layout, torch.ones(frames.stage.shape, dtype=torch.bool)), me), u)
    back = mirror_controls(image[:, None], torch.ones(len(me), 1, dtype=torch.bool))[:, 0]
    assert ((back - pads).abs().amax(-1) < 1e-4).float().mean() > .9     # practice matches are not all on stages that are their own mirror image


def test_answers_lie_on_the_games_grids(case):
    model, frames, me, _ = case
    for u in (None, torch.rand(len(me), CHOICES, generator=torch.Generator().manual_seed(0))):
        with torch.inference_mode(): pads = decide(model(frames, me), u)
        assert pads.shape == (len(me), len(CONTROLS)) and pads.isfinite().all()
        sticks, shoulder, buttons = pads[:, :4], pads[:, 4], pads[:, ANALOG:]
        torch.testing.assert_close(sticks*80, (sticks*80).round(), atol=1e-4, rtol=0); torch.testing.assert_close(shoulder*140, (shoulder*140).round(), atol=1e-4, rtol=0)
        moved = (pads != controls_of(frames, model.layout)[torch.arange(len(me)), -1, me])[:, :4].unflatten(-1, (2, 2)).any(-1)    # the script holds its sticks outside of the circle
        assert (sticks.unflatten(-1, (2, 2)).norm(dim=-1)[moved] < 1.02).all() and 0 <= shoulder.min() and shoulder.max() <= 1 and set(buttons.unique().tolist()) <= {0., 1.}


def test_a_late_fighter_knows_its_hands_and_nothing_else(matches):
    for kind in ("late", "late mamba2"):
        model = policy(kind); frames, me, _ = windows(model, matches); d, K = model.delay, model.context_len
        with torch.inference_mode():
            said = model(frames, me)["buttons"]
            other = Frames(*(t.clone() for t in frames)); mine = torch.nn.functional.one_hot(me, 2).bool()
            hands = torch.zeros(other.floats.shape[-1], dtype=torch.bool); hands[model.layout.control_slice] = True
            free = (~mine[:, None, :, None] | ~hands) & (torch.arange(K + d) >= K)[None, :, None, None]     # the opponent in the last d frames, and oneself but for the hands
            other.floats[free] += .7; other.ints[:, K:] = 0
            assert torch.equal(model(other, me)["buttons"], said)
            other.floats[:, -1, :, model.layout.control_slice] *= -1
            assert not torch.equal(model(other, me)["buttons"], said)


def test_a_fighter_is_the_same_alone_and_in_company(matches):
    game = matches[0][1]
    model = policy("classes")
    frames, me, _ = windows(model, matches, 16); columns = decode(frames, model.layout); stage = frames.stage[:, 0]
    fighter = Fighter(model, None)
    together = fighter.act(columns, stage, me)
    for i in (0, 7): assert torch.equal(fighter.act({n: v[i:i + 1] for n, v in columns.items()}, stage[i:i + 1], me[i:i + 1])[0], together[i])
    longer = {n: torch.cat([v[:, :1].expand(-1, 5, -1), v], 1) for n, v in columns.items()}
    assert torch.equal(fighter.act(longer, stage, me), together)                                        # it reads the last frames only
    first = {n: v[:, -1:] for n, v in columns.items()}
    assert torch.equal(fighter.act(first, stage, me), fighter.act({n: v.expand(-1, model.frames, -1) for n, v in first.items()}, stage, me))
    draws = [Fighter(model, 1., torch.Generator().manual_seed(3)).act(columns, stage, me) for _ in range(2)]
    assert torch.equal(*draws) and not torch.equal(draws[0], Fighter(model, 1., torch.Generator().manual_seed(4)).act(columns, stage, me))
    with pytest.raises(UserError, match="cannot see"): fighter.act({"x": columns["x"]}, stage, me)


def test_temperature_sharpens_where_and_not_whether():
    torch.manual_seed(0)
    said = {"main": torch.randn(1, 114)*2, "c": torch.randn(1, 26), "shoulder": torch.randn(1, 8), "buttons": torch.randn(1, 8), "last": torch.zeros(1, 13), "mirrored": torch.zeros(1, dtype=torch.bool)}
    said["last"][0, :2] = .0125
    n = 4000; said = {k: v.expand(n, *v.shape[1:]) for k, v in said.items()}; u = torch.rand(n, CHOICES)
    even, sharp = decide(said, u, 1.), decide(said, u, .3)
    stays = [float((p[:, :2] == said["last"][:, :2]).all(-1).float().mean()) for p in (even, sharp)]
    expected = float(said["main"][0].softmax(-1)[0])
    assert abs(stays[0] - expected) < .03 and abs(stays[1] - expected) < .03
    assert len(sharp[:, :2].unique(dim=0)) < len(even[:, :2].unique(dim=0)) and torch.equal(even[:, ANALOG:], sharp[:, ANALOG:])
    shares = torch.stack([(u[:, 3 + i] < said["buttons"][0, i].sigmoid()).float().mean() for i in range(8)])
    torch.testing.assert_close(even[:, ANALOG:].mean(0), shares)


def test_the_network_and_the_choice_can_be_exported(matches):
    class Whole(torch.nn.Module):
        def __init__(self, model): super().__init__(); self.model = model
        def forward(self, floats, ints, stage, me, uniforms, temperature): return decide(self.model(Frames(floats, ints, stage), me), uniforms, temperature)
    whole = Whole(policy("classes")).eval()
    frames, me, _ = windows(whole.model, matches, 8)
    inputs = (*frames, me, torch.rand(len(me), CHOICES), torch.tensor(.8))
    with torch.no_grad(): said = whole(*inputs)              # also fills the tables that are made once
    batch = torch.export.Dim("batch", min=1, max=1024)
    program = torch.export.export(whole, inputs, dynamic_shapes=(*[{0: batch}]*5, None), strict=False)
    with torch.no_grad():
        assert torch.equal(program.module()(*inputs), said)
        assert torch.equal(program.module()(*(t[:2] for t in inputs[:5]), inputs[5]), said[:2])


def test_the_metrics_of_a_hand_made_example():
    last, coming, said = torch.zeros(3, 13, 13).unbind()
    a, b = CONTROLS.index("button_a"), CONTROLS.index("button_b")
    last[0, a] = 1; coming[0, a] = 1; said[0, a] = 1          # held
    coming[1, a] = 1; said[1, a] = 1                          # pressed, and said
    coming[2, b] = 1                                          # pressed, not said
    said[3, b] = 1                                            # said, not pressed
    coming[4, 0] = 1.; said[4, 0] = .5                        # the main stick moves, half of it said
    m = means_of(control_metrics(said, last, coming))
    assert m["button_pressed_acc"] == pytest.approx(2/3) and m["press_recall"] == .5 and m["press_precision"] == .5
    assert m["stick_mae"] == pytest.approx(.5/(13*4)) and m["stick_moved_mae"] == pytest.approx(.25)
    assert m["change_acc"] == pytest.approx(11/13) and m["change_recall"] == pytest.approx(2/3) and m["change_rate"] == pytest.approx(3/13)
    assert m["button_acc"] == pytest.approx(1 - 2/(13*8))


def test_each_player_or_both(matches):
    both, only = small("classes"), small("classes", "data.predict_player=1")
    games = from_games(matches, policy("classes").layout); rows = torch.tensor([40, 700])
    _, me, coming = examples(games, rows, both)
    _, one, hands = examples(games, rows, only)
    assert me.tolist() == [0, 0, 1, 1] and one.tolist() == [1, 1] and torch.equal(coming[2:], hands)


@pytest.mark.parametrize("kind", ["classes", "regression", "mamba2"])
def test_learns(kind, matches, tmp_path):
    config = small(kind, "training.epochs=2"); games = from_games(matches, build_policy(config).layout)
    before = policy_scores(build_policy(config), games)["loss"]["total"]
    outcome = imitate(config, games.select(games.md5s[:2]), games.select(games.md5s[2:]), tmp_path, progress=False)
    after = outcome.position.epochs[-1]
    assert outcome.status == "finished" and after["val_loss/total"] < .95*before and {"metric/stick_mae", "metric/button_acc", "metric/button_pressed_acc", "val_metric/change_acc"} <= set(after)
    assert (tmp_path/"best.safetensors").is_file() and (tmp_path/"final.safetensors").is_file()


def test_the_state_is_saved_after_the_weights_it_belongs_to(matches, tmp_path, monkeypatch):
    "So a kill between the two leaves weights that the resumed run writes again."
    config, steps, save = small("classes", "training.epochs=2"), [], melee_wm.imitate.save_training_state
    games = from_games(matches, build_policy(config).layout)
    def saves(folder, state):
        assert read_tensors(folder/"latest.safetensors")[1]["step"] == state.values["position"]["step"]
        steps.append(state.values["position"]["step"]); save(folder, state)
    monkeypatch.setattr(melee_wm.imitate, "save_training_state", saves)
    imitate(config, games, None, tmp_path, progress=False)
    assert len(steps) == 2 and steps[1] == 2*steps[0]


def test_stopped_and_resumed_is_the_same_run(matches, tmp_path):
    config = small("classes", "training.epochs=2", "model.dropout=0.1", "training.log_interval=4")
    games = from_games(matches, build_policy(config).layout); train, val = games.select(games.md5s[:2]), games.select(games.md5s[2:])
    whole = imitate(config, train, val, tmp_path/"whole", progress=False)
    class Stops:
        "A tracker that presses Ctrl-C when it has heard enough."
        def __init__(self, step): self.step = step
        def log(self, values, step, kind="batch"):
            if step == self.step: os.kill(os.getpid(), signal.SIGINT)
    assert threading.current_thread() is threading.main_thread()
    cut = imitate(config, train, val, tmp_path/"cut", tracker=Stops(8), progress=False)
    assert cut.status == "interrupted" and 0 < cut.position.step < whole.position.step
    rest = imitate(config, train, val, tmp_path/"cut", resume=True, progress=False)
    a, b = (read_tensors(tmp_path/who/"final.safetensors")[0] for who in ("whole", "cut"))
    assert rest.status == "finished" and all(torch.equal(a[n], b[n]) for n in a)
    with pytest.raises(UserError, match="another configuration"): imitate(small("classes", "training.epochs=2", "training.lr=0.1"), train, val, tmp_path/"cut", resume=True, progress=False)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("policies")
    write_practice(folder/"slp", games=2, seed=0)
    build([folder/"slp"], folder/"data", progress=False)
    run_policy(small("classes", "training.epochs=1"), folder/"data", folder/"run", device="cpu", progress=False)
    return folder/"run"


def test_a_run_leaves_a_record(run):
    manifest, card = read_manifest(run), json.loads((run/"scorecard.json").read_text())
    assert manifest["status"] == "finished" and manifest["synthetic"] and manifest["parameters"] and manifest["config"]["data"]["predict_player"] == "both"
    assert {"metric/stick_mae", "metric/button_acc", "metric/button_pressed_acc", "loss/total"} <= set(read_metrics(run, "batch")[0])
    assert "val_metric/press_recall" in read_metrics(run, "epoch")[0] or "val_metric/change_acc" in read_metrics(run, "epoch")[0]
    assert card["split"] == "val" and "repeat last" in policy_report(card)
    with pytest.raises(UserError, match="name is in use"): run_policy(small("classes"), run.parent/"data", run, device="cpu", progress=False)
    assert evaluate_policy(run, run.parent/"data")["games"] == len(manifest["val_md5s"])
    with pytest.raises(UserError, match="not a policy"): run_policy(load_config("toy"), run.parent/"data", run.parent/"other", device="cpu", progress=False)


def test_a_run_can_be_played_and_shipped(run, tmp_path):
    path = ship(run, "one", tmp_path)
    a, b = load_policy(run), load_policy(path)
    assert a.description["config_hash"] == b.description["config_hash"]
    columns = {n: torch.from_numpy(v)[None] for n, v in spawn_frames(31, (2, 20), 3).items()}
    assert load_fighter(path, None).act(columns, torch.tensor([31]), torch.tensor([1])).shape == (1, 13)
    with pytest.raises(UserError, match="not a fighter"): load_fighter("default")
    with pytest.raises(UserError, match="no checkpoint"): load_fighter(tmp_path/"nobody")


def test_the_shipped_fighter_is_small_and_says_what_it_is():
    folder = SHIPPED/"fighter"
    model, manifest = load_policy(), read_manifest(folder)
    assert sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) <= 5_000_000 and sum(p.numel() for p in model.parameters()) <= 1_300_000
    assert model.description["config_hash"] == manifest["config_hash"] and manifest["status"] == "finished"
    for path in folder.rglob("*.json"): assert not re.search(r'"(/|[A-Za-z]:\\\\|~)', path.read_text()), path


def test_the_shipped_fighter_beats_repeating_the_last_input():
    card = json.loads((SHIPPED/"fighter"/"scorecard.json").read_text())
    ours, lazy = card["likeliest"], card["repeat_last"]
    assert ours["stick_mae"] < lazy["stick_mae"] and ours["button_acc"] > lazy["button_acc"] and ours["change_acc"] > lazy["change_acc"] + .05 and ours["press_recall"] > .1
    assert abs(card["sampled"]["change_rate"] - (1 - lazy["change_acc"])) < .05        # it changes its hands about as often as people did


def test_the_shipped_fighter_never_saw_the_held_out_games(replays):
    held = set((replays/"heldout.txt").read_text().split())
    assert not held & set(read_manifest(SHIPPED/"fighter")["game_md5s"])
