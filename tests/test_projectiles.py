"""Projectiles from the replay to the slots, through a model's heads into the next frame, and back into a replay; and who is not let in."""
from dataclasses import replace

import numpy as np
import pytest
import torch

from melee_wm.batches import from_games, gather, window_starts
from melee_wm.baselines import flying_on, heldout_games, projectile_starts
from melee_wm.config import config_hash, load_config
from melee_wm.core import UserError, quick_replays
from melee_wm.encoding import (EncodingRefused, check_encodable, columns_of, controls_of, decode, encode, encode_game, item_columns, items_of,
                               layout_of, slots_of, take)
from melee_wm.evaluate import evaluate
from melee_wm.export import read_rollout, rollout, to_game, write_rollout
from melee_wm.fields import BY_NAME, CONTROLS, HEADS
from melee_wm.frame import ITEM_COLUMNS, Game
from melee_wm.losses import last_frames, loss
from melee_wm.mamba2 import build_model, parameter_count
from melee_wm.melee import PROJECTILES, STAGES, projectile_of, surface_of
from melee_wm.metrics import ITEM_NAMES, batch_metrics, summarise
from melee_wm.nextframe import certain, field_roles, head_names, head_targets, items_in, next_frame, next_items
from melee_wm.practice import practice_match
from melee_wm.slp import read_slp
from melee_wm.world import World, seed_windows

CONFIG = load_config("projectiles")
LAYOUT, SLOTS = layout_of(CONFIG.encoding), CONFIG.encoding.projectiles


@pytest.fixture(scope="module")
def shooters(replays) -> list[Game]:
    "Real matches in which Fox or Falco shoots."
    games = [read_slp(path) for path in quick_replays()]
    return [game for game in games if np.isin(game.items["type"], (54, 55)).sum() > 100]


def random_items(seed, frames=300, owners=(0, 1)):
    "A table of items that come and go at random, some of them held, spent, or nobody's."
    rng, rows = np.random.default_rng(seed), []
    for life in range(60):
        first, length, owner = int(rng.integers(frames)), int(rng.integers(1, 40)), int(rng.choice((*owners, -1)))
        kind, x, y, vx, vy = int(rng.choice((54, 55, 74, 79, 99, 210, 300))), *rng.uniform(-50, 50, 2), *rng.uniform(-5, 5, 2)
        for f in range(first, min(first + length, frames)): rows.append((f, life, owner, kind, rng.integers(0, 9), x + vx*(f - first), y + vy*(f - first), vx, vy))
    frame, ids, owner, kind, state, x, y, vx, vy = np.array(sorted(rows)).T
    table = dict(frame=frame, id=ids, owner=owner, type=kind, state=state, x=x, y=y, velocity_x=vx, velocity_y=vy)
    return {n: v.astype("int32" if n == "frame" else ITEM_COLUMNS[n][0]) for n, v in table.items()}


def slot_table(game, layout):
    return {n: v for n, v in columns_of(game, layout).items() if n.startswith("item")}


# ---- nothing changes where there are none --------------------------------------------------------------------------

def test_without_projectiles_nothing_has_changed():
    plain = load_config("exp-1a-state-age-embed")
    assert parameter_count(plain) == 1_433_602 and not layout_of(plain.encoding).slots and not any(f.slot for f in layout_of(plain.encoding).fields)
    assert not any("item" in name for name in build_model(plain).state_dict()) and plain.model.heads == ("core", "kinematics", "combat")
    assert config_hash(plain) == config_hash(load_config("exp-1a-state-age-embed", ["training.loss_weights.item_type=7"]))
    assert config_hash(CONFIG) != config_hash(plain)


def test_slots_and_heads_go_together():
    for overrides in (["encoding.projectiles=1"], ["model.heads=[core, projectiles]"], ["encoding.projectiles=5", "model.heads=[core, projectiles]"]):
        with pytest.raises(UserError, match="projectiles"):
            load_config("toy", overrides)
    assert load_config("v1", ["encoding.projectiles=4", "model.heads=[core, projectiles]"]).encoding.projectiles == 4


