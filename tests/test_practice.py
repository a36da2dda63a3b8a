"""The synthetic matches: deterministic, true to their own rules, within Melee's ranges, and equal after a round trip through a file."""
import hashlib
import subprocess
import sys
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from melee_wm.core import UserError
from melee_wm.duel import Action, copy_fighter
from melee_wm.frame import COLUMNS, FIRST_FRAME, check
from melee_wm.melee import ACTION_OF, BUTTON_BITS, CATEGORIES, CATEGORY_OF, STAGES, external_of, internal_of, randall_position, surface_of
from melee_wm.practice import Controls, PracticeWorld, columns_of, controls_at, practice_match, replay, start, step, to_game, write_practice
from melee_wm.arena import ATTRIBUTES
from melee_wm.slp import read_slp


@pytest.fixture(scope="module", params=sorted(STAGES))
def match(request):
    return practice_match(100 + request.param, stage=request.param)


def test_matches_are_matches(match):
    "A full match has hits, shields, deaths, comebacks and one winner."
    action, stocks = match["action_state"], match["stocks"].astype(int)
    assert 1500 <= len(match) <= 15000
    assert (stocks[0] == 4).all() and (stocks[-1] == 0).any() and match.info["end_method"] == "Game" and sorted(match.info["placements"]) == [0, 1]
    assert (np.diff(stocks, axis=0) <= 0).all() and (np.diff(stocks, axis=0) >= -1).all()
    assert (np.diff(match["percent"], axis=0) > 0).sum() > 20
    for name in ("Guard", "GuardSetOff", "Dash", "KneeBend", "JumpAerialF", "Rebirth", "RebirthWait", "DamageFlyN", "AttackS4S", "Entry"):
        assert (action == ACTION_OF[name]).any(), name
    assert action[0].tolist() == [Action.Entry] * 2 and match.frame_numbers[0] == FIRST_FRAME
    assert match.info["synthetic"] == "practice match"


def test_values_are_melees(match):
    "Every column of 3.13, each within its range and of its type; ground ids are the stage's own."
    check(match)
    assert {name: column.dtype for name, column in COLUMNS.items() if column.since <= (3, 13)} == {name: str(v.dtype) for name, v in match.columns.items()}
    assert all(v.shape == (len(match), 2) for v in match.columns.values())
    assert set(np.unique(match["ground"])) <= {*STAGES[match.stage].surfaces, 65535}
    assert surface_of(match.stage, match["ground"]).max() < 31
    assert match["hitlag"].max() <= 16 and match["jumps_left"].max() <= 2 and match["action_state"].max() < 341
    left, right, _, bottom = STAGES[match.stage].blast_zone
    alive = match["action_state"] > 3
    assert (match["x"][alive] >= left).all() and (match["x"][alive] <= right).all() and (match["y"][alive] >= bottom).all()
    for name, grid in (("main_x", 80), ("main_y", 80), ("c_x", 80), ("c_y", 80), ("shoulder", 140)):
        steps = match[name].astype(float) * grid
        assert np.abs(steps - np.rint(steps)).max() < 1e-4, name
    assert set(np.unique(match["buttons"] & 0xFFFF)) == set(np.unique(match["buttons_physical"]))


def test_motion_is_speed_plus_knockback(match):
    "Out of hitlag, positions change by own speed plus knockback; on the ground the height is the surface's."
    action, ground = match["action_state"][1:], match["on_ground"][1:]
    free = (match["hitlag"][1:] == 0) & (action > 3) & ~((action == Action.Rebirth) & (match["action_state"][:-1] != Action.Rebirth))
    own = np.where(ground, match["speed_ground_x"][1:], match["speed_air_x"][1:])
    dx, dy = np.diff(match["x"].astype(float), axis=0), np.diff(match["y"].astype(float), axis=0)
    assert np.abs(dx - own - match["knockback_x"][1:])[free].max() < 1e-4
    assert np.abs(dy - match["speed_y"][1:] - match["knockback_y"][1:])[free & ~ground & (action != Action.RebirthWait)].max() < 1e-4


def test_replay_and_file(match, tmp_path):
    "The recorded controls make the match again, also after a way through a .slp file."
    from melee_wm.slp import write_slp
    back = read_slp(write_slp(match, tmp_path / "match.slp", provenance="synthetic practice match"))
    assert back.info["synthetic"] == "synthetic practice match" and back.stage == match.stage and back.characters == match.characters
    again = to_game(replay(back), [controls_at(back, row) for row in range(len(back))], match.info["random_seed"])
    for name in match.columns:
        assert np.array_equal(match[name], back[name]), name
        assert np.array_equal(match[name], again[name]), name


def test_same_seed_same_bytes(tmp_path):
    "Another process, with another hash seed, writes the same bytes; other seeds write others."
    code = "import sys; from melee_wm.practice import write_practice; write_practice(sys.argv[1], games=2, seed=5, frames=1600)"
    digests = []
    for i in ("1", "2"):
        subprocess.run([sys.executable, "-c", code, str(tmp_path / i)], check=True, env={**__import__("os").environ, "PYTHONHASHSEED": i})
        digests.append([hashlib.md5(p.read_bytes()).hexdigest() for p in sorted((tmp_path / i).iterdir())])
    assert digests[0] == digests[1] and len(set(digests[0])) == 2
    other = write_practice(tmp_path / "3", games=1, seed=6, frames=1600)[0]
    assert hashlib.md5(other.read_bytes()).hexdigest() not in digests[0]


