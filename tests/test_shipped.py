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
    curves = result["rollout"]["all"][measure]
    model, nothing = (np.array(curves[who]) for who in ("model", against))
    assert len(model) == 20 and (sign*(nothing - model) > 0).all(), list(zip(model, nothing))


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
