"""The encoding and the batches: every switch, every field, every refusal; on made-up, synthetic and real games."""
import itertools
import zipfile
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from melee_wm import fields
from melee_wm.config import EncodingConfig, load_config
from melee_wm.core import UserError
from melee_wm.encoding import (EncodingRefused, check_encodable, columns_of, controls_of, decode, dims, encode, encode_game,
                               layout_of, next_controls, preflight, source_columns, take)
from melee_wm.fields import BUTTONS, BY_NAME, CONTROLS, FIELDS, LEVELS, Field, fields_of
from melee_wm.frame import COLUMNS, Game
from melee_wm.melee import STAGES, ground_of, surface_of
from melee_wm.slp import ReplayError, read_slp

from made_up import made_up_game, without


def every_encoding():
    "All combinations of the switches that make sense."
    for level, conditioned, embed, press, look in itertools.product(LEVELS, *[(False, True)]*3, (0, 1)):
        try:
            yield EncodingConfig(fields=level, input_conditioned=conditioned, state_age_as_embed=embed, press_events=press, lookahead=look)
        except ValueError:
            continue


ENCODINGS = list(every_encoding())
FULL = EncodingConfig()


def assert_round_trip(game: Game, layout):
    before, after = columns_of(game, layout), decode(encode_game(game, layout), layout)
    assert list(before) == list(after) == [f.name for f in layout.fields]
    for f in layout.fields:
        seen, truth = after[f.name].numpy(), before[f.name]
        assert seen.dtype == truth.dtype == (np.int64 if f.kind == "category" else np.float32)
        if f.name == "state_age" and layout.encoding.state_age_as_embed:
            np.testing.assert_array_equal(seen, np.clip(np.floor(truth), 0, f.vocab - 1))
        elif f.kind == "float":   # two roundings of a float32
            np.testing.assert_allclose(seen, truth, rtol=2**-22, atol=0, err_msg=f.name)
        else:
            np.testing.assert_array_equal(seen, truth, err_msg=f.name)
    if "ground" in before:   # a surface is as good as the id, but for the Stadium's shared classes
        np.testing.assert_array_equal(surface_of(game.stage, ground_of(game.stage, after["ground"].numpy())), before["ground"])
        if game.stage != 3 and game.stage in STAGES and (before["ground"] < 31).all():
            np.testing.assert_array_equal(ground_of(game.stage, after["ground"].numpy()), game["ground"])


# ---- numbers -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, per_player, frame, width, control_dim", [
    ("v1", 56, 112, 1120, 0), ("v2", 72, 148, 1480, 0), ("v2.1", 89, 182, 1820, 0), ("baseline-v22", 89, 182, 1846, 26),
    ("exp-1a-state-age-embed", 96, 196, 1986, 26), ("exp-2a-press-events", 89, 182, 1862, 42), ("exp-3a-lookahead", 89, 182, 1872, 52),
    ("exp-1a2a-combined", 96, 196, 2002, 42), ("exp-3a-1a-lookahead", 96, 196, 2012, 52), ("exp-3a-1a2a-lookahead", 96, 196, 2028, 68)])
def test_the_teams_numbers(name, per_player, frame, width, control_dim):
    got = dims(load_config(name))
    assert [got[k] for k in ("per_player", "frame", "input", "control_dim")] == [per_player, frame, width, control_dim]


def test_state_age_as_embed_moves_one_field():
    plain, embedded = dims(load_config("baseline-v22")), dims(load_config("exp-1a-state-age-embed"))
    assert [(d["floats_per_player"], d["ints_per_frame"], d["embed_dim"]) for d in (plain, embedded)] == [(29, 15, 60), (28, 17, 68)]


@pytest.mark.parametrize("encoding", ENCODINGS, ids=str)
def test_layout_places_every_field_once(encoding):
    layout = layout_of(encoding)
    assert sorted(layout.float_fields + layout.int_fields) == sorted(f.name for f in fields_of(encoding.fields))
    assert layout.float_fields[layout.control_slice] == CONTROLS
    assert all(layout.float_fields[layout.float_index(n)] == n for n in layout.float_fields)
    assert layout_of(EncodingConfig(**encoding.model_dump())) is layout and hash(layout) == hash(layout_of(encoding))


def test_a_field_added_to_the_table_appears_everywhere(monkeypatch):
    "Nothing but `fields.FIELDS` may know what a frame holds."
    before = layout_of(FULL)
    extra = Field("hitstun", "float", "v1", 0.02, 0, 0, None, "carried")
    monkeypatch.setattr(fields, "FIELDS", (FIELDS[0], extra, *FIELDS[1:]))
    monkeypatch.setitem(BY_NAME, "hitstun", extra)
    layout_of.cache_clear()
    try:
        layout, game = layout_of(FULL), made_up_game(0)
        assert (layout.per_player, layout.frame) == (before.per_player + 1, before.frame + 2)
        assert "hitstun" in source_columns(layout)
        assert_round_trip(game, layout)
    finally:
        layout_of.cache_clear()