@pytest.mark.parametrize("slots", (1, 2, 3, 4))
def test_each_slot_costs_sixteen_numbers_a_player(slots):
    config = load_config("projectiles", [f"encoding.projectiles={slots}"])
    layout, base = layout_of(config.encoding), layout_of(load_config("exp-1a-state-age-embed").encoding)
    assert (layout.per_player - base.per_player, layout.frame - base.frame) == (16*slots, 32*slots)
    assert (layout.floats_per_player - base.floats_per_player, layout.ints_per_player - base.ints_per_player) == (4*slots, 2*slots)
    prediction = build_model(config)(*_one_window(layout, config.model.context_len))
    assert {n: tuple(prediction[n].shape[2:]) for n in prediction if HEADS[n].items} == {"item_type": (2, slots, 32), "item_state": (2, slots, 12), "item_spawn": (2, slots, 4), "item_motion": (2, slots, 4)}


def _one_window(layout, K):
    from melee_wm.heads import random_frames
    return random_frames(layout, 1, K), torch.zeros(1, 1, layout.control_dim)


# ---- slots ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("seed", range(20))
def test_slots_against_a_loop_over_frames(seed):
    "The same rule, played frame by frame: keep your slot, take the lowest free one at birth or none ever, rest one frame."
    items, port, slots = random_items(seed), 1, 1 + seed % 4
    seat, resting, lost, expected = {}, set(), set(), {}
    for f in range(300):
        here = sorted((int(items["id"][r]), r) for r in np.flatnonzero((items["frame"] == f) & (items["owner"] == port)) if projectile_of(items["type"][r], items["state"][r]))
        lives = {i for i, _ in here}
        freed = {s for i, s in seat.items() if i not in lives}
        seat, lost = {i: s for i, s in seat.items() if i in lives}, lost & lives
        for i, r in here:
            free = sorted(set(range(1, slots + 1)) - set(seat.values()) - freed)
            if i not in seat and i not in lost:
                if free: seat[i] = free[0]
                else: lost.add(i)
            if i in seat: expected[r] = seat[i]
    rows, seats = slots_of(items, port, slots)
    assert dict(zip(rows.tolist(), seats.tolist())) == expected and expected


@pytest.mark.parametrize("seed", range(5))
def test_two_slots_are_the_first_of_four(seed):
    game = Game(31, {"x": np.zeros((300, 2), np.float32)}, items=random_items(seed))
    four, two = item_columns(game, 4), item_columns(game, 2)
    assert set(two) < set(four) and all((four[n] == v).all() for n, v in two.items())


@pytest.mark.parametrize("seed", range(5))
def test_slots_to_items_and_back(seed):
    game = Game(31, {"x": np.zeros((300, 2), np.float32)}, ports=(0, 1), items=random_items(seed))
    before = item_columns(game, 3)
    table = items_of(before, game.ports)
    assert (np.diff(table["frame"]) >= 0).all() and len(set(zip(table["frame"].tolist(), table["id"].tolist()))) == len(table["frame"])
    assert all(len(set(table["owner"][table["id"] == i].tolist())) == 1 for i in np.unique(table["id"]))
    after = item_columns(replace(game, items=table), 3)
    assert all((after[n] == v).all() for n, v in before.items())


def test_a_taken_slot_holds_the_same_item(shooters):
    "Where a slot is taken in two frames in a row, the replay has one id, kind and owner there; and no id ever changes its slot."
    for game in shooters:
        for port in game.ports:
            rows, seats = slots_of(game.items, port, SLOTS)
            frame, ids = game.items["frame"][rows], game.items["id"][rows]
            at = {(f, s): i for f, s, i in zip(frame.tolist(), seats.tolist(), ids.tolist())}
            assert len(at) == len(rows) and (game.items["owner"][rows] == port).all()
            assert all(at.get((f + 1, s), i) == i for (f, s), i in at.items())
            assert all(len(set(seats[ids == i].tolist())) == 1 for i in np.unique(ids))


