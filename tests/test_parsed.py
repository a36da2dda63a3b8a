"""The parsed dataset: exactness, slippi-ai's layout, and builds under every kind of bad luck."""
import csv, gzip, hashlib, io, json, os, random, re, shutil, signal, subprocess, sys, time, zipfile, zlib
from dataclasses import replace
from pathlib import Path
import numpy as np
import py7zr
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings, strategies as st
from melee_wm import build as build_module, core
from melee_wm.build import build, draw_info, info, summary
from melee_wm.archives import find_files, replays_in
from melee_wm.core import UserError
from melee_wm.frame import COLUMNS, ITEM_COLUMNS, STAGE_EVENTS, Game
from melee_wm.parsed import SLIPPI_AI, content_hash, fingerprint, item_slots, read_game, to_struct, write_game
from melee_wm.dataset import Filter, load_games, named_filter, parse_replay, ranks_in, read_meta, record_of
from melee_wm.slp import read_slp, write_slp
from melee_wm.slpz import slp_to_slpz

TOY = "6827921534249607dafa57e9a67f8df4"


def bits(game: Game):
    "Everything a game holds, down to the last bit."
    def table(t): return t and {k: (str(v.dtype), v.shape, v.tobytes()) for k, v in t.items()}
    events = game.stage_events and {k: table(t) for k, t in game.stage_events.items()}
    return game.stage, game.ports, game.characters, game.version, game.info, table(game.columns), table(game.items), events


def digest(folder: Path) -> dict:
    return {str(p.relative_to(folder)): hashlib.md5(p.read_bytes()).hexdigest() for p in [*(folder/"games").iterdir(), folder/"meta.json"]}


def accounted(result: dict) -> int:
    return result["games_added"] + result["games_skipped"] + result["duplicates"] + sum(result["refused"].values()) + sum(result["filtered"].values()) + len(result["quarantined"])


def leaves(array: pa.StructArray, path: str = ""):
    for field in array.type:
        part = array.field(field.name)
        yield from leaves(part, f"{path}{field.name}.") if pa.types.is_struct(field.type) else [(f"{path}{field.name}", part)]


def wander(seed: int, frames: int = 1600, **extra) -> Game:
    "A match that never was: two random walks."
    rng = np.random.default_rng(seed)
    x = np.cumsum(rng.normal(size=(frames, 2)), 0).clip(-90, 90).astype("float32")
    columns = {"x": x, "y": abs(x)/3, "action_state": rng.integers(14, 90, (frames, 2)).astype("uint16"), "stocks": np.full((frames, 2), 4, "uint8")}
    return Game(stage=31, columns=columns, **extra)


@pytest.fixture(scope="session")
def matches(tmp_path_factory) -> list[bytes]:
    "Eight small replays."
    folder = tmp_path_factory.mktemp("matches")
    return [write_slp(wander(seed), folder/f"{seed}.slp", provenance="synthetic: for tests").read_bytes() for seed in range(8)]


@pytest.fixture
def heap(tmp_path, matches) -> Path:
    "A folder with everything that can go wrong in it; six good games."
    heap = tmp_path/"heap"
    (heap/"deep/er").mkdir(parents=True)
    (heap/"one.slp").write_bytes(matches[0])
    (heap/"deep/er/TWO.SLP.GZ").write_bytes(gzip.compress(matches[1], 1))
    (heap/"deep/er/two.slpz").write_bytes(slp_to_slpz(matches[1]))
    (heap/"cut.slpz").write_bytes(slp_to_slpz(matches[7])[:9000])
    (heap/"deep/page.slp").write_text("<html>404</html>")
    (heap/"deep/._one.slp").write_bytes(b"left by macOS")
    (heap/"deep/notes.txt").write_text("not a replay")
    (heap/"empty.slp").touch()
    (heap/"cut.slp").write_bytes(matches[7][:20000])
    (heap/"cut.slp.gz").write_bytes(gzip.compress(matches[7], 1)[:9000])
    write_slp(wander(99, frames=300), heap/"short.slp")
    with zipfile.ZipFile(heap/"Evening.ZIP", "w", zipfile.ZIP_DEFLATED) as z:
        z.writestr("a/copy.slp", matches[0])
        z.writestr("a/three.slp", matches[2])
        z.writestr("__MACOSX/a/._three.slp", b"left by macOS")
        z.writestr("../../../escape.slp", matches[7])
        z.writestr("/etc/escape.slp", matches[7])
        z.writestr("inner.zip", b"PK")
        z.writestr("readme.txt", "hello")
    with py7zr.SevenZipFile(heap/"cup.7z", "w", filters=[{"id": py7zr.FILTER_LZMA2, "preset": 1}]) as z:
        for i in (3, 4, 5): z.writestr(matches[i], f"day 1/{i}.slp")
        z.writestr(gzip.compress(matches[2], 1), "day 1/three again.slp.gz")
    return heap


EXPECTED = dict(found=18, games_added=6, games_skipped=0, duplicates=3, refused={"too_short": 1}, filtered={})


