"The ego-centric network and the game's symmetries, on real replays where there are any."
import melee_wm.core
import numpy as np
import pytest
import torch
from melee_wm.config import load_config
from melee_wm.core import UserError
from melee_wm.ego import EgoMLP, surroundings
from melee_wm.encoding import Frames, columns_of, controls_of, decode, encode_game, layout_of, take
from melee_wm.heads import random_frames
from melee_wm.mamba2 import build_model
from melee_wm.melee import STAGES
from melee_wm.nextframe import certain, head_targets, next_frame
from melee_wm.practice import practice_match
from melee_wm.rules import footing, no_clock
from melee_wm.symmetry import mirror, mirror_controls, mirror_prediction, swap_players, symmetric
from melee_wm.world import World, replayed_controls, seed_windows

CONFIG = load_config("ego", ["model.width=64", "model.moments=512"])
LAYOUT = layout_of(CONFIG.encoding)


@pytest.fixture(scope="module")
def matches(quick_games):
    return [game for game in quick_games if game.stage in STAGES] or [practice_match(3)]


@pytest.fixture(scope="module")
def quick_games():
    from melee_wm.core import quick_replays
    from melee_wm.slp import read_slp
    return [read_slp(path) for path in quick_replays()]


def shaken():
    "A model whose heads of numbers do not say zero."
    torch.manual_seed(1)
    model = EgoMLP(CONFIG).eval()
    for head in model.heads.values(): torch.nn.init.normal_(head.weight, std=.1)
    return model


def windows(game, count=60):
    frames, K = encode_game(game, LAYOUT), CONFIG.model.context_len
    rows = torch.linspace(K, len(game) - 2, count).long()
    return Frames(*(torch.stack([t[r - K + 1:r + 1] for r in rows]) for t in frames)), torch.stack([controls_of(frames, LAYOUT)[r + 1] for r in rows])[:, None], rows


def test_mirror_is_its_own_inverse_and_keeps_the_rest(matches):
    for game in matches:
        frames = encode_game(game, LAYOUT)
        everywhere = torch.ones(len(game), dtype=torch.bool)
        image = mirror(frames, LAYOUT, everywhere)
        for a, b in zip(mirror(image, LAYOUT, everywhere), frames): assert torch.equal(a, b)
        before, after = decode(frames, LAYOUT), decode(image, LAYOUT)
        assert torch.equal(after["x"], -before["x"]) and torch.equal(after["facing"], 1 - before["facing"])
        for name in ("y", "percent", "button_x", "state_age", "jumps_left"): assert torch.equal(after[name], before[name])


def test_mirrored_targets_are_targets_of_mirrored_frames(matches):
    for game in matches:
        frames = encode_game(game, LAYOUT)
        last, new = take(frames, slice(None, -1)), take(frames, slice(1, None))
        where = torch.ones(len(last.stage), dtype=torch.bool)
        straight = certain(head_targets(last, new, LAYOUT, CONFIG.model.heads, True))
        mirrored = certain(head_targets(mirror(last, LAYOUT, where), mirror(new, LAYOUT, where), LAYOUT, CONFIG.model.heads, True))
        back = mirror_prediction(straight, where[:, None].expand(-1, 2), last.stage)
        for name in mirrored: torch.testing.assert_close(mirrored[name], back[name], atol=1e-5, rtol=0, msg=name)


def test_the_next_frame_of_a_mirrored_match_is_the_mirrored_next_frame(matches):
    "Rules and all, on a symmetric stage."
    for game in (g for g in matches if symmetric(g.stage)):
        frames = encode_game(game, LAYOUT)
        last, new = take(frames, slice(None, -1)), take(frames, slice(1, None))
        where = torch.ones(len(last.stage), dtype=torch.bool)
        def composed(last, new):
            columns = decode(last, LAYOUT)
            said = certain(head_targets(last, new, LAYOUT, CONFIG.model.heads, True))
            return next_frame(columns, said, controls_of(new, LAYOUT), last.stage, LAYOUT, CONFIG.model.heads, True, no_clock(columns))
        straight, mirrored = composed(last, new), composed(mirror(last, LAYOUT, where), mirror(new, LAYOUT, where))
        alive = ((last.ints[..., LAYOUT.int_index("action_state")] > 12) & (new.ints[..., LAYOUT.int_index("action_state")] > 12)).all(-1)   # where one returns depends on the port, not on the side
        for name, sign in (("x", -1), ("y", 1), ("speed_air_x", -1), ("percent", 1), ("hitstun", 1), ("action_frames", 1)):
            torch.testing.assert_close(mirrored[name][alive], sign*straight[name][alive], atol=2e-4, rtol=0, msg=name)


def test_players_exchanged_answers_exchanged(matches):
    model = shaken()
    for game in matches:
        frames, coming, _ = windows(game)
        with torch.inference_mode(): said, exchanged = model(frames, coming.flatten(2)), model(swap_players(frames), coming.flip(2).flatten(2))
        for name in said: torch.testing.assert_close(exchanged[name].flip(2), said[name], atol=1e-4, rtol=1e-4, msg=name)


