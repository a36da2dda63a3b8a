"""Packed games, batches, shards and streams: nothing lost, nothing twice, the same bits from memory and from files."""
import json
import os
import signal
import subprocess
import sys
import textwrap
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from melee_wm import batches as B
from melee_wm import shards as S
from melee_wm import streaming
from melee_wm.config import EncodingConfig, load_config
from melee_wm.core import UserError
from melee_wm.encoding import EncodingRefused, controls_of, encode_game, layout_of, next_controls, preflight
from melee_wm.packed import pack_game, packing_of
from melee_wm.parsed import fingerprint, write_game
from melee_wm.dataset import load_games, record_of

from made_up import made_up_game, without
from test_encoding import ENCODINGS, FULL

LENGTHS = (40, 7, 61, 12)


def in_memory(layout, lengths=LENGTHS):
    return B.from_games([(f"{i:032x}", made_up_game(i, n)) for i, n in enumerate(lengths)], layout)


def same_batch(a, b):
    return all(torch.equal(x, y) for x, y in zip((*a.frames, a.controls, *a.target), (*b.frames, b.controls, *b.target)))


def write_dataset(folder, lengths, items=False):
    "A parsed dataset of made-up games."
    (folder/"games").mkdir(parents=True)
    records = []
    for i, n in enumerate(lengths):
        game = made_up_game(i, n)
        data, md5 = write_game(game), f"{i:032x}"
        (folder/"games"/md5).write_bytes(data)
        records.append(record_of(game, md5, 0, len(data)))
    (folder/"meta.json").write_text(json.dumps(records))
    return folder


# ---- windows -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("encoding", ENCODINGS, ids=str)
@pytest.mark.parametrize("positions", [1, 4, 10])
def test_windows_against_a_loop(encoding, positions):
    layout, K = layout_of(encoding), 10
    games = in_memory(layout)
    expected = [(g, t) for g, n in enumerate(LENGTHS) for t in range(max(0, n - K - encoding.lookahead))]
    starts = B.window_starts(games, K)
    assert starts.tolist() == [int(games.begins[g]) + t for g, t in expected] and B.window_count(games, K) == len(expected)
    batch = B.gather(games, starts, K, positions)
    preflight(batch.frames, batch.controls, layout, K)
    whole_games = [encode_game(made_up_game(i, n), layout) for i, n in enumerate(LENGTHS)]   # the reference: never packed
    for row, (g, t) in enumerate(expected):
        game, first = whole_games[g], t + K + 1 - positions
        for got, whole in zip(batch.frames, game):
            assert torch.equal(got[row], whole[t:t + K].to(got.dtype))
        for got, whole in zip(batch.target, game):
            assert torch.equal(got[row], whole[first:t + K + 1].to(got.dtype))
        told = next_controls(controls_of(game, layout)[first:t + K + 1 + encoding.lookahead], layout, controls_of(game, layout)[first - 1])
        assert torch.equal(batch.controls[row], told)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=8), st.integers(1, 12), st.integers(1, 9), st.integers(0, 8))
@settings(max_examples=100, deadline=None)
def test_strides_against_a_loop(lengths, K, stride, phase):
    layout = layout_of(FULL)
    games = in_memory(layout, lengths)
    expected = [int(games.begins[g]) + t for g, n in enumerate(lengths) for t in range(phase, n - K, stride)]
    assert B.window_count(games, K, stride, phase) == len(expected)
    assert B.window_starts(games, K, torch.arange(len(expected)), stride, phase).tolist() == expected


@given(st.integers(1, 3000), st.integers(0, 2**31), st.integers(0, 1000))
@settings(max_examples=200, deadline=None)
def test_a_shuffle_is_a_permutation(count, seed, epoch):
    everything = B.shuffled(torch.arange(count), count, seed, epoch)
    assert everything.sort()[0].tolist() == list(range(count))
    some = torch.randint(count, (5,), generator=torch.Generator().manual_seed(seed))
    assert torch.equal(B.shuffled(some, count, seed, epoch), everything[some])   # looked up alone or together


def test_a_shuffle_of_many_takes_no_memory_and_parts_neighbours():
    count = 206_754_081   # frames of the team's 22,000 games
    far = B.shuffled(torch.tensor([0, 1, 2, count - 1]), count, 0, 0)
    assert len(set(far.tolist())) == 4 and 0 <= int(far.min()) and int(far.max()) < count
    assert (B.shuffled(torch.arange(2000), count, 0, 0).diff().abs() > 1000).float().mean() > .99