# --- one game ---------------------------------------------------------------------------------------------

def test_toy_equals_slippi_ai(toy, tmp_path):
    result = build([toy/"Raw/single_game.zip"], tmp_path/"out", progress=False)
    assert result["games_added"] == 1 and result["frames"] == 6402
    read = lambda path: pq.ParquetFile(io.BytesIO(zlib.decompress(path.read_bytes())), pre_buffer=False).read(use_threads=False)["root"].combine_chunks()
    ours, theirs = dict(leaves(read(tmp_path/"out/games"/TOY))), dict(leaves(read(toy/"games"/TOY)))
    assert len(theirs) == 148
    assert [path for path in ours if path in theirs] == list(theirs), "the same fields in the same order"
    assert [path for path, values in theirs.items() if not ours[path].equals(values)] == []
    [mine], [published] = read_meta(tmp_path/"out"), read_meta(toy)
    assert set(published) <= set(mine)
    assert {k for k in published if mine[k] != published[k]} == {"name", "players", "pq_size"}   # names are left out, and our file holds more
    [(md5, game)] = load_games(toy)
    full = read_game(tmp_path/"out", TOY)
    assert md5 == TOY and game.stage == full.stage == 31 and game.characters == full.characters
    for name in ("x", "y", "facing", "action_state", "character", "jumps_left", "shield", "on_ground", "main_x", "main_y", "c_x", "c_y", "shoulder"):
        assert (game[name] == full[name]).all(), name
    with pytest.raises(UserError, match="missing column"): game["hitlag"]
    assert info(toy)["frames"] == 6402 and info(toy)["fingerprint"] == fingerprint([TOY])


def test_slippi_ai_can_load_every_version(replays, tmp_path):
    "As its loader does: fields by name, converted to their types."
    build([replays/"versions.zip", replays/"quick"], tmp_path/"out", workers=2, progress=False)
    def convert(array, layout, n):
        for name, part in layout.items():
            if isinstance(part, dict): convert(array.field(name), part, n); continue
            with np.errstate(invalid="ignore"): assert array.field(name).to_numpy(zero_copy_only=False).astype(part).shape == (n,)
    for record in read_meta(tmp_path/"out"):
        raw = zlib.decompress((tmp_path/"out/games"/record["slp_md5"]).read_bytes())
        root = pq.ParquetFile(io.BytesIO(raw), pre_buffer=False).read(use_threads=False)["root"].combine_chunks()
        convert(root, SLIPPI_AI, record["frames"])
        nulls = {path for path, values in leaves(root) if values.null_count}
        assert all(values.null_count in (0, len(values)) for _, values in leaves(root))
        if record["is_training"]: assert not nulls, (record["slp_md5"], nulls)
        for column, field in (("hurtbox_state", "invulnerable"), ("on_ground", "on_ground"), ("jumps_left", "jumps_left")):
            assert (column in record["missing"]) == (f"p0.{field}" in nulls)


def test_real_games_survive_to_the_bit(replays, tmp_path):
    with zipfile.ZipFile(replays/"versions.zip") as z: z.extractall(tmp_path/"versions")
    paths = [*sorted((replays/"quick").glob("*.slp"))[:2], *sorted((tmp_path/"versions").rglob("*.slp")), *(replays/"odd").glob("v3*.slp")]
    for path in paths:
        game = read_slp(path)
        (tmp_path/"game").write_bytes(write_game(game))
        assert bits(read_game(tmp_path/"game")) == bits(game), path.name
        part = read_game(tmp_path/"game", columns=("percent", "hitlag"))
        assert set(part.columns) == {"x", "percent", "hitlag"} & set(game.columns) and (part["percent"] == game["percent"]).all()
        assert part.items is None and part.info == game.info and part.characters == game.characters
        assert bits(read_game(tmp_path/"game", columns=iter(("percent",)), items=True)) == bits(replace(game, columns={n: game.columns[n] for n in game.columns if n in ("x", "percent")}, stage_events=None))


def values(dtype: str, shape, rng) -> np.ndarray:
    "Random bits of a type, with NaN, infinities and minus zero among the floats."
    if dtype == "bool": return rng.integers(0, 2, shape).astype(bool)
    raw = rng.integers(0, 256, (*shape, np.dtype(dtype).itemsize), dtype=np.uint8).view(dtype)[..., 0]
    if raw.dtype.kind == "f" and raw.size: raw.flat[rng.integers(0, raw.size, 3)] = np.array([-0.0, 0.0, np.inf], dtype)
    return raw


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 40), st.sets(st.sampled_from([c for c in COLUMNS if c != "x"])), st.booleans(), st.booleans())
def test_any_game_survives(tmp_path_factory, seed, frames, names, with_items, with_events):
    rng = np.random.default_rng(seed)
    def table(columns):
        frame = np.sort(rng.integers(0, frames, rng.integers(0, 60))).astype("int32")
        return {"frame": frame} | {k: values(t, frame.shape, rng) for k, t in columns.items()}
    columns = {name: values(COLUMNS[name].dtype, (frames, 2), rng) for name in ("x", *sorted(names))}
    if "percent" in columns: columns["percent"] = rng.uniform(0, 999, (frames, 2)).astype("float32")
    game = Game(stage=int(rng.choice([2, 3, 8, 28, 31, 32, 5])), columns=columns, ports=tuple(sorted(rng.choice(4, 2, replace=False).tolist())),
        characters=tuple(rng.integers(0, 26, 2).tolist()), version=tuple(rng.integers(0, 20, 3).tolist()),
        items=table({k: t for k, (t, _) in ITEM_COLUMNS.items()}) if with_items else None,
        stage_events={k: table(c) for k, c in STAGE_EVENTS.items()} if with_events else None,
        info={"types": ("Human", "Human"), "match": {"id": "x", "game": 1}, "synthetic": None, "followers": (0,)})
    path = tmp_path_factory.getbasetemp()/"hypothesis game"
    path.write_bytes(write_game(game))
    assert bits(read_game(path)) == bits(game)
    assert write_game(read_game(path)) == path.read_bytes()