def test_round_trip_of_real_games(shooters):
    for game in shooters:
        before, after = columns_of(game, LAYOUT), decode(encode_game(game, LAYOUT), LAYOUT)
        assert list(before) == list(after)
        for name in slot_table(game, LAYOUT):
            exact = BY_NAME[name].kind == "category"
            assert (np.array_equal if exact else lambda a, b: np.allclose(a, b, rtol=2**-22, atol=0))(after[name].numpy(), before[name]), name
        held = np.isin(game.items["type"], (74, 75))   # the guns take no slot
        assert held.any() and not projectile_of(game.items["type"][held], game.items["state"][held]).any()


# ---- refusals ------------------------------------------------------------------------------------------------------

def test_who_is_refused(shooters):
    game, plain = shooters[0], layout_of(load_config("v1").encoding)
    check_encodable(game, LAYOUT)
    def reason(game, layout):
        with pytest.raises(EncodingRefused) as refusal: check_encodable(game, layout)
        return refusal.value.reason
    assert reason(replace(game, items=None), LAYOUT) == "missing items"
    assert reason(replace(game, items={n: v for n, v in game.items.items() if n != "owner"}), LAYOUT) == "missing item owners"
    wild = game.items["x"].copy(); wild[5] = np.nan
    assert reason(replace(game, items=game.items | {"x": wild}), LAYOUT) == "item x out of range"
    check_encodable(replace(game, items=None), plain)
    sheik = game["character"].copy(); sheik[1000:, 1] = 7
    for layout in (plain, LAYOUT):   # at any level, also where the character is not seen
        assert reason(replace(game, columns=game.columns | {"character": sheik}), layout) == "transformation: the character changes in the game"
        assert reason(replace(game, info={"followers": (1,)}), layout) == "ice climbers: the second climber is not encoded"
        assert reason(replace(game, characters=(14, 2)), layout) == "ice climbers: the second climber is not encoded"


# ---- heads and the next frame --------------------------------------------------------------------------------------

def test_perfect_predictions_reproduce_every_item(shooters):
    for game in shooters:
        frames = encode_game(game, LAYOUT)
        last, true = take(frames, slice(0, -1)), take(frames, slice(1, None))
        said = certain(head_targets(last, true, LAYOUT, CONFIG.model.heads, True))
        made = next_frame(decode(last, LAYOUT), said, controls_of(true, LAYOUT), true.stage, LAYOUT, CONFIG.model.heads, True)
        ours, real = items_in(made, SLOTS), items_in(decode(true, LAYOUT), SLOTS)
        assert (real["type"] > 0).sum() > 200
        for name in ours:
            assert (ours[name] - real[name]).abs().max() <= (0 if name in ("type", "state") else 1e-3), name


def test_one_item_frame_by_frame_from_predictions(shooters):
    "Not each frame from the true one, but the items of a whole match from the empty first frame on, fed back."
    game = shooters[0]
    frames = encode_game(game, LAYOUT)
    now = {n: v[0] for n, v in decode(take(frames, slice(0, 1)), LAYOUT).items()}
    targets = head_targets(take(frames, slice(0, -1)), take(frames, slice(1, None)), LAYOUT, CONFIG.model.heads, True)
    said, true = certain({n: targets[n] for n in targets if HEADS[n].items}), decode(frames, LAYOUT)
    for t in range(1, 1500):
        owners = {n: true[n][t - 1] for n in ("x", "y", "facing")}
        now = owners | next_items(now | owners, {n: v[t - 1] for n, v in said.items()}, frames.stage[t], SLOTS)
        for name, value in now.items():
            if name.startswith("item"): assert (value - true[name][t]).abs().max() < 5e-3, (t, name)


def scene(kind, x=0., speed=0., slots=SLOTS):
    "One frame, two fighters, one item in the first slot of the first."
    frame = {f.name: torch.zeros(1, 2, dtype=torch.long if f.kind == "category" else torch.float32) for f in LAYOUT.fields}
    frame["action_state"][:] = 14
    for name, value in (("type", kind), ("x", x), ("speed_x", speed)): frame[f"item1_{name}"][0, 0] = value
    return frame