def test_an_epoch_has_every_window_once_and_resumes():
    games = in_memory(layout_of(FULL))
    def run(**more): return list(B.batches(games, 10, 8, seed=5, epoch=2, **more))
    whole, starts = run(), B.window_starts(games, 10)
    assert len(whole) == B.batch_count(games, 10, 8) and sum(len(b.controls) for b in whole) == len(starts)
    for position in (0, 1, len(whole) - 1, len(whole)):
        rest = run(position=position)
        assert len(rest) == len(whole) - position and all(map(same_batch, whole[position:], rest))
    orders = [tuple(torch.cat(list(B.epoch_starts(games, 10, 8, seed, epoch))).tolist()) for seed in range(3) for epoch in range(3)]
    assert len(set(orders)) == 9 and all(sorted(o) == starts.tolist() for o in orders)
    sequences = list(B.batches(games, 10, 8, seed=5, epoch=2, stride=10, positions=10))
    assert all(b.target.stage.shape[1] == 10 for b in sequences)
    with pytest.raises(UserError, match="long enough"):
        next(B.batches(games, 100, 8))


def test_stored_small_and_exact():
    layout = layout_of(EncodingConfig(state_age_as_embed=True))
    games = in_memory(layout)
    assert games.packing.row_bytes <= 120 and games.bytes == games.frames*games.packing.row_bytes
    kept = games.select([games.md5s[2], games.md5s[0]])
    assert kept.md5s == (games.md5s[0], games.md5s[2]) and torch.equal(kept.game(1).floats, games.game(2).floats)
    assert kept.pieces is games.pieces   # nothing copied


def test_what_is_off_the_grid_is_refused_and_counted():
    game, layout = made_up_game(0), layout_of(FULL)
    sticks = game["main_x"].copy()
    sticks[3, 1] += 1e-3
    with pytest.raises(EncodingRefused, match="main_x off the game's grid.*frame -120, player 1"):
        pack_game(replace(game, columns={**game.columns, "main_x": sticks}), layout)


# ---- choosing games ------------------------------------------------------------------------------------------------

@given(st.lists(st.integers(0, 10**9), unique=True, max_size=60), st.floats(0.01, 0.99), st.randoms(use_true_random=False))
@settings(max_examples=100, deadline=None)
def test_split(numbers, share, random):
    md5s = [f"{n:032x}" for n in numbers]
    train, val = B.split(md5s, share)
    assert sorted(train + val) == sorted(md5s)
    assert (len(md5s) < 2 and not val) or (train and val)
    random.shuffle(md5s)
    assert B.split(md5s, share) == (train, val)


def test_split_is_stable_under_growth():
    md5s = [f"{n:032x}" for n in range(3000)]
    sides = [set(B.split(md5s[:n], .9)[1]) for n in (300, 1000, 3000)]
    assert sides[0] <= sides[1] <= sides[2] and abs(len(sides[2])/3000 - .1) < .02


def test_refusals_are_counted_and_nothing_left_is_an_error():
    layout = layout_of(FULL)
    mixed = [("a", made_up_game(0)), ("b", without(made_up_game(1), "hitlag")), ("c", without(made_up_game(2), "hitlag"))]
    counts = {}
    assert B.from_games(mixed, layout, counts).md5s == ("a",) and counts == {"missing column hitlag": 2}
    with pytest.raises(EncodingRefused):
        B.from_games(mixed, layout)
    with pytest.raises(UserError, match="2 x missing column hitlag"):
        B.from_games(mixed[1:], layout, {})


def test_load_a_dataset(tmp_path):
    data = write_dataset(tmp_path/"parsed", (60, 50, 70))
    layout = layout_of(EncodingConfig(state_age_as_embed=True))
    games, refused = B.load(data, layout, progress=False)
    assert refused == {} and list(games.md5s) == sorted(games.md5s) and games.fingerprint == fingerprint(games.md5s)
    assert B.load(data, layout, max_games=2, progress=False)[0].md5s == games.md5s[:2]
    assert B.load(data, layout, exclude=games.md5s[:1], max_games=1, progress=False)[0].md5s == games.md5s[1:2]
    assert B.load(data, layout, md5s=[games.md5s[2], "absent"], progress=False)[0].md5s == games.md5s[2:]
    for i, (_, game) in enumerate(load_games(data)):   # the parsed dataset changes nothing
        for got, direct in zip(games.game(i), encode_game(game, layout)):
            assert torch.equal(got, direct.to(got.dtype))


# ---- shards --------------------------------------------------------------------------------------------------------

@pytest.fixture
def several_shards(tmp_path, monkeypatch):
    "A dataset of nine short games, and its shards of two games each."
    monkeypatch.setattr(S, "GAMES_PER_PIECE", 2)
    data = write_dataset(tmp_path/"parsed", (40, 33, 61, 12, 90, 25, 47, 38, 52))
    S.encode_dataset(data, load_config("mamba2-1a"), tmp_path/"shards", progress=False)
    return data, tmp_path/"shards"


