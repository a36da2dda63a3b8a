"""Events against what the simulator did, against other columns of real replays, and the matching against its definition."""
import itertools
import time
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from melee_wm import duel
from melee_wm.core import UserError
from melee_wm.events import AIR_JUMP, EVENTS, SHIELD, Tally, add_tallies, before, begins, events_of, match_events, pairs_within, rates
from melee_wm.melee import ACTION_OF, CHARACTERS, internal_of
from melee_wm.practice import controls_at, practice_match, start
from melee_wm.slp import read_slp


@pytest.fixture(scope="module")
def told():
    "A practice match, and what its simulator did in each frame: name -> (frames, 2) bool."
    game = practice_match(11, frames=6000)
    did = {name: np.zeros((len(game), 2), bool) for name in ("hit", "landing", "jump", "respawn", "death", "shield", "l_cancel", "l_cancel_missed", "off ground", "air_jump")}
    row, patch = 0, pytest.MonkeyPatch()

    def listen(function, name, player):
        original = getattr(duel, function)
        def heard(*args):
            if name != "hit" or args[1].action not in duel.SHIELDED: did[name][row, game.ports.index(args[player].port)] = True
            return original(*args)
        patch.setattr(duel, function, heard)

    for function, name, player in (("_hit", "hit", 1), ("_land", "landing", 0), ("_take_off", "jump", 0), ("_return", "respawn", 0)): listen(function, name, player)
    state = start(game.stage, game.characters, game.ports)
    for row in range(1, len(game)):
        last, state = state, duel.step(state, controls_at(game, row))
        for player, (old, new) in enumerate(zip(last.fighters, state.fighters)):
            did["death"][row, player] = new.stocks < old.stocks
            did["shield"][row, player] = new.action in duel.SHIELDED and old.action not in duel.SHIELDED
            did["l_cancel"][row, player], did["l_cancel_missed"][row, player] = new.l_cancel == 1, new.l_cancel == 2
            did["off ground"][row, player] = not new.on_ground
            did["air_jump"][row, player] = new.jumps < old.jumps and not old.on_ground and new.action in (ACTION_OF["JumpAerialF"], ACTION_OF["JumpAerialB"])
    patch.undo()
    return game, did


def test_practice_events_are_what_the_simulator_did(told):
    game, did = told
    found = events_of(game.columns)
    assert set(found) == set(EVENTS) and all(f.shape == (len(game), 2) and f.dtype == bool and not f[0].any() for f in found.values())
    for name in ("hit", "death", "respawn", "shield", "l_cancel", "l_cancel_missed", "air_jump"):
        assert did[name].any() and np.array_equal(found[name], did[name]), name
    struck = found["hit"]   # a jump or landing that a hit undoes in the same frame never shows
    for name, truth in (("ground_jump", did["jump"] & did["off ground"]), ("landing", did["landing"] & ~did["off ground"])):
        assert truth.any() and np.array_equal(found[name] & ~struck, truth & ~struck), name
    assert not found["grab"].any() and not found["ledge_catch"].any()   # the practice game has neither


def test_batches_and_tensors_and_few_columns(told):
    "A batch of rollouts as tensors gives what its streams give alone; what cannot be known is left out."
    game, _ = told
    names = {n for e in EVENTS.values() for n in e.needs}
    starts, frames = (0, 900, 2500), 800
    batch = {n: torch.stack([torch.from_numpy(game[n][t:t + frames].astype(np.float32 if game[n].dtype == bool else game[n].dtype).astype(np.int64 if game[n].dtype.kind == "u" else np.float32)) for t in starts]) for n in names}
    together = events_of(batch)
    for i, t in enumerate(starts):
        alone = events_of({n: game[n][t:t + frames] for n in names})
        assert all(np.array_equal(together[n][i], alone[n]) for n in EVENTS)
        assert all(np.allclose(rates(batch)[n][i], rates({n: game[n][t:t + frames] for n in names})[n]) for n in EVENTS)
    assert set(events_of({n: game[n] for n in ("percent", "character", "action_state")})) == set(EVENTS) - {"ground_jump", "landing", "l_cancel", "l_cancel_missed"}
    assert events_of({"x": game["x"]}) == {}


