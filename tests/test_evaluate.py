"""The evaluator is right: its baselines are the published table, a model that does nothing scores what doing nothing scores, and the files it leads to read back."""
import json
from dataclasses import replace
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from melee_wm.baselines import baseline_scores, calm_starts, constant_velocity, future, heldout_games, mean_to, position_error, regular_starts
from melee_wm.config import EvaluationConfig, load_config
from melee_wm.core import UserError
from melee_wm.batches import Batch, from_games, gather
from melee_wm.encoding import columns_of, encode, layout_of, take
from melee_wm.evaluate import choose_starts, evaluate, plot_scorecard, random_starts, score_rollouts, scorecard, teacher_forced
from melee_wm.export import draw_rollout, read_rollout, rollout, to_game, write_rollout
from melee_wm.fields import BY_NAME, HEADS
from melee_wm.heads import head_widths
from melee_wm.losses import loss
from melee_wm.mamba2 import build_model
from melee_wm.practice import practice_match
from melee_wm.slp import read_slp
from melee_wm.rules import SUNK
from melee_wm.world import World, memories, replayed_controls, seed_clock, seed_windows

# the anchors every figure is quoted on: mean over horizons 1..5, 1..10, 1..20
TABLE = {
    ("all", "position", "persistence"): (1.972, 3.550, 6.395), ("all", "position", "constant_velocity"): (.954, 2.310, 5.831),
    ("all", "percent", "hold"): (.178, .361, .698), ("all", "action_state", "hold"): (.773, .652, .501),
    ("calm", "position", "persistence"): (1.925, 3.408, 6.110), ("calm", "position", "constant_velocity"): (.904, 2.175, 5.619),
    ("calm", "percent", "hold"): (.136, .238, .447), ("calm", "action_state", "hold"): (.769, .646, .491)}
MEASURE = {"position": "position_mae", "percent": "percent_mae", "action_state": "action_acc"}


class Idle(nn.Module):
    "A model that predicts that nothing changes: with integration this is constant velocity, without it persistence."

    def __init__(self, config):
        super().__init__()
        self.config, self.layout, self.context_len = config, layout_of(config.encoding), config.model.context_len
        self.heads_here, self.unused = head_widths(config.model.heads), nn.Parameter(torch.zeros(1))

    def forward(self, frames, controls):
        last = frames.map(lambda t: t[:, -1:])
        def output(head):
            if head.target == "class":
                return 20. * F.one_hot(last.ints[..., self.layout.int_index(head.fields[0])].long(), head.width)
            now = torch.stack([last.floats[..., self.layout.float_index(f)] for f in head.fields], -1)
            return {"delta": 0 * now, "absolute": now, "logit": 20 * now - 10}[head.target]
        return {name: output(HEADS[name]) for name in self.heads_here}


@pytest.fixture(scope="module")
def games():
    return [(f"practice{seed}", practice_match(seed, frames=1600)) for seed in range(3)]


def idle(*overrides):
    return Idle(load_config("toy", ["model.context_len=6", "evaluation.bootstrap=200", *overrides]))


@pytest.fixture(scope="module")
def result(games):
    return evaluate(idle("model.integrate_positions=false"), games, progress=False)


def test_baselines_are_the_published_table(replays):
    held = heldout_games(replays)
    parts = [(baseline_scores(g, s)[0], calm_starts(g, s)) for _, g in held for s in [regular_starts(len(g))]]
    calm = np.concatenate([c for _, c in parts])
    assert (len(held), sum(len(g) for _, g in held), len(calm), calm.sum()) == (12, 111_877, 11_157, 10_132)
    for (where, what, who), expected in TABLE.items():
        errors = np.concatenate([p[what, who] for p, _ in parts])[calm if where == "calm" else slice(None)].mean(0)
        assert [float(mean_to(errors, k)) for k in (5, 10, 20)] == pytest.approx(expected, abs=.00051), (where, what, who)


