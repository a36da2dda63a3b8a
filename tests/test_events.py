"""Events against what the simulator did, against other columns of real replays, and the matching against its definition; lives and pictures of dreams."""
import copy
import itertools
import json
import time
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from melee_wm import duel
from melee_wm.core import UserError
from melee_wm.checkpoint import SHIPPED
from melee_wm.dreams import before_deaths, draw_before_after, draw_life, draw_survival, draw_violations, first_life, violations_of
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


def lives(*, death=20, stock=20, back=80, act=150, next_death=None, player=1, T=300, attack="AttackAirN") -> dict:
    "A stream, (1, T, 2), in which one fighter dies, loses a stock, comes back and attacks at these rows (None: never)."
    action, stocks, ground = (np.full((1, T, 2), value) for value in (ACTION_OF["Wait"], 4, 1))
    if death is not None: action[0, death:, player] = ACTION_OF["DeadLeft"]
    if stock is not None: stocks[0, stock:, player] = 3
    if back is not None: action[0, back:, player] = ACTION_OF["Rebirth"]; action[0, back + 60:, player] = ACTION_OF["Wait"]
    if act is not None: action[0, act:act + 20, player] = ACTION_OF[attack]; action[0, act + 20:, player] = ACTION_OF["Wait"]
    if next_death is not None: action[0, next_death:, player] = ACTION_OF["DeadDown"]
    return {"action_state": action, "stocks": stocks, "on_ground": ground, "character": np.full((1, T, 2), internal_of(2)), "x": np.zeros((1, T, 2)), "y": np.zeros((1, T, 2))}


WHOLE = {"stream": 0, "player": 1, "death": 20, "stock_lost": 20, "back": 80, "acts": 150, "until": 300}


@pytest.mark.parametrize("changed, found", [
    ({}, WHOLE),
    ({"player": 0}, WHOLE | {"player": 0}),
    ({"stock": 50}, WHOLE | {"stock_lost": 50}),              # a star loses its stock later
    ({"attack": "JumpAerialF"}, WHOLE),
    ({"next_death": 250}, WHOLE | {"until": 250}),
    ({"death": None, "stock": None, "back": None}, None),     # nobody dies
    ({"stock": None}, None),                                  # a death that costs nothing
    ({"stock": 10}, None),                                    # a stock lost before, and none by the death
    ({"back": None, "act": None}, None),                      # nobody returns
    ({"act": None}, None),                                    # back, and does nothing
    ({"attack": "Fall"}, None),                               # neither a jump nor an attack
    ({"next_death": 190}, None),                              # dies again within a second
    ({"next_death": 140, "act": None}, None),
    ({"T": 200}, None)])                                      # the dream ends too soon to know
def test_a_life_after_death(changed, found):
    assert first_life(lives(**changed)) == found


def test_a_life_is_found_in_whichever_stream_has_one():
    three = [lives(act=None), lives(stock=None), lives(player=0, death=30, stock=30, back=90)]
    told = {n: np.concatenate([s[n] for s in three]) for n in three[0]}
    assert first_life(told) == {"stream": 2, "player": 0, "death": 30, "stock_lost": 30, "back": 90, "acts": 150, "until": 300}
    twice = lives(death=10, stock=10, back=12, act=None, next_death=20)   # dies again before it does anything: the second life counts
    twice["stocks"][0, 20:, 1], twice["action_state"][0, 80:140, 1], twice["action_state"][0, 140:, 1] = 2, ACTION_OF["Rebirth"], ACTION_OF["Attack11"]
    assert first_life(twice) == WHOLE | {"acts": 140}
    assert first_life({n: v for n, v in told.items() if n != "stocks"}) is None


def test_practice_fighters_live_again_and_rows_before_deaths_leave_room():
    game = practice_match(11, frames=6000)
    life = first_life({n: v[None] for n, v in game.columns.items()})
    row, player = life["death"], life["player"]
    assert game["action_state"][row, player] <= 10 < game["action_state"][row - 1, player] and game["action_state"][life["back"], player] == ACTION_OF["Rebirth"]
    assert game["stocks"][life["until"] - 1, player] == game["stocks"][row - 1, player] - 1
    deaths = np.argwhere(events_of(game.columns)["death"])[:, 0]
    [(same, rows)] = before_deaths([("practice", game)], 40, 400, 10)
    assert same is game and len(rows) and set(rows + 40) == {d for d in deaths if d - 40 >= 9 and d - 40 + 400 < len(game) - 1}
    assert before_deaths([("practice", game)], 40, 10**6, 10) == []


def test_every_real_match_has_a_life_after_death(replays):
    paths = sorted((replays / "quick").glob("*.slp"))
    if not paths: pytest.skip("no loose replays here")
    for path in paths:
        game = read_slp(path)
        life = first_life({n: v[None] for n, v in game.columns.items()})
        assert life["death"] <= life["stock_lost"] < life["back"] < life["acts"] < life["until"], path.name
        assert life["back"] - life["death"] in (60, 175, 176, 177), (path.name, life)