def made_up(character: str, *rows: tuple[str | int, bool]) -> dict:
    "Columns of a fighter who does this and stands on the ground or not, beside one who waits."
    action = [ACTION_OF[a] if isinstance(a, str) else a for a, _ in rows]
    who = next(i for i, n in CHARACTERS.items() if n == character)
    return {"action_state": np.array([[a, ACTION_OF["Wait"]] for a in action], np.uint16), "character": np.full((len(rows), 2), who, np.uint8),
            "on_ground": np.array([[g, True] for _, g in rows])}


@pytest.mark.parametrize("character, rows, event, frames", [
    ("Fox", [("KneeBend", True), ("JumpF", False), ("AttackAirN", False)], "ground_jump", [1]),
    ("Fox", [("KneeBend", True), ("AttackAirB", False)], "ground_jump", [1]),              # attacks as the feet leave the ground
    ("Fox", [("KneeBend", True), (365, False)], "ground_jump", [1]),
    ("Fox", [("KneeBend", True), ("Fall", False)], "ground_jump", []),                     # over the edge
    ("Fox", [("KneeBend", True), ("JumpAerialF", False)], "ground_jump", []),
    ("Fox", [("KneeBend", True), ("JumpAerialF", False)], "air_jump", [1]),
    ("Fox", [("KneeBend", True), ("DamageFlyN", False)], "ground_jump", []),
    ("Fox", [("KneeBend", True), ("CapturePulledHi", False)], "ground_jump", []),
    ("Fox", [("KneeBend", True), ("LandingFallSpecial", True)], "ground_jump", []),        # a wavedash
    ("Jigglypuff", [(341, False), (341, False), (342, False), ("AttackAirB", False), (343, False)], "air_jump", [2, 4]),
    ("Fox", [("Fall", False), (341, False), (342, False)], "air_jump", []),                # Fox's blaster
    ("Yoshi", [("Wait", True), (341, True), (342, True), (344, True), (343, True)], "shield", [1]),
    ("Fox", [("Wait", True), (341, True)], "shield", []),
    ("Fox", [("GuardOn", True), ("Guard", True), ("GuardSetOff", True), ("Guard", True), ("GuardOff", True), ("GuardReflect", True)], "shield", [5]),
    ("Fox", [("CliffWait", False), ("CliffClimbQuick", True)], "landing", []),
    ("Fox", [("Fall", False), ("CapturePulledLw", True)], "landing", []),
    ("Fox", [("Fall", False), ("Wait", True)], "landing", [1]),
    ("Fox", [("Catch", True), ("CatchPull", True), ("CatchWait", True), ("CatchAttack", True), ("CatchWait", True), ("ThrowF", True)], "grab", [1]),
    ("Fox", [("DamageFlyN", False), ("DeadUpFall", False), ("DeadUpFallHitCamera", False), ("Sleep", False)], "death", [1]),
    ("Fox", [("Sleep", False), ("Rebirth", False), ("RebirthWait", False)], "respawn", [1]),
    ("Fox", [("DamageFall", False), ("PassiveStandF", True)], "tech", [1]),
    ("Fox", [("DamageFall", False), ("DownBoundU", True), ("DownWaitU", True)], "knockdown", [1]),
    ("Fox", [("Fall", False), ("CliffCatch", False), ("CliffWait", False)], "ledge_catch", [1]),
])
def test_rules(character, rows, event, frames):
    found = events_of(made_up(character, *rows))[event]
    assert np.flatnonzero(found[:, 0]).tolist() == frames and not found[:, 1].any()