# ---- round trip ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("encoding", [e for e in ENCODINGS if not (e.press_events or e.lookahead)], ids=str)
def test_round_trip_made_up(encoding):
    for seed in range(5):
        assert_round_trip(made_up_game(seed), layout_of(encoding))


@pytest.mark.parametrize("embed", [False, True])
def test_round_trip_practice(practice_slp, embed):
    assert_round_trip(read_slp(practice_slp), layout_of(EncodingConfig(state_age_as_embed=embed)))


@pytest.mark.parametrize("embed", [False, True])
def test_round_trip_real(replays, embed):
    for path in sorted((replays/"quick").glob("*.slp")):
        assert_round_trip(read_slp(path), layout_of(EncodingConfig(state_age_as_embed=embed)))


@given(st.floats(width=32, allow_nan=False, allow_infinity=False, min_value=-1000, max_value=100_000))
@settings(max_examples=200, deadline=None)
def test_embedded_age_is_the_floor_clipped(age):
    layout = layout_of(EncodingConfig(state_age_as_embed=True))
    columns = {f.name: torch.zeros(1, 2) for f in layout.fields} | {"state_age": torch.full((1, 2), age)}
    ids = encode(columns, torch.tensor([31]), layout).ints[..., layout.int_index("state_age")]
    assert (ids == min(max(int(np.floor(age)), 0), 149)).all()


def test_leading_dimensions_do_not_matter():
    layout, game = layout_of(FULL), made_up_game(3, frames=24)
    flat = encode_game(game, layout)
    folded = flat.map(lambda t: t.unflatten(0, (2, 3, 4)))
    for name, values in decode(folded, layout).items():
        assert values.shape == (2, 3, 4, 2)
        assert torch.equal(values.flatten(0, 2), decode(flat, layout)[name])
    again = encode(decode(folded, layout), folded.stage, layout)
    assert torch.equal(again.ints, folded.ints) and torch.allclose(again.floats, folded.floats, rtol=1e-6, atol=0)
    assert take(folded, (1, 2, 3)).stage.shape == ()


def test_encode_carries_gradients_also_after_inference_mode():
    "The scales are kept between calls; kept from inference mode they could not be saved for the backward pass."
    import melee_wm.encoding as encoding
    encoding._scales.cache_clear()
    layout = layout_of(FULL)
    with torch.inference_mode():
        frames = encode_game(made_up_game(0), layout)
        decode(frames, layout)
    columns = {n: torch.tensor(v) for n, v in columns_of(made_up_game(0), layout).items()}
    columns["x"].requires_grad_()
    encode(columns, torch.full((40,), 31), layout).floats.sum().backward()
    assert torch.allclose(columns["x"].grad, torch.tensor(BY_NAME["x"].scale))


# ---- refusals ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("level", LEVELS)
def test_a_missing_column_is_refused_exactly_where_it_is_read(level):
    layout, game = layout_of(EncodingConfig(fields=level)), made_up_game(0)
    for name in COLUMNS:
        lacking = without(game, name)
        if name not in source_columns(layout):
            encode_game(lacking, layout)
            continue
        with pytest.raises(EncodingRefused) as refusal:
            encode_game(lacking, layout)
        assert refusal.value.reason == f"missing column {name}"
        assert "expected Slippi {}.{} or newer, got version 1.2.3".format(*COLUMNS[name].since) in str(refusal.value)


def test_several_missing_columns_are_all_named():
    with pytest.raises(EncodingRefused) as refusal:
        check_encodable(without(made_up_game(0), "hitlag", "speed_y"), layout_of(FULL))
    assert refusal.value.reason == "missing columns speed_y, hitlag" and "Slippi 3.8" in str(refusal.value)


@pytest.mark.parametrize("name", [f.name for f in FIELDS if f.kind == "category" and f.name != "ground"])
def test_outside_a_vocabulary(name):
    game = made_up_game(0)
    values = game[name].copy()
    values[7, 1] = BY_NAME[name].vocab
    with pytest.raises(EncodingRefused, match=rf"frame -116, player 1.*expected 0 to {BY_NAME[name].vocab - 1}, got {BY_NAME[name].vocab}") as refusal:
        encode_game(replace(game, columns={**game.columns, name: values}), layout_of(FULL))
    assert refusal.value.reason in (f"{name} out of vocabulary", f"{name} out of range")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 3.8e22])