def marks(ax) -> dict[str, dict[str, float]]:
    "What a chart of violations shows: label -> rule -> value."
    names = [t.get_text().removesuffix(" *") for t in ax.get_yticklabels()]
    return {line.get_label(): dict(zip(names, line.get_xdata())) for line in ax.lines} | {"floor": {n: bar.get_x() + bar.get_width() for n, bar in zip(names, ax.patches)}}


RULES_TOLD = {"no_teleport": {"model": 0., "real": 0., "hard": True}, "free_fall": {"model": 400., "real": .5, "hard": False},
    "new_rule": {"model": 3., "real": None, "hard": False}, "never_asked": {"model": None, "real": 1., "hard": False}}


def test_a_chart_of_violations_shows_what_it_was_given():
    _, ax = plt.subplots()
    later = {"free_fall": {"model": .25, "real": .5, "hard": False}, "shield_range": {"model": 2., "real": 0., "hard": True}}
    draw_violations(ax, {"before": RULES_TOLD, "after": later})
    shown = marks(ax)
    assert list(shown["before"]) == ["no_teleport", "shield_range", "free_fall", "new_rule"], "hard laws first; none that was never asked"
    assert shown["before"]["free_fall"] == 400 and shown["after"]["free_fall"] == .25 and shown["floor"]["free_fall"] == pytest.approx(.5)
    assert np.isnan(shown["after"]["no_teleport"]) and np.isnan(shown["before"]["shield_range"]) and np.isnan(shown["floor"]["new_rule"])
    assert shown["before"]["no_teleport"] == shown["floor"]["no_teleport"] == ax.get_xticks()[0] and ax.get_xticklabels()[0].get_text() == "0" and ax.get_xscale() == "log"
    assert [t.get_color() for t in ax.get_yticklabels()] == ["tab:red"]*2 + ["black"]*2
    plt.close("all")


def test_before_and_after_from_the_shipped_scorecard():
    "Two scorecards, or their dreams, are enough; what was changed is what moves."
    card = json.loads((SHIPPED / "default" / "scorecard.json").read_text())
    changed = copy.deepcopy({"dreams": card["dreams"], "violations_per_1000": card["violations_per_1000"]})
    rule = next(n for n, v in violations_of(card).items() if v["model"])
    violations_of(changed)[rule]["model"] *= .1
    changed["dreams"]["neutral"]["first_break"] = [1]*changed["dreams"]["neutral"]["starts"]
    replay, _, neutral, survival = draw_before_after(card, changed, ("one", "other")).axes
    shown, quiet = marks(replay), marks(neutral)
    assert {n for n in shown["one"] if shown["one"][n] != shown["other"][n]} == {rule} and shown["other"][rule] == pytest.approx(max(shown["one"][rule]/10, 1e-5))
    assert quiet["one"] == quiet["other"] and len(quiet["one"]) > 10
    one, other = (line.get_ydata() for line in survival.lines)
    assert [one[t] for t in (600, 3600)] == pytest.approx([card["dreams"]["neutral"]["survival"][t] for t in ("600", "3600")]) and (other[1:] == 0).all()
    only = draw_before_after(card["dreams"], changed["dreams"])   # without the scorecards' own table only the neutral rates are known
    assert [len(ax.get_yticklabels()) > 10 for ax in only.axes].count(True) == 1 and len(only.axes) == 3
    assert violations_of(card["dreams"]) == violations_of({}) == {} and violations_of(card["dreams"], "neutral") == card["dreams"]["neutral"]["violations_per_1000"]
    assert violations_of({"dreams": {"replay": {}, "neutral": {}}, "violations_per_1000": RULES_TOLD}, "neutral") == {}, "the scorecard's own table is of replayed controllers"
    plt.close("all")


def test_a_life_is_drawn_where_it_happened():
    told = lives()
    told["x"][0, :, 1] = np.arange(300)/10
    fig = draw_life(told, WHOLE, 31, {n: told[n][0] for n in "xy"})
    field, height, place = fig.axes
    assert [line.get_xdata()[0] for line in height.lines[2:]] == [20/60, 20/60, 80/60, 150/60], "death, stock, return, first deed"
    assert {line.get_label(): float(line.get_xdata()[0]) for line in field.lines if " s" in line.get_label()} == {"death, 0.33 s": 2., "stock lost, 0.33 s": 2., "back, 1.33 s": 8., "acts, 2.50 s": 15.}
    assert place.lines[0].get_ydata().tolist() == told["x"][0, :, 1].tolist()
    _, ax = plt.subplots()
    draw_survival(ax, {"some": {"frames": 4, "first_break": [1, 3, 5, 5]}})
    assert ax.lines[0].get_ydata().tolist() == [1, .75, .75, .5, .5]
    plt.close("all")