def test_the_other_heads_hear_the_chosen_action():
    model, frames, controls = shaken(), random_frames(LAYOUT, 3, CONFIG.model.context_len), torch.zeros(3, 1, LAYOUT.control_dim)
    frames = frames._replace(floats=frames.floats.clamp(0, 1))
    with torch.inference_mode():
        own = model(frames, controls)
        told = {a: model(frames, controls, lambda logits: torch.full(logits.shape[:-1], a)) for a in (14, 24)}
        again = model(frames, controls, lambda logits: logits.argmax(-1))
    for name in own: assert torch.equal(own[name], again[name])
    assert torch.equal(told[14]["action"], told[24]["action"]), "the choice is made from the logits, not the other way round"
    assert not torch.allclose(told[14]["velocity"], told[24]["velocity"])


@pytest.mark.parametrize("sample", [None, 1.])
def test_rolls_out_like_any_other_model(sample):
    game, model = practice_match(2), shaken()
    world = World(model, sample=sample, generator=torch.Generator().manual_seed(0) if sample else None)
    columns, starts = columns_of(game, LAYOUT), np.array([300, 400])
    world.reset(seed_windows(columns, starts, 20), torch.full((2,), game.stage))
    frames = world.run(replayed_controls(columns, starts, 60))
    assert set(frames) == {f.name for f in LAYOUT.fields} and all(v.isfinite().all() for v in frames.values())
    same = frames["action_state"][:, 1:] == frames["action_state"][:, :-1]
    counted = frames["action_frames"]
    assert torch.equal(counted[:, 1:][same], (counted[:, :-1][same] + 1).clamp(max=255)) and (counted[:, 1:][~same] == 1).all()


def test_surroundings_name_the_surface_one_stands_on(matches):
    for game in matches:
        segments = STAGES[game.stage].segments
        grounded = game["on_ground"].astype(bool) & (game["action_state"] > 13) & (np.abs(game["y"]) < .001) & (np.abs(game["x"]) < 30)
        x, y = (torch.from_numpy(game[n][grounded].astype(np.float32)) for n in ("x", "y"))
        if not len(x): continue
        floor = next(i for i, s in enumerate(segments) if s[0] < -30 and s[2] > 30)
        for mirrored in (False, True):
            place = floor if not mirrored else sorted((-s[2], s[3], -s[0], s[1]) for s in segments).index(tuple(v for v in (-segments[floor][2], segments[floor][3], -segments[floor][0], segments[floor][1])))
            near = surroundings(-x if mirrored else x, y, torch.full((len(x),), game.stage), torch.full((len(x),), mirrored))
            assert near[:, place].abs().max() < 1e-3


def test_true_frames_keep_their_footing(matches):
    "The rule moves nobody who stands where the game has put them, on stages at rest."
    for game in matches:
        if game.stage not in (8, 28, 31, 32): continue
        frames = decode(encode_game(game, LAYOUT), LAYOUT)
        last, new = ({n: v[rows] for n, v in frames.items()} for rows in (slice(None, -1), slice(1, None)))
        x, y = footing(last, new, torch.full((len(new["y"]),), game.stage))
        assert ((y - new["y"]).abs() > .02).float().mean() < 2e-3
        assert ((x - new["x"]).abs() > .1).float().mean() < 1e-4


def test_two_hot_is_refused():
    with pytest.raises(UserError, match="two_hot"): load_config("ego", ["model.two_hot=[x]"])


def test_is_built_by_name_and_counted():
    assert isinstance(build_model(CONFIG), EgoMLP) and build_model(CONFIG).heads.keys() == {"continuous", "binary", "action", "jumps", "velocity", "dynamics", "l_cancel", "hurtbox", "ground", "last_attack", "timers", "flags"}


def test_augmentation_costs_a_symmetric_model_nothing(matches):
    "To a model that is symmetric by construction all versions of a batch are the same; to the team's joint model they are not."
    from melee_wm.batches import from_games, gather
    from melee_wm.losses import loss
    from melee_wm.symmetry import augment, seen_otherwise
    game = next((g for g in matches if symmetric(g.stage)), practice_match(3))
    for config, same in ((CONFIG, True), (load_config("baseline-v22"), False)):
        layout = layout_of(config.encoding)
        torch.manual_seed(0)
        model = (shaken() if same else build_model(config)).eval()
        batch = gather(from_games([("a", game)], layout), torch.arange(200, 1000, 10), config.model.context_len)
        ones = torch.ones(len(batch.controls), dtype=torch.bool)
        with torch.inference_mode():
            totals = [loss(model(b.frames, b.controls), b, config, layout)[0].item() for b in (batch, seen_otherwise(batch, layout, ones, ~ones), seen_otherwise(batch, layout, ~ones, ones))]
            mixed = augment(batch, layout, torch.Generator().manual_seed(0))
        assert (max(totals) - min(totals) < 1e-3*totals[0]) == same, totals
        assert not torch.equal(mixed.frames.floats, batch.frames.floats)


def test_symmetries_are_refused_with_sequences():
    with pytest.raises(UserError, match="symmetries"): load_config("mamba2-sequences", ["training.symmetries=true"])