def test_the_whole_evaluation_reproduces_the_table(replays):
    "The same through `evaluate`, which scores in chunks, sums by game, and has a model to run as well."
    r = evaluate(idle("model.integrate_positions=false"), heldout_games(replays), progress=False)["rollout"]
    assert (r["starts"], r["calm"]["starts"], r["skipped_starts"]) == (11_157, 10_132, 0)
    for (where, what, who), expected in TABLE.items():
        means = r[where]["means"][MEASURE[what]]
        assert [means[who][k] for k in ("k5", "k10", "k20")] == pytest.approx(expected, abs=.00051), (where, what, who)
        if who != "constant_velocity" and where == "calm":
            assert [means["model"][k] for k in ("k5", "k10", "k20")] == pytest.approx(expected, abs=.03), (where, what, "idle model")
    assert r["all"]["means"]["position_mae"]["model"]["k20"] < TABLE["all", "position", "persistence"][2]   # the rules know when the dead come back


def test_an_idle_model_scores_what_doing_nothing_scores(result):
    r = result["rollout"]["calm"]
    np.testing.assert_allclose(r["percent_mae"]["model"], r["percent_mae"]["hold"], atol=1e-3)
    np.testing.assert_allclose(r["action_acc"]["model"], r["action_acc"]["hold"], atol=1e-6)
    np.testing.assert_allclose(r["position_mae"]["model"], r["position_mae"]["persistence"], atol=1e-3)
    assert r["verdicts"]["action_acc"]["k20"]["verdict"] == "even" and "NOT TOLD APART" in scorecard(result)
    assert result["teacher_forced"]["action_acc"] == pytest.approx(result["teacher_forced"]["doing_nothing"]["action_acc_hold"], abs=.005)
    everywhere = result["rollout"]["all"]["position_mae"]
    assert everywhere["model"][19] < everywhere["persistence"][19]   # the rules know when the dead come back


def test_an_integrating_idle_model_moves_with_constant_velocity(games):
    "Positions of the world are those of the baseline, from the same starts, where nothing but own speed and knockback moves anybody."
    game, world = games[0][1], World(idle())
    starts = regular_starts(len(game), horizon=5)
    free = calm_starts(game, starts, 5) & (game["hitlag"][starts] == 0).all(1) & ~game["on_ground"][starts].any(1) & (np.abs(game["x"][starts]) < 100).all(1) & (np.abs(game["y"][starts]) < 50).all(1)
    free[free] = (constant_velocity(game, starts[free], 5)[1] > -SUNK).all((1, 2))   # nobody falls through the floor
    starts, columns = starts[free], columns_of(game, world.layout)
    assert len(starts) > 3
    world.reset(seed_windows(columns, starts, world.context_len), torch.tensor([game.stage]), seed_clock(columns, starts, game.ports))
    dream = world.run(replayed_controls(columns, starts, 5))
    for name, moved in zip(("x", "y"), constant_velocity(game, starts, 5)):
        np.testing.assert_allclose(dream[name], moved, atol=1e-3, err_msg=name)


def test_shape_of_the_json(result, games):
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert {"config_hash", "data_fingerprint", "split", "games", "frames", "teacher_forced", "rollout", "coherence_300", "violations_per_1000", "events"} <= set(result)
    assert {"action_acc", "action_change_acc", "position_mae", "damage_mae", "velocity_mae", "loss", "per_category"} <= set(result["teacher_forced"])
    assert "total" in result["teacher_forced"]["loss"] and result["rollout"]["horizons"] == list(range(1, 21))
    assert result["games"] == 3 and result["frames"] == 4800
    for where in ("all", "calm"):
        part = result["rollout"][where]
        assert set(part["position_mae"]) == {"model", "persistence", "constant_velocity"}
        assert set(part["percent_mae"]) == set(part["action_acc"]) == {"model", "hold"}
        assert all(len(curve) == 20 for m in MEASURE.values() for curve in part[m].values())
        assert {"k5", "k10", "k20", "ci95"} <= set(part["coherence"])
        low, high = part["coherence"]["ci95"]["k20"]
        assert low <= part["coherence"]["k20"] <= high
        assert {"shield", "hitlag", "stocks", "facing", "jumps_left"} <= set(part["fields"])
    assert result["coherence_300"]["starts"] == 300 and result["coherence_300"]["seed"] == 42
    plot_scorecard(result)