def test_item_slots_match_a_frame_by_frame_stack():
    rng = random.Random(0)
    for _ in range(30):
        frames, ids, alive, free, slot, expected = [], [], {}, list(range(15))[::-1], {}, []
        for frame in range(120):
            alive = {i: left - 1 for i, left in alive.items() if left > 0}
            for i in [i for i in slot if i not in alive]: free.append(slot.pop(i))
            for _ in range(rng.choice((0, 0, 1, 3))): alive[len(set(ids) | set(alive))] = rng.randrange(20)
            for i in sorted(alive):
                if i not in slot and free: slot[i] = free.pop()
                frames.append(frame); ids.append(i); expected.append(slot.get(i, -1))
        assert item_slots(np.array(frames), np.array(ids)).tolist() == expected


def test_games_of_the_first_format_are_read(tmp_path):
    "Format 1 stored the sticks as they are and the second seed in full."
    seeds = np.random.default_rng(1).integers(0, 2**32, (1600, 2), dtype=np.uint32)
    game = wander(0)
    game.columns.update(random_seed=seeds, main_x=np.full((1600, 2), 0.3, "float32"))
    stored = replace(game, columns=game.columns | {"random_seed": np.stack([seeds[:, 0], seeds[:, 0] ^ seeds[:, 1]], 1)})
    about = dict(format=1, stage=31, ports=game.ports, characters=game.characters, version=game.version, columns=list(game.columns), info={})
    schema = pa.schema([pa.field("root", to_struct(stored).type)], metadata={"melee_wm": json.dumps(about)})
    sink = io.BytesIO()
    with pq.ParquetWriter(sink, schema, compression="NONE", store_schema=False) as writer:
        writer.write_table(pa.table([to_struct(stored)], schema)); writer.add_key_value_metadata({"melee_wm": json.dumps(about)})
    (tmp_path/"game").write_bytes(zlib.compress(sink.getvalue()))
    assert bits(read_game(tmp_path/"game")) == bits(game)
    about["format"] = 99
    sink = io.BytesIO()
    with pq.ParquetWriter(sink, schema) as writer:
        writer.write_table(pa.table([to_struct(stored)], schema)); writer.add_key_value_metadata({"melee_wm": json.dumps(about)})
    (tmp_path/"game").write_bytes(zlib.compress(sink.getvalue()))
    with pytest.raises(UserError, match="newer format"): read_game(tmp_path/"game")


def test_sticks_off_the_grid_are_kept_too(tmp_path):
    "Whatever cannot be told from slippi-ai's half is stored beside it."
    for value in (0.3, 0.31, -0.0, np.nan, 1e-40):
        game = wander(0)
        game.columns["c_y"] = np.full((1600, 2), value, "float32")
        (tmp_path/"game").write_bytes(write_game(game))
        assert bits(read_game(tmp_path/"game")) == bits(game)


def test_content_hash_ignores_the_file_and_sees_the_play(tmp_path):
    game = wander(1)
    again = read_slp(write_slp(game, tmp_path/"a.slp", provenance="somebody else"))
    assert content_hash(game) == content_hash(again)
    moved = wander(1); moved.columns["x"][700, 1] += 1
    assert content_hash(moved) != content_hash(game)


def test_names_are_left_out_unless_asked_for(toy, tmp_path):
    for keep, folder in ((False, "blank"), (True, "named")):
        build([toy/"Raw/single_game.zip"], tmp_path/folder, keep_names=keep, progress=False)
        everything = zlib.decompress((tmp_path/folder/"games"/TOY).read_bytes()) + (tmp_path/folder/"meta.json").read_bytes()
        assert (b"Diamond Player" in everything) == keep and (b"diamond-diamond" in everything) == keep


def test_bad_game_files(tmp_path):
    data = write_game(wander(0))
    for content in (b"", b"hello", data[:500], data[:-4], zlib.compress(b"PAR1 not parquet PAR1")):
        (tmp_path/"game").write_bytes(content)
        with pytest.raises(UserError, match="damaged game file"): read_game(tmp_path/"game")
    with pytest.raises(UserError, match="no such game"): read_game(tmp_path, "0"*32)
    with pytest.raises(UserError, match="no parsed dataset"): read_meta(tmp_path)
    (tmp_path/"meta.json").write_text("[{")
    with pytest.raises(UserError, match="damaged meta.json"): read_meta(tmp_path)