def test_tables_and_small_rises():
    fox = internal_of(2)
    assert not AIR_JUMP.reshape(len(CHARACTERS), -1)[fox, 341:].any() and not SHIELD.reshape(len(CHARACTERS), -1)[fox, 341:].any()
    percent = np.array([[0, 0], [.4, .5], [.8, .5], [0, 12.5]], np.float32)
    assert events_of({"percent": percent})["hit"].tolist() == [[False, False], [False, True], [False, False], [False, True]]
    assert events_of({"percent": percent[:1]})["hit"].tolist() == [[False, False]]
    high = made_up("Fox", ("Wait", True), (560, True))   # `frame.COLUMNS` allows actions that no table names
    assert not any(f.any() for f in events_of(high).values())


def flags(frames: int, *moments: tuple[int, int]) -> np.ndarray:
    "An array (frames, 2) that is true at (frame, player)."
    result = np.zeros((frames, 2), bool)
    for moment in moments: result[moment] = True
    return result


@pytest.mark.parametrize("true, said, found", [
    ([(50, 0)], [(53, 0)], 1), ([(50, 0)], [(47, 0)], 1), ([(50, 0)], [(54, 0)], 0), ([(50, 0)], [(46, 0)], 0),   # the edges of ±3
    ([(50, 0)], [(50, 1)], 0),                                                     # another player
    ([(50, 0)], [(49, 0), (50, 0), (51, 0)], 1),                                   # said thrice
    ([(49, 0), (50, 0), (51, 0)], [(50, 0)], 1),                                   # said once for three
    ([(50, 0), (52, 0)], [(53, 0), (55, 0)], 2),                                   # the nearest pair is not the best
    ([(99, 0)], [(0, 1)], 0), ([(0, 1)], [(99, 0)], 0),                            # the end of one player is not the start of the other
    ([], [(5, 0)], 0), ([(5, 0)], [], 0), ([], [], 0)])
def test_matching(true, said, found):
    tally = match_events({"hit": flags(100, *true)}, {"hit": flags(100, *said), "death": flags(100)})
    assert tally == {"hit": Tally(len(true), found, len(said), 100)}
    assert tally["hit"].false_per_10000 == pytest.approx(100*(len(said) - found))
    assert np.isnan(tally["hit"].recall) if not true else tally["hit"].recall == found/len(true)


def test_matching_batches_and_sums():
    "Streams of a batch are matched each for itself, and tallies add up to the same."
    rng = np.random.default_rng(3)
    true, said = rng.random((2, 5, 200, 2)) < .05
    one = match_events({"hit": true}, {"hit": said}, 2)
    many = add_tallies(match_events({"hit": t}, {"hit": s}, 2) for t, s in zip(true, said))
    assert one == many and one["hit"].frames == 1000 and 0 < one["hit"].found < one["hit"].true
    end, begin = np.zeros((2, 2, 10, 2), bool)
    end[0, 9, 0] = begin[1, 0, 0] = True
    assert match_events({"hit": end}, {"hit": begin}, 3)["hit"].found == 0
    assert add_tallies([]) == {} and np.isnan(Tally(0, 0, 0, 0).false_per_10000)
    with pytest.raises(UserError, match="different frames"):
        match_events({"hit": true}, {"hit": said[:, 1:]})


moments = st.lists(st.tuples(st.integers(20, 179), st.integers(0, 1)), max_size=40)