def saying(kind=None, slot=0, player=0, **numbers):
    "A prediction for the heads of items: that all stays as it is, but for one slot that holds `kind`, and what its other heads say, game units."
    said = {n: torch.zeros(1, 2, SLOTS, HEADS[n].width) for n in HEADS if HEADS[n].items}
    if kind is not None: said["item_type"][0, player, slot, kind] = 20
    for head, values in numbers.items(): said[f"item_{head}"][0, player, slot] = torch.tensor(values)*BY_NAME["item1_x"].scale
    return said


@pytest.mark.parametrize("stage", [*STAGES, 0])
def test_items_end_at_the_lines(stage):
    known = stage in STAGES   # stage 0 has no lines that anybody knows
    left, right, top, bottom = STAGES[stage].blast_zone if known else (-250., 250., 200., -100.)
    at = torch.tensor([stage])
    for x, speed, there in ((right - 8, 7., True), (right - 6, 7., not known), (left + 8, -7., True), (left + 6, -7., not known)):
        new = next_items(scene(1, x, speed), saying(1), at, SLOTS)
        assert (new["item1_type"][0, 0].item() == 1) == there and (there or not any(v.any() for v in new.values()))
    high = scene(1); high["item1_y"][0, 0] = top + 300
    assert next_items(high, saying(1), at, SLOTS)["item1_type"][0, 0] == 1   # the upper line stops no laser


def test_an_item_keeps_its_kind_and_an_empty_slot_is_empty():
    turnip = next_items(scene(1, 3., 2.), saying(21), torch.tensor([32]), SLOTS)
    assert turnip["item1_type"][0, 0] == 1 and turnip["item1_x"][0, 0] == 5
    said = {n: v + 1 for n, v in saying(0).items()} | {"item_type": saying(0)["item_type"]}
    assert not any(v.any() for v in next_items(scene(1, 3., 2.), said, torch.tensor([32]), SLOTS).values())


@pytest.mark.parametrize("facing, side", ((1., 1), (0., -1)))
def test_a_newcomer_is_ahead_of_its_owner(facing, side):
    here = scene(0) | {"x": torch.tensor([[30., -30.]]), "facing": torch.tensor([[0., facing]])}
    born = next_items(here, saying(2, slot=1, player=1, spawn=(14.6, 9.3, 5., 0.)), torch.tensor([32]), SLOTS)
    assert born["item2_type"][0].tolist() == [0, 2] and not born["item1_type"].any()
    assert np.allclose([born[f"item2_{n}"][0, 1] for n in ("x", "y", "speed_x", "speed_y")], [-30 + 14.6*side, 9.3, 5*side, 0], atol=1e-5)


@pytest.mark.parametrize("kind, change, speed", ((1, .2, 7.), (2, .2, 7.), (1, -9., -2.), (21, .2, 7.2)))
def test_lasers_fly_straight_until_they_are_deflected(kind, change, speed):
    new = next_items(scene(kind, 0., 7.), saying(motion=(.1, 0., change, 0.)), torch.tensor([32]), SLOTS)
    assert abs(new["item1_speed_x"][0, 0].item() - speed) < 1e-5
    assert abs(new["item1_x"][0, 0].item() - speed - (0 if speed == 7 else .1)) < 1e-5


def test_what_was_there_has_a_head_start():
    for said, there in ((0., True), (5., True), (7., False)):
        prediction = saying(); prediction["item_type"][..., 0] = said
        assert (next_items(scene(1, 0., 7.), prediction, torch.tensor([32]), SLOTS)["item1_type"][0, 0].item() == 1) == there


def test_roles_name_every_slot():
    roles = field_roles(LAYOUT, CONFIG.model.heads)
    assert [n for n in roles["predicted"] if n.startswith("item")] == [f.name for f in LAYOUT.fields if f.slot]


