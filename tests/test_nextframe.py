"""A prediction becomes a frame (nextframe), is taught (losses) and judged (metrics): what must hold across the three, for every encoding."""
import pytest
import torch
from melee_wm.batches import from_games, gather, window_starts
from melee_wm.config import experiment_names, load_config
from melee_wm.core import quick_replays
from melee_wm.encoding import columns_of, controls_of, decode, encode, layout_of, take
from melee_wm.fields import BY_NAME, CONTROLS, HEADS
from melee_wm.losses import last_frames, loss
from melee_wm.melee import STAGES
from melee_wm.metrics import NAMES, batch_metrics, summarise
from melee_wm.rules import no_clock, start_clock, tick, uneventful
from melee_wm.nextframe import certain, choose, displacement, field_roles, head_names, head_targets, next_frame
from melee_wm.practice import practice_match
from melee_wm.slp import read_slp

LAYOUTS = ("v1", "v2", "v2.1", "baseline-v22", "exp-1a-state-age-embed")


@pytest.fixture(scope="module")
def match():
    return practice_match(3, frames=2000)


def table(game, layout):
    return {n: torch.from_numpy(v) for n, v in columns_of(game, layout).items()}


def noise(config, *lead, seed=0, scale=2.):
    g = torch.Generator().manual_seed(seed)
    return {n: scale * torch.randn(*lead, 2, *(config.encoding.projectiles,)*HEADS[n].items, HEADS[n].width, generator=g) for n in head_names(config.model.heads)}


def truth_again(game, config, clock=None):
    "The next frames of a match made from perfect predictions, beside the true ones."
    layout, heads, integrate = layout_of(config.encoding), config.model.heads, config.model.integrate_positions
    columns = table(game, layout)
    frames = encode(columns, torch.full((len(game),), game.stage), layout)
    last, true = take(frames, slice(0, -1)), take(frames, slice(1, None))
    made = next_frame(decode(last, layout), certain(head_targets(last, true, layout, heads, integrate)), controls_of(true, layout), true.stage, layout, heads, integrate, clock)
    return made, decode(true, layout), decode(last, layout)


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("integrate", ("true", "false"))
def test_taught_and_composed_again_gives_the_truth(match, name, integrate):
    config = load_config(name, [f"model.integrate_positions={integrate}"])
    made, true, last = truth_again(match, config)
    living = (last["action_state"] > 13) & (true["action_state"] > 13)
    roles = field_roles(layout_of(config.encoding), config.model.heads)
    for field in roles["predicted"] + roles["given"]:
        assert (made[field] - true[field]).abs()[living].max() < 2e-3, field


def test_real_replays_are_reproduced(replays):
    config, wrong = load_config("baseline-v22"), {}
    for path in quick_replays():
        made, true, _ = truth_again(read_slp(path), config)
        for field in true:
            wrong.setdefault(field, []).append((made[field] - true[field]).abs().gt(.006).float().mean().item())
    for field, shares in wrong.items():
        assert max(shares) < {"state_age": .12, "y": .01, "ground": .01}.get(field, .005), (field, shares)   # y and ground: some surfaces move, and nobody tells the rules
    assert max(wrong["action_state"]) == 0   # every real death, wait and return is by the rules


def test_speeds_move_real_fighters(replays):
    layout = layout_of(load_config("baseline-v22").encoding)
    right = total = 0
    for path in quick_replays():
        columns = table(read_slp(path), layout)
        last, true = ({n: v[part] for n, v in columns.items()} for part in (slice(0, -1), slice(1, None)))
        free = (true["hitlag"] < .5) & (last["action_state"] > 13) & (true["action_state"] > 13)
        error = torch.stack([(true[n] - last[n] - moved).abs() for n, moved in zip(("x", "y"), displacement(last, true))]).amax(0)
        right, total = right + (error[free] < .01).sum().item(), total + free.sum().item()
    assert right / total > .9


