"""The parsed dataset: exactness, slippi-ai's layout, and builds under every kind of bad luck."""
import csv, gzip, hashlib, io, json, os, random, shutil, signal, subprocess, sys, time, zipfile, zlib
from pathlib import Path
import numpy as np
import py7zr
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings, strategies as st
from melee_wm import build as build_module, core
from melee_wm.build import build, find_files, info, replays_in, summary
from melee_wm.core import UserError
from melee_wm.frame import COLUMNS, ITEM_COLUMNS, STAGE_EVENTS, Game
from melee_wm.parsed import (SLIPPI_AI, content_hash, fingerprint, item_slots, load_games, parse_replay, read_game, read_meta, to_struct, write_game)
from melee_wm.slp import read_slp, write_slp

TOY = "6827921534249607dafa57e9a67f8df4"


def bits(game: Game):
    "Everything a game holds, down to the last bit."
    def table(t): return t and {k: (str(v.dtype), v.shape, v.tobytes()) for k, v in t.items()}
    events = game.stage_events and {k: table(t) for k, t in game.stage_events.items()}
    return game.stage, game.ports, game.characters, game.version, game.info, table(game.columns), table(game.items), events


def digest(folder: Path) -> dict:
    return {str(p.relative_to(folder)): hashlib.md5(p.read_bytes()).hexdigest() for p in [*(folder/"games").iterdir(), folder/"meta.json"]}


def accounted(result: dict) -> int:
    return result["games_added"] + result["games_skipped"] + result["duplicates"] + sum(result["refused"].values()) + len(result["quarantined"])


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


EXPECTED = dict(found=16, games_added=6, games_skipped=0, duplicates=2, refused={"too_short": 1})


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
    assert len(result["quarantined"]) == 7 and "outside the archive" in reasons["escape.slp"] and "inside an archive" in reasons["inner.zip"]
    assert {"page.slp", "empty.slp", "cut.slp", "cut.slp.gz"} <= set(reasons)
    assert sorted(p.name for p in (tmp_path/"out").iterdir()) == [".lock", "games", "meta.json"]
    assert not list(tmp_path.rglob("escape*")) and not Path("/etc/escape.slp").exists()
    again = build([heap], tmp_path/"out", workers=workers, progress=False)
    assert (again["games_added"], again["games_skipped"], again["duplicates"], accounted(again)) == (0, 6, 2, 16)
    assert summary(again).startswith("16 replays found")
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


def spawn(inputs: list[Path], output: Path, **environment) -> subprocess.Popen:
    program = f"from melee_wm.build import build; build({[str(p) for p in inputs]!r}, {str(output)!r}, workers=2, progress=False)"
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


def check_kills(inputs, tmp_path, when):
    build(inputs, tmp_path/"whole", workers=2, progress=False)
    token = f"token-{os.getpid()}-{time.time_ns()}"
    for count in when:
        process = spawn(inputs, tmp_path/"killed", MELEE_WM_TEST=token)
        wait_for_games(process, tmp_path/"killed", count)
        assert process.poll() is None, "it was meant to be killed half-way"
        process.send_signal(signal.SIGKILL); process.wait()
        (tmp_path/"killed/games"/f".{'0'*32}.1.tmp").write_bytes(b"half a ga")   # what a kill inside a write leaves behind
        with open(tmp_path/"killed/journal.jsonl", "a") as f: f.write('{"slp_md5": "01234')
        until = time.time() + 10
        while processes_with(token) and time.time() < until: time.sleep(0.05)
        assert not processes_with(token), "workers outlived their builder"
    result = build(inputs, tmp_path/"killed", workers=2, progress=False)
    assert result["games_skipped"] >= when[-1] - 3 and accounted(result) == result["found"]
    assert digest(tmp_path/"killed") == digest(tmp_path/"whole")
    assert sorted(p.name for p in (tmp_path/"killed").iterdir()) == sorted(p.name for p in (tmp_path/"whole").iterdir()) == [".lock", "games", "meta.json"]


def test_killed_and_run_again_synthetic(heap, tmp_path):
    check_kills([heap], tmp_path, (1, 3))


def test_killed_and_run_again_real(replays, tmp_path):
    check_kills([replays/name for name in ("quick", "odd", "bad", "versions.zip")], tmp_path, (1, 8, 20))


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
import os, time, melee_wm.parsed as parsed
honest = parsed.parse_replay
def parse_replay(**task):
    if task["md5"] == {killer!r}: os.abort()
    if task["md5"] == {sleeper!r}: time.sleep(60)
    return honest(**task)
parsed.parse_replay = parse_replay
parsed.serve()"""
    monkeypatch.setattr(build_module.Worker, "command", [sys.executable, "-c", program])
    monkeypatch.setattr(build_module.Worker.ask, "__defaults__", (2,))
    result = build([heap], tmp_path/"out", workers=2, progress=False)
    reasons = {Path(q["path"]).name: q["reason"] for q in result["quarantined"]}
    assert "process died (signal 6)" in reasons["3.slp"] and "stuck for 2 s" in reasons["three.slp"]
    assert result["games_added"] == 4 and accounted(result) == 16
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


def test_mutated_replays_never_stop_a_build(practice_slp, tmp_path):
    data, rng, folder = practice_slp.read_bytes(), random.Random(1), tmp_path/"mutants"
    folder.mkdir()
    for i in range(60):
        mutant = bytearray(data)
        where = rng.choice((1000, 20000, len(data)))
        for _ in range(rng.choice((1, 5, 50))): mutant[rng.randrange(where)] = rng.randrange(256)
        (folder/f"{i:02d}.slp").write_bytes(mutant[:rng.choice((len(mutant), len(mutant), rng.randrange(len(mutant))))])
    result = build([folder], tmp_path/"out", workers=2, progress=False)
    assert result["found"] == accounted(result) == 60
    assert not [q for q in result["quarantined"] if "defect" in q["reason"]]
    for _, game in load_games(tmp_path/"out"): assert np.isfinite(game["x"]).all()


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
    assert names == [p.name for p in find_files([heap/"one.slp", heap])] and len(names) == len(set(names)) == 9


def test_records_are_json_that_others_can_read(heap, tmp_path):
    build([heap], tmp_path/"out", progress=False)
    records = json.loads((tmp_path/"out/meta.json").read_text())
    assert [r["slp_md5"] for r in records] == sorted(r["slp_md5"] for r in records) and all(r["synthetic"] for r in records)
    assert to_struct(wander(0)).type.names[:6] == list(SLIPPI_AI)