def test_noise_stays_in_the_game():
    g = torch.Generator().manual_seed(0)
    last = {n: v.expand(50, 2).clone() for n, v in scene(3, 10., 3.).items()}
    said = {n: 4*torch.randn(50, 2, *(SLOTS,)*HEADS[n].items, HEADS[n].width, generator=g) for n in head_names(CONFIG.model.heads)}
    for temperature, generator in ((None, None), (1., torch.Generator().manual_seed(1))):
        made = next_frame(last, said, torch.zeros(50, 2, 13), torch.full((50,), 32), LAYOUT, CONFIG.model.heads, True, None, temperature, generator)
        assert set(made) == {f.name for f in LAYOUT.fields} and all(v.isfinite().all() for v in made.values())
        for slot in range(1, SLOTS + 1):
            empty = made[f"item{slot}_type"] == 0
            assert not any(v[empty].any() for n, v in made.items() if n.startswith(f"item{slot}_")) and (made[f"item{slot}_x"].abs() <= 246).all()


# ---- learning ------------------------------------------------------------------------------------------------------

def windows(game, config=CONFIG):
    layout = layout_of(config.encoding)
    data = from_games([("a", game)], layout)
    starts = window_starts(data, config.model.context_len)
    there = sum(gather(data, starts, config.model.context_len).target.ints[:, 0, :, layout.int_index(f"item{slot}_type")].amax(-1) for slot in range(1, layout.slots + 1)) > 0
    return layout, *(gather(data, rows[:200], config.model.context_len) for rows in (starts[there], starts[~there]))


@pytest.mark.parametrize("name", ("projectiles", "mamba2-projectiles"))
def test_gradients_reach_every_head_of_items(shooters, name):
    config = load_config(name)
    layout, flying, empty = windows(shooters[0], config)
    model = build_model(config)
    for batch, there in ((flying, True), (empty, False)):
        model.zero_grad()
        total, heads = loss(model(batch.frames, batch.controls), batch, config, layout)
        total.backward()
        assert total.isfinite() and all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
        assert model.heads["item_type"].weight.grad.norm() > 0
        for head in ("item_state", "item_spawn", "item_motion"):
            assert (heads[head].item() > 0) == (model.heads[head].weight.grad.norm().item() > 0) == there, head
        assert model.encoder.embeddings["item_type"].weight.grad is not None


def test_the_perfect_prediction_costs_nothing_and_finds_everything(shooters):
    layout, flying, _ = windows(shooters[0])
    perfect = certain(head_targets(last_frames(flying), flying.target, layout, CONFIG.model.heads, True))
    total, heads = loss(perfect, flying, CONFIG, layout)
    assert total < 1e-3 and {n for n in HEADS if HEADS[n].items} <= set(heads)
    measured = summarise(batch_metrics(perfect, flying, CONFIG, layout))
    assert [measured[n] for n in ITEM_NAMES[1:]] == [1, 0, 1, 0] and measured["item_position_mae"] < 1e-3
    blind = perfect | {"item_type": torch.full_like(perfect["item_type"], -10.)}
    blind["item_type"][..., 0] = 10
    measured = summarise(batch_metrics(blind, flying, CONFIG, layout))
    assert measured["item_spawn_recall"] == 0 and measured["item_vanish_recall"] == 1 and measured["item_false_vanishes_per_10000"] > 0 and measured["item_position_mae"] is None


def test_speed_errors_cost_as_errors_of_place():
    "Under the predicted speed the residual is asked to mend what the speed gets wrong."
    last, true = scene(1, 0., 5.), scene(1, 5., 5.)
    at = torch.tensor([32])
    said = torch.zeros(1, 2, SLOTS, 4); said[0, 0, 0, 2] = .1                        # two units a frame too fast
    wanted = head_targets(encode(last, at, LAYOUT), encode(true, at, LAYOUT), LAYOUT, CONFIG.model.heads, True, None, said)["item_motion"]
    assert torch.allclose(wanted[0, 0, 0], torch.tensor([-.1, 0., 0., 0.]), atol=1e-6) and not wanted[0, 1].any()