def test_arguments():
    game = practice_match(1, frames=1600, stage=31, characters=(2, 9))
    assert (len(game), game.stage, game.characters, game.info["end_method"]) == (1600, 31, (2, 9), "Time")
    assert (game["character"] == [internal_of(2), internal_of(9)]).all()
    for bad in (dict(stage=4), dict(characters=(2, 15)), dict(characters=(2, 99))):
        with pytest.raises(UserError):
            practice_match(1, **bad)


sticks = st.integers(-80, 80)
controllers = st.builds(Controls, sticks, sticks, sticks, sticks, st.integers(0, 140), st.sampled_from([0, *BUTTON_BITS.values(), 0xFFF, BUTTON_BITS["a"] | BUTTON_BITS["x"]]))


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_controls(data):
    "Whatever the controllers say: a step leaves its input alone, is repeatable, and stays within the rules."
    stage = data.draw(st.sampled_from(sorted(STAGES)))
    characters = tuple(data.draw(st.sampled_from([external_of(i) for i in ATTRIBUTES])) for _ in (0, 1))
    state = start(stage, characters, data.draw(st.sampled_from([(0, 1), (1, 3), (0, 2)])))
    for _ in range(90):
        state = step(state, (Controls(), Controls()))
    states, inputs = [state], []
    for pair in data.draw(st.lists(st.tuples(controllers, controllers, st.integers(1, 25)), min_size=3, max_size=30)):
        for _ in range(pair[2]):
            before = [copy_fighter(f) for f in states[-1].fighters]
            states.append(step(states[-1], pair[:2]))
            inputs.append(pair[:2])
            assert list(states[-2].fighters) == before
    assert step(states[-2], inputs[-1]) == states[-1]
    game = check(to_game(states, [(Controls(),) * 2, *inputs]))
    assert (game["shield"] >= 0).all() and (np.diff(game["stocks"].astype(int), axis=0) <= 0).all() and np.isfinite(game["x"]).all()
    assert (game["state_age"] >= -1).all() and (game["hurtbox_state"] <= 2).all()


def test_world_is_the_rules(match):
    "Driven by 13 numbers per controller, the world plays the recorded match."
    world = PracticeWorld(match.stage, match.characters)
    sticks = np.stack([match[n] for n in ("main_x", "main_y", "c_x", "c_y", "shoulder")], -1)
    buttons = np.stack([(match["buttons"] & bit) > 0 for bit in BUTTON_BITS.values()], -1)
    controls = np.concatenate([sticks, buttons], -1)   # (T, 2, 13)
    kept = None
    for row in range(1, 900):
        frame = world.step(controls[row])
        assert all(np.array_equal(frame[name], match[name][row]) for name in ("x", "y", "action_state", "percent", "state_age")), row
        if row == 500:
            kept, x = world.state, match["x"][500]
    assert np.array_equal(world.reset(kept)["x"], x)


def test_shield_counterfactual():
    "In a state where an attack is about to land, holding the shield saves the percent and costs shield."
    state = start(32, (2, 2))
    for _ in range(100):
        state = step(state, (Controls(), Controls()))
    for f, x in zip(state.fighters, (-8.0, 8.0)):
        f.x = x
    smash, shield = [Controls(c_x=80)] + [Controls()] * 25, Controls(shoulder=140, buttons=BUTTON_BITS["r"])
    ends = []
    for answer in (Controls(), shield):
        s = state
        for c in smash:
            s = step(s, (c, answer))
        ends.append(s.fighters[1])
    assert ends[0].percent > 0 and ends[0].shield == 60 and not ends[0].on_ground
    assert ends[1].percent == 0 and ends[1].shield < 50 and ends[1].on_ground


def test_columns_of_a_state_are_the_rows_of_a_game():
    game = practice_match(3, frames=700)
    row = columns_of(replay(game, 651)[-1])
    assert all(np.array_equal(values, game[name][650]) for name, values in row.items())


def test_tables_against_real_replays(replays):
    "Spawn points, respawn points, ground ids and blast zones are those of the real game."
    paths = sorted((replays / "quick").glob("*.slp"))
    if not paths:
        pytest.skip("no loose replays here")
    for path in paths:
        game = read_slp(path)
        if game.stage not in STAGES:
            continue
        s = STAGES[game.stage]
        spawn = np.stack([game["x"][0], game["y"][0]], -1)
        assert all(min(np.hypot(*(np.array(point) - place)) for point in s.spawns) < 6 for place in spawn), path.name
        assert np.mean(surface_of(game.stage, game["ground"]) == 31) < 1e-3, path.name
        action = game["action_state"]
        assert set(CATEGORY_OF[action.ravel()]) <= set(range(len(CATEGORIES)))
        left, right, _, bottom = s.blast_zone
        playing = action > 10
        assert np.mean((game["x"] < left - 3)[playing] | (game["x"] > right + 3)[playing] | (game["y"] < bottom - 5)[playing]) < 1e-3, path.name
        waits = (action[1:] == 13) & (action[:-1] == 12)
        for frame, player in np.argwhere(waits):
            place = np.array([game["x"][frame + 1, player], game["y"][frame + 1, player]])
            assert np.hypot(*(place - s.respawns[game.ports[player]])) < 17, (path.name, place)   # moved aside when both return at once


def test_randall_turns():
    x, y = randall_position(np.arange(-123, 5000))
    assert x.dtype == np.float32 and np.array_equal(x[:1200], x[1200:2400]) and abs(x).max() < 110 and -34 < y.min() < y.max() < -13