def test_old_replays_lose_a_baseline_and_not_the_game(games):
    old = [(md5, replace(g, version=(3, 1, 0), columns={n: v for n, v in g.columns.items() if not n.startswith(("speed", "knockback", "hitlag"))})) for md5, g in games]
    v1 = load_config("v1", ["model.context_len=6", "evaluation.stride=40"])
    r = evaluate(build_model(v1), old, progress=False)
    assert r["rollout"]["all"]["position_mae"]["constant_velocity"] is None and r["rollout"]["all"]["position_mae"]["persistence"]
    assert "Slippi 3.5" in r["rollout"]["missing"]["constant_velocity"] and "missing: constant velocity" in scorecard(r)
    with pytest.raises(UserError, match="no game to evaluate on"):
        evaluate(idle(), old, progress=False)


def test_long_contexts_skip_starts_and_say_so(games):
    starts, skipped = choose_starts(games, 60, EvaluationConfig())
    assert skipped == 3 * 5 and min(s[0] for s in starts) == 60
    r = evaluate(idle("model.context_len=60", "evaluation.max_starts=40"), games[:1], progress=False)
    assert r["rollout"]["starts"] == 40 and r["rollout"]["skipped_starts"] == 5
    assert r["rollout"]["all"]["coherence"]["ci95"]["k5"] is None and "Only one game" in scorecard(r)
    assert all(s.min() >= 59 for s in random_starts(games, 60, 20))


@pytest.mark.parametrize("name", ["v1", "exp-3a-1a2a-lookahead", "mamba2-1a"])
def test_batch_size_changes_nothing(name, games):
    torch.manual_seed(0)
    world = World(build_model(load_config(name)))
    starts = choose_starts(games, world.context_len, EvaluationConfig(max_starts=40))[0]
    one, all_ = (score_rollouts(world, games, starts, ("percent", "action_state"), batch_size=n, progress=False) for n in (1, 4096))
    assert one.counts.sum(0).tolist() == all_.counts.sum(0).tolist() and one.counts[:, 0].sum() == 40
    for key in one.sums:
        np.testing.assert_allclose(one.sums[key], all_.sums[key], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["v1", "v2.1", "exp-3a-1a2a-lookahead", "mamba2-1a"])
@pytest.mark.parametrize("forced", [False, True])
def test_rollouts_read_back(name, forced, games, tmp_path):
    game = games[0][1]
    dream = rollout(World(build_model(load_config(name))), game, 200, 50, teacher_forced=forced, seed_game=games[0][0])
    assert dream.frame[0] == 201 and len(dream.frame) == 50 and dream.source["seed_game"] == "practice0"
    back = read_rollout(write_rollout(dream, tmp_path/"dream.json"))
    assert back.source == json.loads(json.dumps(dream.source)) and back.stage == dream.stage
    for mine, theirs in ((dream.columns, back.columns), (dream.truth, back.truth)):
        assert set(mine) == set(theirs)
        for n in mine:
            np.testing.assert_array_equal(mine[n], theirs[n], err_msg=n)
    again = read_slp(write_rollout(dream, tmp_path/"dream.slp"))
    assert "not a match that was played" in again.info["synthetic"] and "synthetic" in again.info["synthetic"]
    for n in dream.columns:
        if n in again:
            np.testing.assert_array_equal(again[n], dream.columns[n], err_msg=n)
    known = {f for fields in dream.source["roles"].values() for f in fields}
    assert not known & set(dream.source["carried"]) and ("speed_y" in dream.source["carried"]) == (name == "v1")
    for n in dream.source["carried"]:
        np.testing.assert_array_equal(dream.columns[n], np.repeat(game[n][323:324], 50, 0))
    draw_rollout(dream)


def test_the_first_dreamt_frame_follows_the_seed(games):
    "Row and frame numbers agree: an idle model's first frame is the seed frame, and the truth is the game's."
    game = games[0][1]
    dream = rollout(idle("model.integrate_positions=false"), game, 300, 5)
    np.testing.assert_allclose(dream.columns["x"][0], game["x"][423], atol=1e-4)
    np.testing.assert_array_equal(dream.truth["x"], game["x"][424:429])
    np.testing.assert_array_equal(to_game(dream)["buttons"], game["buttons"][424:429])