def test_a_few_steps_teach_a_laser_to_fly(shooters):
    config = load_config("projectiles", ["model.context_len=2", "model.hidden=[64, 64]", "training.float_loss=l1"])
    layout, flying, empty = windows(shooters[0], config)
    torch.manual_seed(0)
    model = build_model(config); optimiser = torch.optim.Adam(model.parameters(), 3e-3)
    before = loss(model(flying.frames, flying.controls), flying, config, layout)[1]
    for _ in range(150):
        optimiser.zero_grad(); loss(model(flying.frames, flying.controls), flying, config, layout)[0].backward(); optimiser.step()
    after = loss(model.eval()(flying.frames, flying.controls), flying, config, layout)[1]
    assert all(after[n] < .5*before[n] for n in ("item_type", "item_spawn"))


# ---- a world, and files --------------------------------------------------------------------------------------------

class Scripted(torch.nn.Module):
    "Fighters stand still. Player 0 fires at frame 3; the laser is gone at frame 9 because the model says so."
    def __init__(self):
        super().__init__()
        self.config, self.layout, self.context_len, self.unused, self.frame = CONFIG, LAYOUT, 1, torch.nn.Parameter(torch.zeros(1)), 0

    def forward(self, frames, controls):
        self.frame += 1
        said = certain(head_targets(frames, frames, self.layout, self.config.model.heads, True))
        said["item_motion"] = torch.zeros_like(said["item_motion"])
        if self.frame == 3:
            said["item_type"][0, 0, 0, 0] = 20.*torch.eye(32)[1]
            said["item_spawn"][0, 0, 0, 0] = torch.tensor([-16., 9., -7., 0.])*BY_NAME["item1_x"].scale   # he faces left
        if self.frame == 9: said["item_type"][..., :] = 20.*torch.eye(32)[0]
        return said


def test_a_laser_is_fired_flies_and_is_gone():
    world = World(Scripted())
    world.reset({n: v[:, None] for n, v in scene(0).items()}, torch.tensor([32]))
    dream = world.run(torch.zeros(1, 12, 2, 13))
    assert dream["item1_type"][0, :, 0].tolist() == [0, 0, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0]
    assert torch.allclose(dream["item1_x"][0, :9, 0], torch.tensor([0., 0, 16, 23, 30, 37, 44, 51, 0]), atol=1e-3)
    assert not dream["item1_type"][0, :, 1].any() and not dream["item2_type"].any()
    assert not any(v[0, -1].any() for n, v in dream.items() if n.startswith("item"))


def test_a_dream_with_items_is_a_replay_with_items(shooters, tmp_path):
    "What a rollout holds is in its .slp, as peppi reads it, and in its JSON; ids, kinds, places and owners."
    class Truth(torch.nn.Module):
        "Says what really comes, so that a rollout has real items."
        def __init__(self, game, first):
            super().__init__()
            self.config, self.layout, self.context_len, self.unused = CONFIG, LAYOUT, 1, torch.nn.Parameter(torch.zeros(1))
            self.frames, self.row = encode_game(game, LAYOUT), first

        def forward(self, frames, controls):
            last, true = (take(self.frames, slice(row, row + 1)).map(lambda t: t[None]) for row in (self.row, self.row + 1))
            self.row += 1
            return certain(head_targets(last, true, LAYOUT, CONFIG.model.heads, True))

    game = shooters[0]
    there = (item_columns(game, SLOTS)["item1_type"] > 0).any(1)
    first = int(np.argmax(np.convolve(there[:-200], np.ones(300), "valid")))
    dream = rollout(Truth(game, first), game, first - 123, 300)
    assert len(dream.items["frame"]) > 60 and len(np.unique(dream.items["id"])) > 2
    write_rollout(dream, tmp_path / "dream.slp"), write_rollout(dream, tmp_path / "dream.json")
    from_slp, from_json = read_slp(tmp_path / "dream.slp"), read_rollout(tmp_path / "dream.json")
    for name, values in dream.items.items():
        assert np.array_equal(from_slp.items[name], values) and np.array_equal(from_json.items[name], values) and from_json.items[name].dtype == values.dtype, name
    assert np.array_equal(from_json.truth_items["x"], dream.truth_items["x"]) and len(dream.truth_items["frame"]) >= len(dream.items["frame"])
    rows = slice(first + 1, first + 301)
    for name, values in item_columns(to_game(dream), SLOTS).items():   # the dreamt items are the true ones, slot by slot
        truth = columns_of(game, LAYOUT)[name][rows]
        begun = np.logical_or.accumulate(item_columns(game, SLOTS)[f"{name.split('_')[0]}_type"][rows] == 0, 0)   # those that flew at the seed may sit elsewhere
        assert np.abs(values - truth)[begun].max() < 1e-2, name
    plain = rollout(build_model(load_config("toy")), game, 100, 5)
    assert plain.items is None and to_game(plain).items is None and plain.truth_items is not None