@pytest.mark.parametrize("name", LAYOUTS)
def test_any_nonsense_stays_a_match(match, name):
    "150 frames of random predictions, fed back: all fields there, in range, no stock lost twice, no percent lost alive."
    config = load_config(name)
    layout, columns = layout_of(config.encoding), table(match, layout_of(config.encoding))
    frame = {n: v[200:1000:100] for n, v in columns.items()}
    stage = torch.full((8,), match.stage)
    left, right, top, bottom = STAGES[match.stage].blast_zone
    clock = no_clock(frame)
    for i in range(150):
        new = next_frame(frame, noise(config, 8, seed=i, scale=.6), torch.zeros(8, 2, 13), stage, layout, config.model.heads, True, clock)
        assert list(new) == [f.name for f in layout.fields]
        assert all(v.isfinite().all() and v.dtype == frame[n].dtype for n, v in new.items())
        outside = (new["x"] < left) | (new["x"] > right) | (new["y"] > top) | (new["y"] < bottom)
        assert not outside[new["action_state"] > 10].any()
        was_dead, is_dead = frame["action_state"] <= 10, new["action_state"] <= 10
        assert (new["percent"] >= frame["percent"])[~is_dead & ~(new["action_state"] == 12)].all() and (new["percent"] <= 999).all()
        assert ((new["shield"] >= 0) & (new["shield"] <= 60)).all()
        if "stocks" in new:
            at_once = is_dead & ~was_dead & (new["action_state"] < 4)
            later = (frame["action_state"] == 4) & (clock.in_action == 131) | (frame["action_state"] == 7) & (clock.in_action == 43)
            assert torch.equal(new["stocks"], (frame["stocks"] - (at_once | later).float()).clamp(0, 4))   # one for each death
            assert not (was_dead & ~is_dead & (frame["stocks"] < .5)).any()
        if "hitlag" in new:
            assert torch.equal(new["hitlag"], new["hitlag"].round())
        clock, frame = tick(clock, frame, new), new


@pytest.mark.parametrize("name", ("v1", "baseline-v22"))
def test_players_and_streams_do_not_mix(match, name):
    config = load_config(name)
    layout, columns = layout_of(config.encoding), table(match, layout_of(config.encoding))
    last, prediction, controls = {n: v[300:316] for n, v in columns.items()}, noise(config, 16), torch.rand(16, 2, 13)
    stage = torch.full((16,), match.stage)
    make = lambda last, prediction, controls, stage: next_frame(last, prediction, controls, stage, layout, config.model.heads, True)
    together = make(last, prediction, controls, stage)
    swapped = make({n: v.flip(-1) for n, v in last.items()}, {n: v.flip(-2) for n, v in prediction.items()}, controls.flip(-2), stage)
    alone = make({n: v[3:4] for n, v in last.items()}, {n: v[3:4] for n, v in prediction.items()}, controls[3:4], stage[3:4])
    for n in together:
        assert torch.equal(together[n], swapped[n].flip(-1)), n   # nobody dies or returns here, so ports play no part
        assert torch.equal(together[n][3:4], alone[n]), n


@pytest.mark.parametrize("name", ("v1", "baseline-v22", "projectiles"))
def test_frames_without_a_referee_are_the_same(match, name):
    "Where nothing happens the referee is not asked; one dying fighter in the batch makes all frames go through it."
    config = load_config(name)
    layout, stage = layout_of(config.encoding), torch.full((61,), match.stage)
    columns = {n: torch.from_numpy(v) for n, v in columns_of(match, layout).items()}
    last, prediction = {n: v[300:361].clone() for n, v in columns.items()}, noise(config, 61, scale=.3)
    prediction["action"][..., :14] -= 20                                             # nobody says dead or coming back
    last["y"][60, 1] = -300.                                                         # and this one is gone
    first = lambda frame: {n: v[:60] for n, v in frame.items()}
    make = lambda last, prediction, n: next_frame(last, prediction, torch.zeros(n, 2, 13), stage[:n], layout, config.model.heads, True)
    together, apart = make(last, prediction, 61), make(first(last), first(prediction), 60)
    assert uneventful(first(last), apart, stage[:60]) and not uneventful(last, together, stage)
    assert together["action_state"][60, 1] == 0 and all(torch.equal(apart[n], v[:60]) for n, v in together.items())