def test_errors_are_measured_where_they_happen():
    x = np.zeros((40, 2), "float32")
    x[20:] = 8
    true = (future(x, np.array([10, 15]), 20 - 5), future(0 * x, np.array([10, 15]), 15))
    error = position_error((0 * true[0], 0 * true[1]), true)
    assert error.shape == (2, 15) and (error[0, :9] == 0).all() and (error[0, 9:] == 4).all() and error[1, 4] == 4
    assert BY_NAME["percent"].kind == "float"


@pytest.fixture(scope="module")
def reader():
    "A small untrained model that was to learn by sequences."
    config = load_config("mamba2-1a", ["model.d_model=32", "model.headdim=16", "model.d_state=8", "training.sequence_len=16", "training.batch_size=2", "evaluation.bootstrap=50", "evaluation.max_starts=40"])
    torch.manual_seed(0)
    model = build_model(config).eval()
    for layer in model.heads.values():
        torch.nn.init.normal_(layer.weight, std=.02)
    return model


def test_memory_at_each_start_is_that_of_the_whole_game_so_far(reader, games):
    columns = columns_of(games[0][1], reader.layout)
    rows = np.array([0, 10, 11, 400, 1500])
    stage = np.full(len(rows), games[0][1].stage)
    kept = memories(reader, columns, rows, np.zeros(len(rows), int), stage)
    whole = encode({n: torch.from_numpy(v)[None] for n, v in columns.items()}, torch.full((1, len(columns["x"])), int(stage[0])), reader.layout)
    for i, row in enumerate(rows):
        with torch.inference_mode():
            expected = reader.prefill(take(whole, (slice(None), slice(row)))) if row else reader.init_state(1)
        for mine, theirs in zip(kept, expected):
            for a, b in zip(mine, theirs):
                assert torch.allclose(a[i], b[0], atol=1e-5), row


def test_one_step_by_sequences_is_one_pass_over_the_game(reader, games):
    "Scoring in pieces with carried memory is scoring the whole game at once, on the frames that windows score."
    md5, game = games[0]
    scored = teacher_forced(reader, [(md5, game)], torch.device("cpu"), batch_size=100, memory="state", progress=False)
    data, K, n = from_games([(md5, game)], reader.layout), reader.context_len, len(game)
    batch = gather(data, torch.tensor([0]), n - 1, n - 1)
    with torch.inference_mode():
        prediction = reader(batch.frames, batch.controls)
    late = Batch(take(batch.frames, (slice(None), slice(K - 1, None))), batch.controls[:, K - 1:], take(batch.target, (slice(None), slice(K - 1, None))))
    total, _ = loss({k: v[:, K - 1:] for k, v in prediction.items()}, late, reader.config, reader.layout)
    assert scored["windows"] == n - K == teacher_forced(reader, [(md5, game)], torch.device("cpu"), memory="window", progress=False)["windows"]
    assert scored["loss"]["total"] == pytest.approx(float(total), rel=1e-4)


def test_a_model_is_evaluated_as_it_was_taught(reader, games):
    as_taught, by_windows = evaluate(reader, games, progress=False), evaluate(reader, games, memory="window", progress=False)
    assert (as_taught["memory"], by_windows["memory"]) == ("state", "window")
    assert as_taught["rollout"]["all"]["position_mae"]["constant_velocity"] == by_windows["rollout"]["all"]["position_mae"]["constant_velocity"]
    assert as_taught["rollout"]["all"]["position_mae"]["model"] != by_windows["rollout"]["all"]["position_mae"]["model"]
    dream = rollout(World(reader), games[0][1], start=300, frames=30)
    columns = columns_of(games[0][1], reader.layout)
    world = World(reader)                                     # the same by hand: all frames up to the start as the seed
    world.reset({n: torch.from_numpy(v[None, :424]) for n, v in columns.items()}, torch.tensor([games[0][1].stage]), seed_clock(columns, np.array([423]), games[0][1].ports))
    frames = world.run(replayed_controls(columns, np.array([423]), 30))
    assert np.allclose(dream.columns["x"], frames["x"][0].numpy(), atol=1e-3)