# --- many games ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("workers", [1, 3])
def test_a_heap_is_accounted_for(heap, tmp_path, workers):
    result = build([heap], tmp_path/"out", workers=workers, progress=False)
    assert {k: result[k] for k in EXPECTED} == EXPECTED and accounted(result) == result["found"]
    reasons = {Path(q["path"]).name: q["reason"] for q in result["quarantined"]}
    assert len(result["quarantined"]) == 8 and "outside the archive" in reasons["escape.slp"] and "inside an archive" in reasons["inner.zip"]
    assert {"page.slp", "empty.slp", "cut.slp", "cut.slp.gz", "cut.slpz"} <= set(reasons)
    assert sorted(p.name for p in (tmp_path/"out").iterdir()) == [".lock", "games", "meta.json"]
    assert not list(tmp_path.rglob("escape*")) and not Path("/etc/escape.slp").exists()
    again = build([heap], tmp_path/"out", workers=workers, progress=False)
    assert (again["games_added"], again["games_skipped"], again["duplicates"], accounted(again)) == (0, 6, 3, 18)
    assert summary(again).startswith("18 replays found")
    other = build([heap], tmp_path/"other", workers=4 - workers, progress=False)
    assert other["games_added"] == 6 and digest(tmp_path/"other") == digest(tmp_path/"out")


def test_the_whole_corpus(replays, tmp_path):
    result = build([replays], tmp_path/"out", workers=2, progress=False)
    print(summary(result))
    assert result["found"] == 223 == accounted(result)
    assert result["duplicates"] == 5 and len(result["quarantined"]) == 11 and result["games_added"] == 199
    assert {Path(q["path"]).parent.name for q in result["quarantined"]} == {"bad"} and all(q["reason"] for q in result["quarantined"])
    assert set(result["refused"]) == {"not_two_players", "cpu_player", "too_short"} and sum(result["refused"].values()) == 8
    inventory = {row["md5"]: row for row in csv.DictReader(open(replays/"inventory.csv"))}
    records = read_meta(tmp_path/"out")
    assert {r["slp_md5"]: (r["frames"], r["slp_size"]) for r in records} == {md5: (int(row["frames"]), int(row["bytes"])) for md5, row in inventory.items()}
    assert info(tmp_path/"out")["frames"] == result["frames"] == sum(int(row["frames"]) for row in inventory.values())
    assert set((replays/"heldout.txt").read_text().split()) <= {r["slp_md5"] for r in records}


def spawn(inputs: list[Path], output: Path, min_frames: int = 1500, **environment) -> subprocess.Popen:
    program = f"from melee_wm.build import build; build({[str(p) for p in inputs]!r}, {str(output)!r}, workers=2, min_frames={min_frames}, progress=False)"
    return subprocess.Popen([sys.executable, "-c", program], env={**os.environ, **environment}, stderr=subprocess.PIPE)


def wait_for_games(process: subprocess.Popen, output: Path, count: int):
    while process.poll() is None and len(list((output/"games").glob("[0-9a-f]*"))) < count: time.sleep(0.002)


def processes_with(token: str) -> list[str]:
    "Processes that carry a token in their environment."
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if token.encode() in path.read_bytes(): found.append(path.parent.name)
        except OSError: continue
    return found


def leave_the_mess_of_a_kill(folder: Path):
    "What a kill in the middle of a write leaves behind."
    (folder/"games").mkdir(parents=True, exist_ok=True)
    (folder/"games"/f".{'0'*32}.1.tmp").write_bytes(b"half a ga")
    with open(folder/"journal.jsonl", "a") as file: file.write('{"slp_md5": "01234')


def check_kills(inputs: list[Path], tmp_path: Path, moments: int, seed: int):
    "Kill a build again and again at random moments, each a little later; then let it end, and compare with an undisturbed one."
    whole, rng, token = build(inputs, tmp_path/"whole", workers=2, progress=False), random.Random(seed), f"token-{os.getpid()}-{time.time_ns()}"
    counts, hit = sorted(rng.randrange(whole["games_added"]) for _ in range(moments)), 0
    for count in counts:
        process = spawn(inputs, tmp_path/"killed", MELEE_WM_TEST=token)
        wait_for_games(process, tmp_path/"killed", count)
        time.sleep(rng.uniform(0, 0.03))
        hit += process.poll() is None
        process.send_signal(signal.SIGKILL); process.wait()
        leave_the_mess_of_a_kill(tmp_path/"killed")
    assert hit >= moments - 2, "they were meant to be killed half-way"
    until = time.time() + 10
    while processes_with(token) and time.time() < until: time.sleep(0.05)
    assert not processes_with(token), "workers outlived their builder"
    result = build(inputs, tmp_path/"killed", workers=2, progress=False)
    assert result["games_skipped"] >= counts[-1] - 3 and accounted(result) == result["found"] == whole["found"]
    assert digest(tmp_path/"killed") == digest(tmp_path/"whole")
    assert sorted(p.name for p in (tmp_path/"killed").iterdir()) == sorted(p.name for p in (tmp_path/"whole").iterdir()) == [".lock", "games", "meta.json"]