@settings(max_examples=150, deadline=None)
@given(moments, st.integers(0, 8), st.integers(-8, 8))
def test_matching_a_thing_to_itself(at, tolerance, shift):
    "Shifted by no more than the tolerance everything is found and nothing invented; isolated events shifted further are all lost."
    true = flags(200, *at)
    tally = match_events({"hit": true}, {"hit": np.roll(true, shift, 0)}, tolerance)["hit"]
    happened = int(true.sum())
    if abs(shift) <= tolerance:
        assert tally == Tally(happened, happened, happened, 200)
    else:
        assert tally.true == tally.said == happened
    alone = flags(200, *((frame // 40*40 + 20, player) for frame, player in at))   # 40 frames apart
    found = match_events({"hit": alone}, {"hit": np.roll(alone, shift, 0)}, tolerance)["hit"].found
    assert found == (alone.sum() if abs(shift) <= tolerance else 0)


@settings(max_examples=200, deadline=None)
@given(st.sets(st.integers(0, 20), max_size=5), st.sets(st.integers(0, 20), max_size=5), st.integers(0, 4))
def test_no_pairing_is_larger(true, said, tolerance):
    "The greedy pairing is as large as the best of all pairings."
    small, large = sorted((sorted(true), sorted(said)), key=len)
    best = max(sum(abs(a - b) <= tolerance for a, b in zip(small, chosen)) for chosen in itertools.permutations(large, len(small)))
    assert pairs_within(sorted(true), sorted(said), tolerance) == best


def test_rates():
    percent = np.zeros((1800, 2))
    percent[600:, 0] += 12
    percent[1200:, 0] += 18
    percent[1500:, 0] = 0   # the damage of a life that ended is not given back
    stocks = np.full((1800, 2), 4, np.uint8)
    stocks[1500:, 0] = 3
    result = rates({"percent": percent, "stocks": stocks})
    assert {n: v.tolist() for n, v in result.items()} == {"hit": [pytest.approx(4), 0], "damage": [pytest.approx(60), 0], "stocks_lost": [pytest.approx(2), 0]}


def test_speed(told):
    "A hundred thousand frames well below a second of CPU time."
    columns = {n: np.concatenate([told[0][n]]*20)[:100_000] for n in {n for e in EVENTS.values() for n in e.needs}}
    def once():
        began = time.process_time()
        found = events_of(columns)
        match_events(found, {n: np.roll(f, 1, 0) for n, f in found.items()})
        return time.process_time() - began
    assert min(once() for _ in range(3)) < .5


def test_real_replays_agree_with_their_other_columns(replays):
    "Deaths are stocks lost, hitstun begins with hits, grabs have captives, aerial landings have an L-cancel or not, air jumps use up a jump."
    paths = sorted((replays / "quick").glob("*.slp"))
    if not paths:
        pytest.skip("no loose replays here")
    for path in paths:
        game = read_slp(path)
        found, jumps = events_of(game.columns), game["jumps_left"].astype(int)
        lost = game["stocks"] < before(game["stocks"])
        assert np.array_equal(found["death"].sum(0), lost.sum(0)) and lost.any(), path.name
        delays = [np.flatnonzero(lost[:, p]) - np.flatnonzero(found["death"][:, p]) for p in (0, 1)]
        assert set(np.concatenate(delays)) <= {0, 94, 131}, path.name
        assert (found["respawn"].sum(0) >= found["death"].sum(0) - 1).all() and (game["percent"][found["respawn"]] == 0).all(), path.name
        stun = begins(game["state_flags_4"] & 0x02 > 0)
        assert stun.sum() > 10 and match_events({"hit": stun}, found, 0)["hit"].recall == 1, path.name
        captured = begins(np.isin(game["action_state"], [ACTION_OF["CapturePulledHi"], ACTION_OF["CapturePulledLw"]]))[:, ::-1]
        assert np.array_equal(captured, found["grab"]) and captured.any(), path.name
        aerial = begins(np.isin(game["action_state"], range(ACTION_OF["LandingAirN"], ACTION_OF["LandingAirLw"] + 1)))
        assert np.array_equal(aerial, found["l_cancel"] | found["l_cancel_missed"]) and aerial.any(), path.name
        assert (jumps < before(jumps))[found["air_jump"] | found["ground_jump"]].all(), path.name
        assert (game["state_flags_3"] & 0x80 > 0)[found["shield"]].all(), path.name
        assert 60 < rates(game.columns)["damage"].mean() < 300