@pytest.mark.parametrize("name", ("v1", "baseline-v22", "projectiles"))
def test_the_rules_never_wait_for_a_device(match, name):
    "On a device without values whatever must look at one fails: so nothing here does, but for the CPU's short cut."
    config = load_config(name)
    layout = layout_of(config.encoding)
    last = {n: v[300:316].to("meta") for n, v in table(match, layout).items()}
    prediction, stage = {n: v.to("meta") for n, v in noise(config, 16).items()}, torch.zeros(16, dtype=torch.long, device="meta")
    made = next_frame(last, prediction, torch.zeros(16, 2, 13, device="meta"), stage, layout, config.model.heads, True)
    clock = tick(no_clock(last), last, made)
    assert encode(made, stage, layout).floats.shape == (16, 2, layout.floats_per_player) and clock.in_action.is_meta
    assert all(v.is_meta and v.dtype == last[n].dtype for n, v in made.items())


def falling(layout, **values):
    start = {f.name: torch.zeros(1, 2, dtype=torch.long if f.kind == "category" else torch.float32) for f in layout.fields}
    return start | {"action_state": torch.full((1, 2), 29)} | {n: torch.full((1, 2), v) for n, v in values.items()}


def dream(frame, stage, frames, config, says=None, clock=None):
    "Frames of a model that says nothing changes, but for what `says(t)` overrides."
    layout, stage, history = layout_of(config.encoding), torch.tensor([stage]), []
    clock = clock or no_clock(frame)
    for t in range(frames):
        still = encode(frame, stage, layout)
        prediction = certain(head_targets(still, still, layout, config.model.heads, False)) | (says(t) if says else {})
        new = next_frame(frame, prediction, torch.zeros(1, 2, 13), stage, layout, config.model.heads, True, clock)
        clock, frame = tick(clock, frame, new), new
        history.append(frame)
    return {n: torch.stack([f[n][0, 0] for f in history]) for n in frame}


ACTION = lambda i: {"action": 10. * torch.nn.functional.one_hot(torch.full((1, 2), i), 400)}
WOBBLE = lambda t: {"dynamics": torch.tensor([0., .25 * (t % 3), 0.]).expand(1, 2, 3)}   # a stocks head that cannot decide


@pytest.mark.parametrize("stage", STAGES)
def test_a_death_by_rule(stage):
    config = load_config("baseline-v22")
    left, right, top, bottom = STAGES[stage].blast_zone
    for start in (dict(y=bottom + 10, speed_y=-3.), dict(x=left + 10, knockback_x=-6.), dict(x=right - 10, knockback_x=6.)):
        seen = dream(falling(layout_of(config.encoding), stocks=4., percent=88., **start), stage, 200, config, WOBBLE)
        action = seen["action_state"].tolist()
        assert seen["stocks"].unique().tolist() == [3., 4.] and seen["stocks"][-1] == 3
        assert sum(a <= 10 for a in action) == 60 and action.count(12) >= 60
        back = action.index(12)
        assert seen["percent"][back - 1] == 88 and seen["percent"][back] == 0 and seen["shield"][back] == 60
        assert abs(seen["y"][back + 59].item() - STAGES[stage].respawns[0][1]) < .1


def test_the_upper_line_needs_knockback():
    config = load_config("baseline-v22")
    floating = dict(y=198., stocks=4.)
    thrown = dream(falling(layout_of(config.encoding), knockback_y=5., **floating), 31, 300, config)
    assert thrown["stocks"][-1] == 3 and thrown["action_state"].unique().tolist() == [4, 12, 29][:len(thrown["action_state"].unique())]
    drifting = dream(falling(layout_of(config.encoding), speed_y=1., **floating), 31, 60, config)
    assert drifting["stocks"].unique().tolist() == [4] and drifting["y"].max() <= 200