def test_killed_at_ten_moments_synthetic(heap, tmp_path, matches):
    for i in range(8, 20): write_slp(wander(i), heap/f"more {i}.slp")
    for i in range(3): write_slp(wander(8 + i), heap/f"again {i}.slp", provenance="saved again: an alias")
    check_kills([heap], tmp_path, 10, seed=0)


def test_killed_at_random_moments_real(replays, tmp_path):
    check_kills([replays/name for name in ("quick", "odd", "bad", "versions.zip")], tmp_path, 4, seed=1)


def test_killed_while_it_finishes(tmp_path, matches):
    "Between meta.json and the end of the journal, too, nothing is lost."
    heap = tmp_path/"heap"; heap.mkdir()
    for i in range(2): (heap/f"{i}.slp").write_bytes(matches[i])
    write_slp(wander(0), heap/"again.slp", provenance="saved again: an alias")
    build([heap], tmp_path/"whole", progress=False)
    dying = f"""
import os, pathlib, melee_wm.build as b
unlink = pathlib.Path.unlink
pathlib.Path.unlink = lambda self, **options: os.abort() if self.name == "journal.jsonl" else unlink(self, **options)
b.build([{str(heap)!r}], {str(tmp_path/"killed")!r}, progress=False)"""
    assert subprocess.run([sys.executable, "-c", dying]).returncode == -signal.SIGABRT
    assert (tmp_path/"killed/journal.jsonl").exists() and (tmp_path/"killed/meta.json").exists()
    build([heap/"1.slp"], tmp_path/"killed", progress=False)   # even if only one file is looked at again
    assert digest(tmp_path/"killed") == digest(tmp_path/"whole")
    record = next(r for r in read_meta(tmp_path/"killed") if r["aliases"])
    (tmp_path/"killed/games"/record["slp_md5"]).write_bytes(b"damaged")
    build([p for p in heap.iterdir() if hashlib.md5(p.read_bytes()).hexdigest() == record["slp_md5"]], tmp_path/"killed", progress=False)
    assert digest(tmp_path/"killed") == digest(tmp_path/"whole"), "a game that is made again keeps its other names"


def test_ctrl_c_leaves_a_dataset(heap, tmp_path):
    process = spawn([heap], tmp_path/"out")
    wait_for_games(process, tmp_path/"out", 2)
    process.send_signal(signal.SIGINT)
    assert process.wait(20) != 0 and b"KeyboardInterrupt" in process.stderr.read()
    done = read_meta(tmp_path/"out")
    for md5, game in load_games(tmp_path/"out"): assert len(game) == 1600
    assert sorted(p.name for p in (tmp_path/"out/games").iterdir()) == [r["slp_md5"] for r in done]
    build([heap], tmp_path/"out", progress=False)
    build([heap], tmp_path/"whole", progress=False)
    assert digest(tmp_path/"out") == digest(tmp_path/"whole")


def test_a_replay_that_kills_or_blocks_the_reader(heap, tmp_path, matches, monkeypatch):
    killer, sleeper = (hashlib.md5(matches[i]).hexdigest() for i in (3, 2))
    program = f"""
import os, time, melee_wm.dataset as dataset
honest = dataset.parse_replay
def parse_replay(**task):
    if task["md5"] == {killer!r}: os.abort()
    if task["md5"] == {sleeper!r}: time.sleep(60)
    return honest(**task)
dataset.parse_replay = parse_replay
dataset.serve()"""
    monkeypatch.setattr(build_module.Worker, "command", [sys.executable, "-c", program])
    monkeypatch.setattr(build_module.Worker.ask, "__defaults__", (2,))
    result = build([heap], tmp_path/"out", workers=2, progress=False)
    reasons = {Path(q["path"]).name: q["reason"] for q in result["quarantined"]}
    assert "process died (signal 6)" in reasons["3.slp"] and "stuck for 2 s" in reasons["three.slp"]
    assert result["games_added"] == 4 and accounted(result) == 18
    monkeypatch.undo()
    build([heap], tmp_path/"out", progress=False); build([heap], tmp_path/"whole", progress=False)
    assert digest(tmp_path/"out") == digest(tmp_path/"whole"), "a quarantine is not for ever"