# ---- evaluation ----------------------------------------------------------------------------------------------------

def test_every_model_is_judged_on_the_same_starts(shooters):
    settings = ["evaluation.max_starts=120", "evaluation.horizon=12", "model.context_len=3", "model.hidden=[16, 16]"]
    games = [(str(i), game) for i, game in enumerate(shooters[:2])]
    torch.manual_seed(0)
    with_items, without = (evaluate(build_model(load_config(name, settings)), games, progress=False) for name in ("projectiles", "exp-1a-state-age-embed"))
    for which in ("all", "calm", "projectile"):
        one, other = with_items["rollout"][which], without["rollout"][which]
        assert one["starts"] == other["starts"] > 0 and other["items"] is None
        assert one["position_mae"]["constant_velocity"] == other["position_mae"]["constant_velocity"]
        items = one["items"]
        assert all(len(items[n][who]) == 12 for n in ("recall", "false_per_10000", "position_mae") for who in ("model", "flying_on"))
        assert items["recall"]["model"] == items["recall"]["flying_on"] and items["recall"]["model"][0] > .9   # a fresh model lets everything fly on
        assert np.allclose(items["position_mae"]["model"], items["position_mae"]["flying_on"], atol=1e-3) and items["false_per_10000"]["model"] == items["false_per_10000"]["flying_on"]
    assert without["rollout"]["projectile"]["starts"] < without["rollout"]["all"]["starts"]
    assert set(ITEM_NAMES) <= set(with_items["teacher_forced"]) and not set(ITEM_NAMES) & set(without["teacher_forced"])


def test_projectile_starts_by_hand(shooters):
    game, starts = max(shooters, key=lambda g: np.isin(g.items["type"], (54, 55)).sum()), np.arange(10, 3000, 7)
    rows = [r for port in game.ports for r in np.flatnonzero(game.items["owner"] == port) if projectile_of(game.items["type"][r], game.items["state"][r])]
    frames = set(game.items["frame"][rows].tolist())
    expected = [any(t + h in frames for h in range(21)) for t in starts.tolist()]
    assert projectile_starts(game, starts, 20).tolist() == expected and 0 < sum(expected) < len(expected)
    assert not projectile_starts(replace(game, items=None), starts).any()


def test_flying_on_is_what_lasers_do(shooters):
    game = shooters[0]
    columns, starts = columns_of(game, LAYOUT), np.arange(300, len(game) - 30)
    flown = flying_on(columns, starts, np.full(len(starts), game.stage), 1)
    kept = (columns["item1_type"][starts] > 0) & (columns["item1_type"][starts + 1] > 0)
    assert np.abs(flown["item1_x"][:, 0] - columns["item1_x"][starts + 1])[kept].mean() < .05


# ---- surfaces ------------------------------------------------------------------------------------------------------

def test_no_ground_id_of_a_legal_stage_is_unknown(replays):
    "On all six stages: nothing is clipped and nothing falls into the class for ids nobody has listed."
    seen = {}
    for _, game in heldout_games():
        seen.setdefault(game.stage, set()).update(np.unique(game["ground"]).tolist())
        assert (surface_of(game.stage, game["ground"]) < 31).all()
        check_encodable(game, LAYOUT)   # and none of the held-out games is refused
    assert set(seen) == set(STAGES) and max(i for i in seen[3] if i < 65535) > 31


def test_the_practice_match_has_no_projectiles_and_none_are_missing():
    layout = LAYOUT
    game = practice_match(1, frames=400)
    assert game.items is None or not item_columns(game, 2)["item1_type"].any()
    assert len(PROJECTILES) == BY_NAME["item1_type"].vocab