def test_no_death_without_a_crossing_and_none_after_the_last_stock():
    config = load_config("baseline-v22")
    layout = layout_of(config.encoding)
    claimed = dream(falling(layout, stocks=4.), 31, 20, config, lambda t: ACTION(0))
    assert (claimed["action_state"] > 10).all() and (claimed["stocks"] == 4).all()
    over = dream(falling(layout, stocks=1., y=-107., speed_y=-3.), 31, 200, config)
    assert over["stocks"][-1] == 0 and over["action_state"][-1] == 0
    elsewhere = dream(falling(layout, stocks=4., y=-5000.), 20, 5, config)          # a stage without known blast zones
    assert (elsewhere["stocks"] == 4).all()
    assert dream(falling(layout, stocks=4.), 20, 5, config, lambda t: ACTION(0))["stocks"][-1] == 3   # there the model is believed


def test_the_clock_remembers_rates_and_waits():
    age = torch.tensor([0., 4.3, 8.6])[:, None].expand(3, 2)
    seed = {"action_state": torch.full((3, 2), 70), "state_age": age, "hitlag": torch.zeros(3, 2)}
    clock = start_clock(seed, torch.tensor([1, 3]))
    assert clock.in_action.tolist() == [0, 0] and clock.port.tolist() == [1, 3]     # the action may be older than what we saw
    assert torch.allclose(clock.age_step, torch.tensor(4.3))
    config = load_config("baseline-v22")
    landing = falling(layout_of(config.encoding), stocks=4.) | {"action_state": torch.full((1, 2), 70), "state_age": torch.full((1, 2), 8.6), "on_ground": torch.ones(1, 2)}
    ages = dream(landing, 31, 3, config, lambda t: ACTION(70), type(clock)(*(v[None] for v in clock)))["state_age"]
    assert torch.allclose(ages, torch.tensor([12.9, 17.2, 21.5]))


def test_drawing_is_reproducible_and_fair():
    logits = torch.tensor([.6, .3, .1]).log().expand(30_000, 3)
    draw = lambda seed, temperature=1.: choose(logits, False, temperature, torch.Generator().manual_seed(seed))
    assert torch.equal(draw(1), draw(1)) and not torch.equal(draw(1), draw(2))
    assert torch.allclose(draw(3).bincount() / 30_000, torch.tensor([.6, .3, .1]), atol=.01)
    assert draw(4, .05).float().mean() < .01                                        # cold: nearly always the likeliest
    bits = choose(torch.full((30_000, 1), .8).logit(), True, 1., torch.Generator().manual_seed(5))
    assert abs(bits.mean().item() - .8) < .01


def windows(match, name, positions=1, overrides=()):
    config = load_config(name, ["model.context_len=6", *overrides])
    layout = layout_of(config.encoding)
    data = from_games([("a", match)], layout)
    return config, layout, gather(data, window_starts(data, 6)[::20], 6, positions)


@pytest.mark.parametrize("name", experiment_names())
def test_every_experiment_teaches_every_head(match, name):
    config, layout, batch = windows(match, name)
    prediction = {n: v.requires_grad_() for n, v in noise(config, *batch.target.stage.shape).items()}
    total, heads = loss(prediction, batch, config, layout)
    total.backward()
    assert tuple(heads) == head_names(config.model.heads) and total.isfinite()
    assert all((v.grad.norm() > 0) == (n not in ("item_state", "item_spawn", "item_motion")) for n, v in prediction.items())   # the practice match has no items
    assert torch.isclose(total, sum(getattr(config.training.loss_weights, n) * v for n, v in heads.items()))