def test_the_same_game_saved_again(tmp_path, matches):
    "Whatever the order of builds, the smallest MD5 stays and the others are its aliases."
    copies = []
    for i in range(3):
        copies.append(tmp_path/f"copy {i}"); copies[-1].mkdir()
        write_slp(wander(0), copies[-1]/"game.slp", provenance=f"saved by program {i}")
    md5s = sorted(hashlib.md5((c/"game.slp").read_bytes()).hexdigest() for c in copies)
    (copies[0]/"another.slp").write_bytes(matches[1])
    results = []
    for n, order in enumerate(([[0, 1, 2]], [[0], [1], [2]], [[2], [0, 1]])):
        for group in order: result = build([copies[i] for i in group], tmp_path/f"out {n}", workers=2, progress=False); assert accounted(result) == result["found"]
        results.append(digest(tmp_path/f"out {n}"))
        record = next(r for r in read_meta(tmp_path/f"out {n}") if r["aliases"])
        assert [record["slp_md5"], *record["aliases"]] == md5s and len(read_meta(tmp_path/f"out {n}")) == 2
    assert all(r == results[0] for r in results)
    again = build(copies, tmp_path/"out 0", progress=False)
    assert (again["games_added"], again["games_skipped"], again["duplicates"]) == (0, 2, 2)


def test_a_damaged_dataset_is_repaired(heap, tmp_path):
    build([heap], tmp_path/"out", progress=False)
    before, games = digest(tmp_path/"out"), sorted((tmp_path/"out/games").iterdir())
    games[0].unlink(); games[1].write_bytes(games[1].read_bytes()[:100]); (tmp_path/"out/games"/("f"*32)).write_bytes(b"nobody's")
    result = build([heap], tmp_path/"out", progress=False)
    assert (result["games_added"], result["games_skipped"]) == (2, 4) and digest(tmp_path/"out") == before


def test_hostile_archives(tmp_path, matches):
    def only(path): [found] = replays_in(path); return found.problem
    with zipfile.ZipFile(tmp_path/"bomb.zip", "w", zipfile.ZIP_DEFLATED) as z:
        for i in range(3): z.writestr(f"{i}.slp", bytes(100 << 20), compresslevel=9)
    assert "expands from" in only(tmp_path/"bomb.zip")
    with py7zr.SevenZipFile(tmp_path/"locked.7z", "w", password="secret") as z: z.writestr(matches[0], "a.slp")
    assert "damaged" in only(tmp_path/"locked.7z")
    (tmp_path/"not.zip").write_bytes(b"hello"); (tmp_path/"not.7z").write_bytes(b"hello")
    assert "damaged" in only(tmp_path/"not.zip") and "damaged" in only(tmp_path/"not.7z")
    with zipfile.ZipFile(tmp_path/"crc.zip", "w") as z: z.writestr("a.slp", matches[0]); z.writestr("b.slp", matches[1])
    data = bytearray((tmp_path/"crc.zip").read_bytes()); data[5000] ^= 1; (tmp_path/"crc.zip").write_bytes(data)
    first, second = replays_in(tmp_path/"crc.zip")
    assert "CRC" in first.problem and second.data == matches[1]
    with py7zr.SevenZipFile(tmp_path/"good.7z", "w", filters=[{"id": py7zr.FILTER_LZMA2, "preset": 1}]) as z:
        for i in range(4): z.writestr(matches[i], f"{i}.slp")
    good, rng = (tmp_path/"good.7z").read_bytes(), random.Random(0)
    assert [f.data for f in replays_in(tmp_path/"good.7z")] == matches[:4]
    for _ in range(25):
        data = bytearray(good)
        for _ in range(rng.choice((1, 1, 20))): data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        (tmp_path/"mutant.7z").write_bytes(data[:rng.choice((len(data), len(data), rng.randrange(len(data))))])
        for found in replays_in(tmp_path/"mutant.7z"): assert found.problem or found.data in matches
    stream = replays_in(tmp_path/"good.7z"); next(stream); stream.close()   # leaving early must not hang


@pytest.mark.parametrize("real", [False, True])
def test_one_game_in_every_container(real, tmp_path, matches, request):
    "The same file inside anything is one game and plain duplicates; the same match with other metadata is one game and an alias."
    data = next(sorted(request.getfixturevalue("replays").glob("quick/*.slp"))[0] for _ in "x").read_bytes() if real else matches[0]
    resaved = data.replace(b"playedOn", b"playedOm") if real else write_slp(wander(0), tmp_path/"resaved.slp", provenance="another program").read_bytes()
    assert resaved != data
    heap = tmp_path/"heap"; heap.mkdir()
    for name, content in (("game", data), ("resaved", resaved)):
        (heap/f"{name}.slp").write_bytes(content)
        (heap/f"{name}.slp.gz").write_bytes(gzip.compress(content, 1))
        (heap/f"{name}.slpz").write_bytes(slp_to_slpz(content))
        with zipfile.ZipFile(heap/f"{name}.zip", "w", zipfile.ZIP_DEFLATED) as z: z.writestr("a.slp", content); z.writestr("b.slpz", slp_to_slpz(content))
        with py7zr.SevenZipFile(heap/f"{name}.7z", "w", filters=[{"id": py7zr.FILTER_LZMA2, "preset": 0}]) as z: z.writestr(content, "a.slp"); z.writestr(gzip.compress(content, 1), "b.slp.gz")
    result = build([heap], tmp_path/"out", workers=2, progress=False)
    assert (result["found"], result["games_added"], result["duplicates"], result["quarantined"]) == (14, 1, 13, [])
    [record] = read_meta(tmp_path/"out")
    assert [record["slp_md5"], *record["aliases"]] == sorted(hashlib.md5(d).hexdigest() for d in (data, resaved))
    for path in (heap/"resaved.slpz", heap/"game.7z", heap/"resaved.zip"):
        again = build([path], tmp_path/"out", progress=False)
        assert (again["games_added"], again["duplicates"] + again["games_skipped"]) == (0, again["found"])