@pytest.mark.parametrize("name", [n for n in source_columns(layout_of(FULL)) if COLUMNS[n].dtype == "float32"])
def test_floats_that_cannot_be(name, value):
    game = made_up_game(0)
    values = game[name].copy()
    values[0, 0] = value
    with pytest.raises(EncodingRefused) as refusal:
        encode_game(replace(game, columns={**game.columns, name: values}), layout_of(FULL))
    assert refusal.value.reason == f"{name} out of range"


def test_a_stage_outside_the_vocabulary():
    with pytest.raises(EncodingRefused, match="stage out of vocabulary"):
        encode_game(replace(made_up_game(0), stage=285), layout_of(FULL))


def test_unknown_ground_ids_have_a_class():
    game = made_up_game(0)
    odd = replace(game, columns={**game.columns, "ground": np.full_like(game["ground"], 4321)})
    assert (decode(encode_game(odd, layout_of(FULL)), layout_of(FULL))["ground"] == 31).all()


def test_old_replays_are_refused_by_reason(replays, tmp_path):
    "Real files of all ages: each is unreadable, refused for a named reason, or comes back whole."
    with zipfile.ZipFile(replays/"versions.zip") as archive:
        names = [n for n in archive.namelist() if n.endswith(".slp")]
        archive.extractall(tmp_path, names)
    outcome = Counter()
    for path in sorted(tmp_path.rglob("*.slp")):
        try:
            game = read_slp(path)
        except ReplayError as error:
            outcome[f"not read: {error.reason}"] += 1
            continue
        for encoding in (FULL, EncodingConfig(fields="v1")):
            layout = layout_of(encoding)
            try:
                check_encodable(game, layout)
            except EncodingRefused as error:
                outcome[f"{encoding.fields} refused: {error.reason.split()[0]}"] += 1
                if error.reason.startswith("missing"):
                    assert game.version[:2] < max(COLUMNS[c].since for c in source_columns(layout))
            else:
                assert_round_trip(game, layout)
                outcome[f"{encoding.fields} accepted"] += 1
    assert outcome["v2.1 refused: missing"] and outcome["v1 accepted"] >= outcome["v2.1 accepted"], outcome


# ---- controls ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("encoding", ENCODINGS, ids=str)
def test_next_controls_against_a_loop(encoding):
    layout, look, T = layout_of(encoding), encoding.lookahead, 6
    generator = torch.Generator().manual_seed(0)
    controls = (torch.rand(3, T + look, 2, 13, generator=generator) > .5).float()
    previous = (torch.rand(3, 2, 13, generator=generator) > .5).float()
    got = next_controls(controls, layout, previous)
    assert got.shape == (3, T, layout.control_dim)
    if not encoding.input_conditioned:
        return
    for b, t in itertools.product(range(3), range(T)):
        expected = controls[b, t].flatten().tolist()
        if look:
            expected += controls[b, t + 1].flatten().tolist()
        if encoding.press_events:
            before = controls[b, t - 1] if t else previous[b]
            expected += [float(controls[b, t, p, CONTROLS.index(n)] > before[p, CONTROLS.index(n)]) for p in (0, 1) for n in BUTTONS]
        assert got[b, t].tolist() == expected


def test_press_events_need_the_frame_before():
    with pytest.raises(UserError, match="press_events"):
        next_controls(torch.zeros(3, 2, 13), layout_of(EncodingConfig(press_events=True)))


# ---- preflight -----------------------------------------------------------------------------------------------------

def test_preflight():
    layout, other = layout_of(FULL), layout_of(EncodingConfig(state_age_as_embed=True))
    frames, controls = take(encode_game(made_up_game(0), layout), slice(10)), torch.zeros(1, 26)
    preflight(frames, controls, layout, 10)
    with pytest.raises(UserError, match=r"expected floats \(..., 10, 2, 28\).*got floats \(..., 10, 2, 29\).*state_age_as_embed: True"):
        preflight(frames, controls, other, 10)
    with pytest.raises(UserError, match=r"expected floats \(..., 60, 2, 29\)"):
        preflight(frames, controls, layout, 60)
    with pytest.raises(UserError, match=r"controls \(..., 42\)"):
        preflight(frames, controls, layout_of(EncodingConfig(press_events=True)), 10)
    with pytest.raises(UserError, match="NaN"):
        preflight(frames._replace(floats=frames.floats*float("nan")), controls, layout, 10)
    with pytest.raises(UserError, match="action_state"):
        preflight(frames._replace(ints=frames.ints + 400), controls, layout, 10)