@pytest.mark.parametrize("kind", ("mse", "l1", "huber"))
@pytest.mark.parametrize("positions", (1, 6))
def test_the_perfect_prediction_costs_nothing(match, kind, positions):
    config, layout, batch = windows(match, "baseline-v22", positions, [f"training.float_loss={kind}"])
    perfect = certain(head_targets(last_frames(batch), batch.target, layout, config.model.heads, True))
    assert perfect["action"].shape[1] == positions
    assert loss(perfect, batch, config, layout)[0] < 1e-3
    measured = summarise(batch_metrics(perfect, batch, config, layout, actions=True))
    assert measured["action_acc"] == measured["action_change_acc"] == measured["p0_action_acc"] == measured["p1_action_acc"] == 1
    assert measured["position_mae"] < .05 and measured["damage_mae"] < 1e-3 and measured["worst_actions"] == []


def test_metrics_know_what_they_do_not_know(match):
    config, layout, batch = windows(match, "v2")
    measured = summarise(batch_metrics(noise(config, *batch.target.stage.shape), batch, config, layout))
    assert measured["velocity_mae"] is None and measured["dynamics_mae"] is None and measured["worst_actions"] is None
    assert all(0 <= measured[n] <= 1 for n in NAMES if n.endswith("acc"))
    assert set(summarise({})) == set(measured) and summarise({})["action_acc"] is None


def test_both_players_count(match):
    "action_change_acc once looked at player 0 only."
    config, layout, batch = windows(match, "baseline-v22")
    right = certain(head_targets(last_frames(batch), batch.target, layout, config.model.heads, True))
    wrong = {n: v.clone() for n, v in right.items()}
    wrong["action"][:, :, 1] = right["action"][:, :, 1].roll(1, -1)                 # player 1 is always wrong
    measured = summarise(batch_metrics(wrong, batch, config, layout))
    assert measured["p0_action_acc"] == 1 and measured["p1_action_acc"] < .1
    assert abs(measured["action_acc"] - (1 + measured["p1_action_acc"]) / 2) < 1e-9 and measured["action_change_acc"] < .9


def test_units():
    "An error of one game unit, one percent, one unit of speed reads as one."
    assert {n: BY_NAME[n].scale for n in ("percent", "x", "speed_y")} == {"percent": .01, "x": .05, "speed_y": .05}
    config = load_config("baseline-v22", ["model.context_len=6"])
    layout, match = layout_of(config.encoding), practice_match(3, frames=1600)
    data = from_games([("a", match)], layout)
    batch = gather(data, torch.arange(300, 360), 6)
    alive = ((last_frames(batch).ints[..., layout.int_index("action_state")] > 13) & (batch.target.ints[..., layout.int_index("action_state")] > 13)).all((1, 2))
    batch = batch._replace(frames=take(batch.frames, alive), controls=batch.controls[alive], target=take(batch.target, alive))
    perfect = certain(head_targets(last_frames(batch), batch.target, layout, config.model.heads, True))
    off = perfect | {"continuous": perfect["continuous"] + torch.tensor([.01, .1, 0, 0])}   # two units of x: a fighter's feet stay on the floor
    measured = summarise(batch_metrics(off, batch, config, layout))
    assert abs(measured["position_mae"] - 1) < 1e-3 and abs(measured["damage_mae"] - 1) < 1e-3
    faster = perfect | {"velocity": perfect["velocity"] + .05}
    assert abs(summarise(batch_metrics(faster, batch, config, layout))["velocity_mae"] - 1) < 1e-3


def test_the_order_of_controls(match):
    config = load_config("baseline-v22")
    layout = layout_of(config.encoding)
    last = {n: v[500:501] for n, v in table(match, layout).items()}
    controls = torch.arange(26.).reshape(1, 2, 13)
    made = next_frame(last, noise(config, 1), controls, torch.tensor([match.stage]), layout, config.model.heads, True)
    assert torch.equal(torch.stack([made[n] for n in CONTROLS], -1), controls)