def test_filters(tmp_path, replays):
    inputs = [replays/"quick", replays/"versions.zip"]
    everything = build(inputs, tmp_path/"all", workers=2, progress=False)
    records = read_meta(tmp_path/"all")
    for keep in (named_filter(["fox", "Falco", "marth"]), named_filter(stages=["battlefield", "Yoshis Story"], version="2.0"), named_filter(min_frames=6000, max_frames=9000, version="3.9.0")):
        result = build(inputs, tmp_path/"some", workers=2, progress=False, keep=keep)
        wanted = {r["slp_md5"] for r in records if (not keep.characters or all(p["character"] in keep.characters for p in r["players"])) and (not keep.stages or r["stage"] in keep.stages)
                  and tuple(r["slippi_version"]) >= keep.version and keep.min_frames <= r["frames"] <= (keep.max_frames or r["frames"])}
        assert 0 < len(wanted) < len(records) and {r["slp_md5"] for r in read_meta(tmp_path/"some")} == wanted
        assert accounted(result) == result["found"] == everything["found"] and sum(result["filtered"].values()) == everything["games_added"] - len(wanted)
        assert {r["slp_md5"]: r for r in read_meta(tmp_path/"some")} == {r["slp_md5"]: r for r in records if r["slp_md5"] in wanted}
        assert f"{len(wanted)} games kept, {everything['games_added'] - len(wanted)} dropped" in summary(result)
        shutil.rmtree(tmp_path/"some")
    build(inputs, tmp_path/"all", progress=False, keep=Filter(stages=(0,)))
    assert read_meta(tmp_path/"all") == records, "a filter takes nothing away that is there"
    for mistake in (dict(characters=["Foks"]), dict(stages=["Fountain of Dream"]), dict(version="3.x"), dict(min_frames=10, max_frames=9)):
        with pytest.raises(UserError): named_filter(**mistake)
    with pytest.raises(UserError, match="did you mean Fountain of Dreams"): named_filter(stages=["Fountain of Dream"])


def test_what_info_tells(replays, toy, tmp_path):
    build([replays/"odd", replays/"versions.zip", toy/"Raw"], tmp_path/"out", workers=2, progress=False)
    about, records = info(tmp_path/"out"), read_meta(tmp_path/"out")
    assert about["ranks"] == {"diamond": 2} and about["transformations"] == 1 == sum(bool(r["transforms"]) for r in records)
    assert about["ice_climbers"] == sum(bool(r["followers"]) for r in records) == about["characters"].get("Popo", 0)
    lengths = sorted(r["frames"] for r in records)
    assert about["lengths"]["shortest"] == lengths[0] and about["lengths"]["longest"] == lengths[-1] and lengths[0] < about["lengths"]["median"] < lengths[-1]
    for record in records:
        game = read_game(tmp_path/"out", record["slp_md5"], columns=("character",))
        assert record["transforms"] == [p for p in (0, 1) if len(np.unique(game["character"][:, p])) > 1]
        assert record["followers"] == [p for p in (0, 1) if game.ports[p] in game.info["followers"]]
    assert [a.get_title() for a in draw_info(tmp_path/"out").axes] == ["Characters", "Stages", "Slippi versions", "Lengths", "Ranks"]
    assert info(toy)["transformations"] is None and len(draw_info(toy).axes) == 4, "slippi-ai's records say less"
    assert "Diamond Player" not in (tmp_path/"out/meta.json").read_text()


def test_ranks_come_from_the_name_only():
    assert ranks_in("Master-Platinum-1f2e.slp") == ["master", "platinum"] and ranks_in("bronze-silver-x.slp") == ["bronze", "silver"]
    for name in ("master.slp", "master-fox-1.slp", "game-master-master-1.slp", "mastery-master-1.slp", ""): assert ranks_in(name) == []
    assert record_of(wander(0), "0"*32, 1, 1, "gold-master-9.slp")["name"] == f"{'0'*32}.slp"


