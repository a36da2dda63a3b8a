"The model that comes with the package: small, honest about itself, and better than doing nothing on games it has never seen."
import melee_wm.core
import json
import re
import numpy as np
import pytest
from melee_wm.baselines import heldout_games
from melee_wm.checkpoint import SHIPPED, find_checkpoint, load_model, read_manifest, ship
from melee_wm.config import EvaluationConfig
from melee_wm.core import UserError
from melee_wm.evaluate import evaluate

FOLDER = SHIPPED/"default"


def test_is_small_and_says_what_it_is():
    path = find_checkpoint("default")
    assert path.is_relative_to(SHIPPED) and sum(p.stat().st_size for p in FOLDER.rglob("*") if p.is_file()) <= 10_000_000
    model, manifest = load_model("default"), read_manifest(FOLDER)
    assert model.description["config_hash"] == manifest["config_hash"] and manifest["data_fingerprint"] and manifest["status"] == "finished"
    assert not manifest["git_dirty"], "trained from a committed state of this code"


def test_names_no_place_of_the_machine_that_made_it():
    for path in FOLDER.rglob("*.json"): assert not re.search(r'"(/|[A-Za-z]:\\\\|~)', path.read_text()), path


def test_never_trained_on_the_held_out_games(replays):
    held = set((replays/"heldout.txt").read_text().split())
    manifest = read_manifest(FOLDER)
    assert len(held) == 12 and not held & set(manifest["game_md5s"])


@pytest.fixture(scope="module")
def result():
    games = heldout_games()[::3]
    if not games: pytest.skip("no real replays")
    return evaluate(load_model("default"), games, "heldout", EvaluationConfig(max_starts=800, bootstrap=50), progress=False)


@pytest.mark.parametrize("measure, against, sign", [("position_mae", "constant_velocity", 1), ("position_mae", "persistence", 1), ("percent_mae", "hold", 1), ("action_acc", "hold", -1)])
def test_beats_doing_nothing_at_every_horizon(result, replays, measure, against, sign):
    "By the scorecard, over all starts; and again here over a few, where of percent only the far end is beyond chance."
    card = json.loads((FOLDER/"scorecard.json").read_text())
    for one, horizons in ((card, slice(None)), (result, slice(9, None) if measure == "percent_mae" else slice(None))):
        model, nothing = (np.array(one["rollout"]["all"][measure][who]) for who in ("model", against))
        assert len(model) == 20 and (sign*(nothing - model) > 0)[horizons].all(), list(zip(model, nothing))


def test_shipping_refuses_what_half_precision_cannot_hold(tmp_path):
    import torch
    from melee_wm.checkpoint import describe_checkpoint, save_checkpoint, update_manifest
    from melee_wm.config import load_config
    from melee_wm.mamba2 import build_model
    config = load_config("toy")
    model, run = build_model(config), tmp_path/"run"
    (run/"checkpoints").mkdir(parents=True)
    save_checkpoint(run/"checkpoints", "best", model, describe_checkpoint(config))
    with pytest.raises(UserError, match="without a manifest"): ship(run, "one", tmp_path/"models")
    update_manifest(run, name="run", status="finished")
    path = ship(run, "one", tmp_path/"models")
    for a, b in zip(load_model(path).state_dict().values(), model.state_dict().values()): torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)
    with torch.no_grad(): next(model.parameters()).fill_(1e5)
    save_checkpoint(run/"checkpoints", "best", model, describe_checkpoint(config))
    with pytest.raises(UserError, match="half precision"): ship(run, "two", tmp_path/"models")
    assert not (tmp_path/"models"/"two").exists(), "nothing half-made"


def test_is_symmetric(replays):
    "Mirrored matches on symmetric stages, and exchanged players, get the mirrored and exchanged answers."
    import torch
    from melee_wm.core import quick_replays
    from melee_wm.encoding import Frames, controls_of, encode_game
    from melee_wm.slp import read_slp
    from melee_wm.symmetry import mirror, mirror_controls, mirror_prediction, swap_players, symmetric
    model = load_model("default")
    layout, K, asked = model.layout, model.context_len, 0
    for game in map(read_slp, quick_replays()):
        frames, rows = encode_game(game, layout), torch.linspace(K, len(game) - 2, 200).long()
        window = Frames(*(torch.stack([t[r - K + 1:r + 1] for r in rows]) for t in frames))
        coming = torch.stack([controls_of(frames, layout)[r + 1] for r in rows])[:, None]
        with torch.inference_mode(): said, exchanged = model(window, coming.flatten(2)), model(swap_players(window), coming.flip(2).flatten(2))
        assert (exchanged["action"].flip(2).argmax(-1) == said["action"].argmax(-1)).all()
        assert (exchanged["continuous"].flip(2) - said["continuous"]).abs().max() < 1e-3
        if not symmetric(game.stage): continue
        everywhere = torch.ones(window.stage.shape, dtype=torch.bool)
        with torch.inference_mode(): image = model(mirror(window, layout, everywhere), mirror_controls(coming, everywhere[:, -1:]).flatten(2))
        back = mirror_prediction({n: v[:, 0] for n, v in image.items()}, torch.ones(len(rows), 2, dtype=torch.bool), window.stage[:, -1])
        alike = (back["action"].argmax(-1) == said["action"][:, 0].argmax(-1)).float().mean()
        assert alike > .99, f"the same action for {alike:.1%} of mirrored frames"
        asked += 1
    assert asked or not quick_replays()


def readme_table(card: dict) -> str:
    "What the README says of the shipped model, from its scorecard."
    means, ci = card["rollout"]["all"]["means"], card["rollout"]["all"]["coherence"]["ci95"]
    def row(title, values, digits): return f"| {title} | " + " | ".join(f"{values[k]:.{digits}f}" for k in ("k5", "k10", "k20")) + " |"
    rows = ["| mean over 1 to K frames ahead | K=5 | K=10 | K=20 |", "|---|---|---|---|",
        row("position error (units), **default**", means["position_mae"]["model"], 3), row("… constant velocity", means["position_mae"]["constant_velocity"], 3),
        row("percent error (points), **default**", means["percent_mae"]["model"], 3), row("… hold", means["percent_mae"]["hold"], 3),
        row("action accuracy, **default**", means["action_acc"]["model"], 3), row("… hold", means["action_acc"]["hold"], 3)]
    events, dreams = card["events"], card["dreams"]
    def event(name): return f"{name}s: {events[name]['teacher_forced']['recall']:.0%} one frame ahead, {events[name]['recall']:.0%} up to twenty ahead, {events[name]['false_per_10000']:.1f} false in 10,000 frames"
    survive = "; ".join(f"{what}: {d['survival']['600']:.0%} after ten seconds, {d['survival']['3600']:.0%} after a minute" for what, d in (("under a match's own controllers", dreams["replay"]), ("untouched", dreams["neutral"])))
    return "\n".join([*rows, "", f"{card['games']} held-out games, {card['frames']:,} frames, {card['rollout']['starts']:,} starts (data {card['data_fingerprint']}); 95% of resampled games give a position error at K=20 of {ci['k20'][0]:.2f} to {ci['k20'][1]:.2f}.",
        f"Events within three frames: {event('death')}; {event('respawn')}; {event('hit')}. Dreams of a minute that break no hard law: {survive}."])


def test_the_readme_says_what_the_scorecard_says():
    from melee_wm.core import project_root
    assert readme_table(json.loads((FOLDER/"scorecard.json").read_text())) in (project_root()/"README.md").read_text()