@pytest.mark.parametrize("name", ["mamba2-1a", "exp-3a-1a2a-lookahead", "v1"])
def test_shards_hand_out_what_memory_does(several_shards, name):
    data, shards = several_shards
    layout = layout_of(load_config(name).encoding)
    mapped, (memory, _) = S.open_shards(shards, layout), B.load(data, layout, progress=False)
    assert len(mapped.pieces) == 5 and mapped.md5s == memory.md5s
    for position in (0, 3):
        for a, b in zip(B.batches(mapped, 10, 16, 1, 2, position), B.batches(memory, 10, 16, 1, 2, position), strict=True):
            assert same_batch(a, b)
    picked = memory.md5s[3:8:2]
    a, b = mapped.select(picked), memory.select(picked)
    assert all(map(same_batch, B.batches(a, 10, 16), B.batches(b, 10, 16))) and a.pieces is mapped.pieces


def test_shards_say_what_is_wrong_with_them(several_shards, tmp_path):
    data, shards = several_shards
    layout = layout_of(load_config("mamba2-1a").encoding)
    with pytest.raises(UserError, match="fewer projectiles.*expected encoding.projectiles: 2"):
        S.open_shards(shards, layout_of(EncodingConfig(projectiles=2)))
    with pytest.raises(UserError, match="all held out"):
        S.open_shards(shards, layout, exclude=S.open_shards(shards, layout).md5s)
    one = shards/"shard-00001.arrow"
    whole = one.read_bytes()
    one.write_bytes(whole[:len(whole)//2])
    with pytest.raises(UserError, match="damaged shard.*shard-00001"):
        S.open_shards(shards, layout)
    S.encode_dataset(data, load_config("mamba2-1a"), shards, progress=False)   # made again, the same
    assert one.read_bytes() == whole
    (shards/"index.json").unlink()
    with pytest.raises(UserError, match="no index of shards.*goes on where it was stopped"):
        S.open_shards(shards, layout)
    with pytest.raises(UserError, match="no game is left"):
        old = write_dataset(tmp_path/"old", (30,))
        made = without(made_up_game(0, 30), "hitlag")
        (old/"games"/f"{0:032x}").write_bytes(write_game(made))
        S.encode_dataset(old, load_config("mamba2-1a"), tmp_path/"none", progress=False)


KILLED = """
import os, random, signal, sys, time
import melee_wm.shards as S, torch
from melee_wm.config import load_config
torch.set_num_threads(1)
S.GAMES_PER_PIECE, data, out, config = 1, sys.argv[1], sys.argv[2], load_config("mamba2-1a")
began = time.perf_counter(); S.encode_dataset(data, config, out + "-whole", progress=False); whole = time.perf_counter() - began
random.seed(0); killed = 0
for _ in range(10):
    child = os.fork()
    if child == 0: S.encode_dataset(data, config, out, progress=False); os._exit(0)
    time.sleep(random.uniform(.02, .4)*whole); os.kill(child, signal.SIGKILL)
    killed += os.waitpid(child, 0)[1] == signal.SIGKILL
    for path in list(os.scandir(out))[::2] if os.path.isdir(out) else []:     # and somebody removes some of what was done
        if path.name.endswith(".arrow"): os.remove(path)
S.encode_dataset(data, config, out, progress=False)
print(killed)
"""


def test_encoding_killed_ten_times_gives_the_same_shards(tmp_path):
    data = write_dataset(tmp_path/"parsed", [300 + 40*i for i in range(24)])
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(KILLED), data, tmp_path/"shards"], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) >= 5   # so many kills came before the end
    left, whole = ({p.name: p.read_bytes() for p in folder.iterdir() if p.name != ".lock"} for folder in (tmp_path/"shards", tmp_path/"shards-whole"))
    assert left == whole and len(whole) == 25


def test_workers_change_nothing(tmp_path):
    data = write_dataset(tmp_path/"parsed", (60, 50, 70))
    script = "import sys, melee_wm.shards as S; from melee_wm.config import load_config\nif __name__ == '__main__': S.GAMES_PER_PIECE = 1; S.encode_dataset(sys.argv[1], load_config('mamba2-1a'), sys.argv[2], int(sys.argv[3]), progress=False)"
    (tmp_path/"script.py").write_text(script)
    for n in (1, 2):
        subprocess.run([sys.executable, tmp_path/"script.py", data, tmp_path/f"by{n}", str(n)], check=True, timeout=120)
    assert {p.name: p.read_bytes() for p in (tmp_path/"by1").glob("*.*")} == {p.name: p.read_bytes() for p in (tmp_path/"by2").glob("*.*")}


# ---- streams and memory --------------------------------------------------------------------------------------------