def resident(pid: int) -> int:
    "Anonymous memory of a process in MB, 0 when it is gone."
    try: found = re.search(r"RssAnon:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
    except OSError: return 0
    return int(found[1])//1024 if found else 0


def children(pid: int) -> list[int]:
    try: return [int(child) for task in Path(f"/proc/{pid}/task").iterdir() for child in (task/"children").read_text().split()]
    except OSError: return []


def peak_memory(inputs: list[Path], output: Path, min_frames: int = 1500) -> tuple[int, int]:
    "The most anonymous memory that a build's main process, and any of its two workers, ever had, in MB."
    process = spawn(inputs, output, min_frames)
    builder = worker = 0
    while process.poll() is None:
        builder, worker = max(builder, resident(process.pid)), max([worker, *map(resident, children(process.pid))])
        time.sleep(0.01)
    assert process.returncode == 0, process.stderr.read()
    return builder, worker


def test_memory_does_not_grow_with_the_archive(tmp_path):
    "Members are taken one at a time: six times as many replays need no more memory."
    long = write_slp(wander(0, frames=9000), tmp_path/"long.slp").read_bytes()
    assert len(long) > 2.5e6
    for count in (4, 24):
        with py7zr.SevenZipFile(tmp_path/f"{count}.7z", "w", filters=[{"id": py7zr.FILTER_LZMA2, "preset": 0}]) as z:
            for i in range(count): z.writestr(long[:40000] + bytes([i]) + long[40001:], f"{i}.slp")
    (few, _), (many, _) = (peak_memory([tmp_path/f"{count}.7z"], tmp_path/f"out {count}", min_frames=10**6) for count in (4, 24))   # read and refused: quick
    assert many < few + 30 and many < 120, (few, many)


def test_few_replays_wait_on_the_disk(tmp_path, matches):
    "However many members of an archive are bad, only a handful of good ones are unpacked ahead."
    with zipfile.ZipFile(tmp_path/"a.zip", "w") as z:
        for i in range(30): z.writestr(f"../{i}.slp", b"")
        for i, data in enumerate(matches): z.writestr(f"{i}.slp", data)
    (tmp_path/"work").mkdir()
    waiting, asked = [], []
    for piece in build_module._pieces([tmp_path/"a.zip"], tmp_path/"work", asked.append, ahead=3):
        waiting.append(len(list((tmp_path/"work").iterdir())))
        if piece.replay: assert piece.found.data is None; piece.replay.unlink()
    assert len(waiting) == 38 and len(asked) == 8 and max(waiting) <= 4


def test_memory_of_a_real_archive(replays, tmp_path):
    "45 games, 142 MB unpacked, in an archive whose own dictionary takes 64 MB."
    builder, worker = peak_memory([replays/"bracket.7z"], tmp_path/"out")
    print(f"peak anonymous memory: builder {builder} MB, worker {worker} MB")
    assert 40 < builder < 260 and 10 < worker < 200


def test_mistakes_are_one_line(tmp_path, heap, toy):
    def fails(inputs, output, match):
        with pytest.raises(UserError, match=match) as caught: build(inputs, output, progress=False)
        assert "\n" not in str(caught.value)
    (tmp_path/"empty").mkdir()
    fails([tmp_path/"empty"], tmp_path/"out", "no replays found")
    assert not (tmp_path/"out").exists()
    fails([tmp_path/"nowhere"], tmp_path/"out", "no such file")
    fails([heap/"deep/notes.txt"], tmp_path/"out", "not a replay")
    fails([heap], heap/"deep", "holds something else")
    fails([heap], heap/"one.slp"/"out", "cannot be written")
    fails([heap], heap/"one.slp", "cannot be written")
    shutil.copytree(toy, tmp_path/"theirs", copy_function=shutil.copy)
    for path in [tmp_path/"theirs", *(tmp_path/"theirs").rglob("*")]: path.chmod(0o755)
    fails([heap], tmp_path/"theirs", "made by another program")
    with build_module._opened(tmp_path/"locked"): fails([heap], tmp_path/"locked", "another build")


def test_full_disk(heap, tmp_path, matches, monkeypatch):
    def no_space(*_): raise OSError(28, "No space left on device")
    (tmp_path/"game.slp").write_bytes(matches[0]); (tmp_path/"direct/games").mkdir(parents=True)
    with monkeypatch.context() as m:
        m.setattr(core.os, "fsync", no_space)
        with pytest.raises(UserError, match="disk is full"): parse_replay(str(tmp_path/"game.slp"), "0"*32, 1, str(tmp_path/"direct"))
        assert not list((tmp_path/"direct/games").iterdir())
    with monkeypatch.context() as m:
        m.setattr(build_module._Dataset, "add", no_space)
        with pytest.raises(UserError, match="disk is full"): build([heap], tmp_path/"out", progress=False)
    build([heap], tmp_path/"out", progress=False); build([heap], tmp_path/"whole", progress=False)
    assert digest(tmp_path/"out") == digest(tmp_path/"whole")


def test_files_are_found_once_and_in_order(heap):
    names = [p.name for p in find_files([heap, heap/"deep", heap/"one.slp"])]
    assert names == [p.name for p in find_files([heap/"one.slp", heap])] and len(names) == len(set(names)) == 11


def test_records_are_json_that_others_can_read(heap, tmp_path):
    build([heap], tmp_path/"out", progress=False)
    records = json.loads((tmp_path/"out/meta.json").read_text())
    assert [r["slp_md5"] for r in records] == sorted(r["slp_md5"] for r in records) and all(r["synthetic"] for r in records)
    assert to_struct(wander(0)).type.names[:6] == list(SLIPPI_AI)