def test_a_stream_hands_out_every_window_once_and_resumes(several_shards):
    data, _ = several_shards
    layout = layout_of(load_config("mamba2-1a").encoding)
    lengths, _ = streaming.survey(data, layout, progress=False)
    memory, whole, small = B.load(data, layout, progress=False)[0], streaming.stream(data, layout, lengths, 9), streaming.stream(data, layout, lengths, 4)
    assert all(map(same_batch, B.batches(memory, 10, 16, 3, 1), B.batches(whole, 10, 16, 3, 1)))
    starts = torch.cat(list(B.epoch_starts(small, 10, 16, 3, 1)))
    assert torch.equal(starts.sort()[0], B.window_starts(memory, 10)) and len(small.pieces) == 5
    for position in (1, 4):
        fresh = streaming.stream(data, layout, lengths, 4)
        assert all(map(same_batch, list(B.batches(small, 10, 16, 3, 1))[position:], B.batches(fresh, 10, 16, 3, 1, position)))
    assert len(small.pieces.kept) <= 2


def test_what_does_not_fit_is_refused_before_it_is_loaded(several_shards, monkeypatch):
    data, shards = several_shards
    from melee_wm.experiment import choose_games
    monkeypatch.setattr(streaming, "memory_available", lambda: 20_000)
    with pytest.raises(UserError, match="does not fit into memory.*--streaming"):
        choose_games(load_config("mamba2-1a"), data, progress=False)
    assert choose_games(load_config("mamba2-1a"), shards, progress=False).train.where == "files"
    assert choose_games(load_config("mamba2-1a", ["data.buffer_size=3"]), data, progress=False).train.where == "stream"
    with pytest.raises(UserError, match="nothing to stream"):
        choose_games(load_config("mamba2-1a", ["data.buffer_size=3"]), shards, progress=False)


def test_training_is_the_same_from_memory_files_and_a_stream(tmp_path):
    "A whole run by the same experiment: the same weights to the bit, wherever the games lie."
    from melee_wm.build import build
    from melee_wm.checkpoint import load_model
    from melee_wm.experiment import run_experiment
    from melee_wm.practice import write_practice
    write_practice(tmp_path/"slp", games=3, seed=0, frames=1600)
    build([tmp_path/"slp"], tmp_path/"data", progress=False)
    small = ["training.epochs=2", "model.hidden=[32, 32]", "evaluation.max_starts=50"]
    S.encode_dataset(tmp_path/"data", load_config("toy"), tmp_path/"shards", progress=False)
    weights = {}
    for where, data, more in (("memory", "data", []), ("files", "shards", []), ("stream", "data", ["data.buffer_size=10"])):
        manifest = run_experiment(load_config("toy", small + more), tmp_path/data, tmp_path/where, device="cpu", progress=False)
        assert manifest["status"] == "finished" and (tmp_path/where/"scorecard.json").is_file()
        weights[where] = load_model(tmp_path/where).state_dict()
    for where in ("files", "stream"):
        assert all(torch.equal(v, weights[where][name]) for name, v in weights["memory"].items()), where


# ---- real games ----------------------------------------------------------------------------------------------------

def test_every_real_game_survives_shards(replays, tmp_path):
    "Raw replay -> shard -> tensors equals raw replay -> tensors: every field of every game, to the bit, items included."
    from melee_wm.build import build
    from melee_wm.archives import find_files, replays_in
    from melee_wm.slp import ReplayError, read_slp
    import hashlib
    build([replays], tmp_path/"parsed", workers=2, progress=False)
    config = load_config("projectiles")
    layout = layout_of(config.encoding)
    index = S.encode_dataset(tmp_path/"parsed", config, tmp_path/"shards", progress=False)
    games = S.open_shards(tmp_path/"shards", layout)
    place, compared, frames = {md5: i for i, md5 in enumerate(games.md5s)}, set(), 0
    for found in (found for path in find_files([replays]) for found in replays_in(path)):
        if found.problem:
            continue
        data = found.data if isinstance(found.data, bytes) else found.data.read_bytes()
        md5 = hashlib.md5(data).hexdigest()
        if md5 not in place or md5 in compared:
            continue
        (tmp_path/"one.slp").write_bytes(data)
        direct = encode_game(read_slp(tmp_path/"one.slp", humans_only=True), layout)
        for got, wanted in zip(games.game(place[md5]), direct):
            assert torch.equal(got, wanted.to(got.dtype)), md5
        compared.add(md5)
        frames += len(direct.stage)
    assert compared == set(games.md5s) and frames == index["frames"] and len(compared) > 150
    assert len(compared) + sum(index["refused"].values()) == len(S.read_meta(tmp_path/"parsed"))
    rows = sum(s["rows"] for s in index["shards"])
    assert rows*packing_of(layout).row_bytes <= 120*rows
