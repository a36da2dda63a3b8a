"""What the team already has: its encoded `.pt` files as shards, parsed folders as they are, its checkpoints number for number or refused."""
import io
import json
import math
import os
import pickle
import signal
import subprocess
import sys
import time
import zipfile
import zlib
from pathlib import Path
import numpy as np
import peppi_py
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from melee_wm import predecessor
from melee_wm.batches import batches, load
from melee_wm.build import build
from melee_wm.checkpoint import load_model
from melee_wm.config import load_config
from melee_wm.core import UserError
from melee_wm.encoding import columns_of, controls_of, encode_game, layout_of, next_controls, take
from melee_wm.frame import Game
from melee_wm.mamba2 import parameter_count
from melee_wm.old_checkpoints import import_checkpoint, read_old
from melee_wm.parsed import read_game
from melee_wm.practice import write_practice
from melee_wm.predecessor import import_encoded, played
from melee_wm.repair import repeated
from melee_wm.shards import encode_dataset, load_shard_games, open_shards, read_index
from melee_wm.slp import read_slp
from melee_wm.world import World, replayed_controls, seed_windows

EMBEDDED, PLAIN = load_config("mamba2-1a"), load_config("baseline-v22")


def encoded(game: Game, *, embed=True, parser="physical", hitstun=False, projectiles=False, flags=False, stage=0) -> tuple[np.ndarray, np.ndarray]:
    "A game in the predecessor's layout, written out by hand: (T, F) float32 and (T, I) int64. Its parsers: `physical` (the first) and `processed`."
    blocks, ids, T = [], [], len(game)
    for p in (0, 1):
        c = {name: values[:, p] for name, values in game.columns.items()}
        first = parser == "physical"
        block = [(np.floor(c["percent"]) if first else c["percent"])*0.01, c["x"]*0.05, c["y"]*0.05, c["shield"]*0.01]
        block += [c["speed_air_x"]*0.05, c["speed_y"]*0.05, c["speed_ground_x"]*0.05, c["knockback_x"]*0.05, c["knockback_y"]*0.05]
        if not embed: block.append(c["state_age"]*0.01)
        block += [c["hitlag"]*0.1, c["stocks"].astype("float32")*0.25, c["combo_count"].astype("float32")*0.1]
        if hitstun: block.append(np.full(T, np.nan, "float32") if hitstun == "nan" else np.ones(T, "float32"))
        if projectiles: block += [np.ones(T, "float32")]*3
        block += [c["facing"], np.zeros(T) if first else c["hurtbox_state"] != 0, c["on_ground"]]
        if flags: block += [np.ones(T, "float32")]*40
        block += [c[name]/np.float32(2) + np.float32(0.5) for name in ("main_x", "main_y", "c_x", "c_y")]
        block.append(np.maximum(c["trigger_left"], c["trigger_right"]) if first else c["shoulder"])
        bits = c["buttons_physical" if first else "buttons"]
        block += [(bits >> shift) & 1 for shift in (8, 9, 10, 11, 4, 6, 5, 3)]   # A B X Y Z L R D_UP
        blocks += [np.asarray(values, "float32") for values in block]
        ground = np.where(c["ground"] == 65535, 0, c["ground"].astype("int64") + 1)
        ids += [c["action_state"], c["jumps_left"], c["character"], c["l_cancel"], c["hurtbox_state"], np.clip(ground, 0, 31), c["last_attack_landed"]]
        if embed: ids.append(np.clip(c["state_age"].astype("int64"), 0, 149))
    return np.stack(blocks, 1), np.stack([np.asarray(v, "int64") for v in (*ids, np.full(T, stage))], 1)


def write(path: Path, games, changes: dict | None = None, **kind) -> Path:
    parts = [g if isinstance(g, tuple) else encoded(g, **kind) for g in games]
    floats, ints = (torch.from_numpy(np.concatenate(part)) for part in zip(*parts))
    lengths = [len(f) for f, _ in parts]
    payload = dict(floats=floats, ints=ints, game_offsets=torch.tensor(np.cumsum([0] + lengths)), game_lengths=lengths, num_games=len(lengths),
        encoding_config={"state_age_as_embed": kind.get("embed", True), "xy_scale": 0.05, "press_events": False, "lookahead": 0, "stage_vocab": None})
    payload = {key: value for key, value in (payload | (changes or {})).items() if value is not ...}
    torch.save(payload, path)
    return path


@pytest.fixture(scope="module")
def practice(tmp_path_factory) -> list[Game]:
    return [read_slp(str(path)) for path in write_practice(tmp_path_factory.mktemp("practice"), games=2, seed=3)]


@pytest.fixture(scope="module")
def quick(replays) -> list[Game]:
    "Four real console games, on four stages."
    return [read_slp(str(path)) for path in sorted((replays/"quick").glob("*.slp"))]


def same_fields(imported, game: Game, layout, apart: tuple[str, ...]):
    "Every field of an imported game against our own encoding, to the last bit, but for those `apart`."
    ours = encode_game(game, layout)
    assert torch.equal(imported.stage, ours.stage)
    for i, name in enumerate(layout.float_fields):
        assert name in apart or torch.equal(imported.floats[..., i], ours.floats[..., i]), name
    for i, name in enumerate(layout.int_fields):
        assert name in apart or torch.equal(imported.ints[..., i], ours.ints[..., i].long()), name


@pytest.mark.parametrize("kind", [dict(), dict(parser="processed"), dict(embed=False, parser="processed"), dict(hitstun="nan", projectiles=True, flags=True)], ids=["2.2+1a", "second parser", "2.2", "their v3"])
def test_every_field_of_real_games(quick, tmp_path, kind):
    experiment = EMBEDDED if kind.get("embed", True) else PLAIN
    layout = layout_of(experiment.encoding)
    index = import_encoded(write(tmp_path/"x.pt", quick, **kind), tmp_path/"shards", experiment, progress=False)
    games = open_shards(tmp_path/"shards", layout)
    assert len(games) == 4 and index["source"]["counts"]["stage restored"] == 4 and index["refused"] == {}
    for i, record in enumerate(index["games"]):
        game = quick[record["number"]]
        same_fields(games.game(i), game, layout, ("percent",) if kind.get("parser", "physical") == "physical" else ())
        assert record["stage"] == game.stage and record["characters"] == list(game.characters) and games.md5s[i] == played(game)
        assert torch.equal(games.game(i).floats[..., 0], torch.from_numpy(encoded(game, **kind)[0])[:, [0, len(encoded(game, **kind)[0][0])//2]])   # percent: the file's
    assert index == read_index(tmp_path/"shards") and max(index["largest_snap"].values()) < 1e-6
    assert ("state_age" in index["untrusted"]) == kind.get("embed", True) and ("percent" in index["untrusted"]) == (kind.get("parser") != "processed")
    assert ("invulnerable" in index["untrusted"]) == (kind.get("parser") != "processed") and {"md5s", "stage", "ports", "version", "players"} <= set(index["untrusted"])
    assert ("left_out" in index["source"]) and bool(index["source"]["left_out"]) == bool(kind.get("flags"))


def test_practice_games_train_like_any_other(practice, tmp_path):
    "Without real replays too: a file, shards, batches; and the game that was kept out stays out."
    path, layout = write(tmp_path/"x.pt", [*practice, practice[0]]), layout_of(EMBEDDED.encoding)
    index = import_encoded(path, tmp_path/"shards", progress=False)
    assert index["experiment"] == "mamba2-1a" and index["refused"] == {"duplicate": 1} and len(index["games"]) == 2
    games = open_shards(tmp_path/"shards", layout, exclude=[played(practice[0])])
    assert list(games.md5s) == [played(practice[1])]
    same_fields(games.game(0), practice[1], layout, ("percent",))
    batch = next(batches(games, 10, 64, seed=1))
    assert batch.frames.floats.shape == (64, 10, 2, 28) and batch.controls.shape == (64, 1, 26) and batch.frames.floats.isfinite().all()
    md5, game = next(load_shard_games(tmp_path/"shards"))
    assert played(game) == md5


def test_a_stage_that_is_there_and_one_that_is_not(practice, tmp_path):
    "The stage of the file where it says one; where the match begins if the two differ; 0 where nobody knows."
    def moved(game):   # half a stage to the side
        floats, ints = encoded(game)
        floats[:, [1, 29]] += 0.05*17
        return floats, ints
    cases = {"said": encoded(practice[0], stage=practice[0].stage), "wrong": encoded(practice[1], stage=3), "nowhere": moved(practice[0])}
    for name, (counts, stage) in {"said": ({}, practice[0].stage), "wrong": ({"stage corrected": 1}, practice[1].stage), "nowhere": ({"stage unknown": 1}, 0)}.items():
        index = import_encoded(write(tmp_path/f"{name}.pt", [cases[name]]), tmp_path/name, progress=False)
        assert index["games"][0]["stage"] == stage and {k: v for k, v in index["source"]["counts"].items() if k.startswith("stage") and v} == counts
        assert ("stage" in index["untrusted"]) == (name != "said")
    seed, layout = encode_game(practice[0], layout_of(EMBEDDED.encoding)), layout_of(EMBEDDED.encoding)
    assert int(open_shards(tmp_path/"nowhere", layout).game(0).stage.max()) == 0 and int(seed.stage.max()) > 0


def test_stadium_surfaces_are_named_as_lost(replays, tmp_path):
    "On Pokémon Stadium the clipping made all floors one: the class `other`, and said so."
    with zipfile.ZipFile(replays/"versions.zip") as archive:
        for name in sorted(archive.namelist()):
            (tmp_path/"one.slp").write_bytes(archive.read(name))
            try: game = read_slp(str(tmp_path/"one.slp"))
            except UserError: continue
            if game.stage == 3 and "hitlag" in game and "speed_y" in game: break
        else: pytest.fail("no game on Pokémon Stadium that has every field")
    layout = layout_of(EMBEDDED.encoding)
    index = import_encoded(write(tmp_path/"x.pt", [game]), tmp_path/"shards", progress=False)
    ground = open_shards(tmp_path/"shards", layout).game(0).ints[..., layout.int_index("ground")]
    ours = encode_game(game, layout).ints[..., layout.int_index("ground")]
    assert "ground" in index["untrusted"] and (ground == 31).float().mean() > 0.5
    assert torch.equal(ground[ground != 31] == 0, ours[ground != 31] == 0)   # what is not lost is in the air before the first landing, or a low id


def test_rows_played_twice(replays, tmp_path):
    "An online game with the rows of its rollbacks: most are recognised and dropped, and the frames that stay are the final ones."
    with zipfile.ZipFile(replays/"versions.zip") as archive:
        for name in sorted(archive.namelist()):
            (tmp_path/"one.slp").write_bytes(archive.read(name))
            try: game = read_slp(str(tmp_path/"one.slp"))
            except UserError: continue
            if "hitlag" not in game or "speed_y" not in game: continue
            ids = peppi_py.read_slippi(str(tmp_path/"one.slp")).frames.id.to_numpy()
            if len(ids) - len(game) > 300: break
        else: pytest.fail("no online game with rollbacks")
    raw = peppi_py.read_slippi(str(tmp_path/"one.slp")).frames
    def column(get): return np.stack([get(port.leader).to_numpy() for port in raw.ports], 1)
    post, velocity = lambda n: column(lambda p: getattr(p.post, n)), lambda n: column(lambda p: getattr(p.post.velocities, n))
    columns = dict(percent=post("percent"), x=column(lambda p: p.post.position.x), y=column(lambda p: p.post.position.y), shield=post("shield"), speed_air_x=velocity("self_x_air"), speed_y=velocity("self_y"),
        speed_ground_x=velocity("self_x_ground"), knockback_x=velocity("knockback_x"), knockback_y=velocity("knockback_y"), state_age=post("state_age"), hitlag=post("hitlag"), stocks=post("stocks"),
        combo_count=post("combo_count"), facing=post("direction") > 0, hurtbox_state=post("hurtbox_state"), on_ground=post("airborne") == 0, action_state=post("state"), jumps_left=post("jumps"),
        character=post("character"), l_cancel=post("l_cancel"), ground=post("ground"), last_attack_landed=post("last_attack_landed"), buttons_physical=column(lambda p: p.pre.buttons_physical),
        main_x=column(lambda p: p.pre.joystick.x), main_y=column(lambda p: p.pre.joystick.y), c_x=column(lambda p: p.pre.cstick.x), c_y=column(lambda p: p.pre.cstick.y),
        trigger_left=column(lambda p: p.pre.triggers_physical.l), trigger_right=column(lambda p: p.pre.triggers_physical.r))
    path, twice = write(tmp_path/"x.pt", [Game(game.stage, columns)]), len(ids) - len(game)
    index = import_encoded(path, tmp_path/"shards", progress=False)
    dropped = index["source"]["counts"]["repeated rows"]
    assert 0.6*twice < dropped <= 1.01*twice, (dropped, twice)
    assert "rows" in index["untrusted"] and index["frames"] == len(ids) - dropped
    gone = repeated(columns)
    replaced = np.r_[np.diff(ids) <= 0, False]
    assert (gone & ~replaced).sum() <= 0.02*gone.sum()   # rows that nothing replaced
    assert import_encoded(path, tmp_path/"all", drop_repeats=False, progress=False)["frames"] == len(ids)


def test_a_game_without_repeats_keeps_every_row(quick):
    for game in quick: assert not repeated(game.columns).any()


@pytest.mark.parametrize("absent, named", [(("speed_air_x", "speed_y", "speed_ground_x", "knockback_x", "knockback_y"), "speed_air_x"), (("hitlag",), "hitlag"), (("hurtbox_state",), "hurtbox_state"), (("combo_count",), "combo_count")])
def test_columns_that_were_zeros_for_missing(practice, tmp_path, absent, named):
    "Zeros that stand for what an old replay lacks are not believed: the game is refused for the missing column."
    game = practice[0]
    without = Game(game.stage, game.columns | {name: np.zeros_like(game[name]) for name in absent}, game.ports, game.characters)
    index = import_encoded(write(tmp_path/"x.pt", [without, practice[1]]), tmp_path/"shards", progress=False)
    assert len(index["games"]) == 1 and sum(index["refused"].values()) == 1
    (reason,) = index["refused"]
    assert reason.startswith("missing column") and named in reason


def test_the_cast_and_length_are_checked(practice, tmp_path):
    "Ice Climbers, a transformation and a short game are refused as everywhere else."
    game = practice[0]
    def with_character(change):
        character = game["character"].copy(); change(character)
        return Game(game.stage, game.columns | {"character": character})
    climbers, changed = with_character(lambda c: c[:, 0].fill(10)), with_character(lambda c: c[500:, 0].fill(7))
    short = tuple(part[:900] for part in encoded(game))
    index = import_encoded(write(tmp_path/"x.pt", [climbers, changed, short, game]), tmp_path/"shards", progress=False)
    assert sorted(reason.split(":")[0] for reason in index["refused"]) == ["ice climbers", "too_short", "transformation"]
    assert [record["number"] for record in index["games"]] == [3]


class Code:
    "Unpickled, it would write a file."
    def __init__(self, path): self.path = path
    def __reduce__(self): return os.system, (f"touch {self.path}",)


def hostile(folder: Path, game: Game) -> dict[str, Path]:
    "Files that must not get through, by what is wrong with them."
    floats, ints = encoded(game)
    T = len(floats)
    def torch_file(name, value): torch.save(value, folder/f"{name}.pt"); return folder/f"{name}.pt"
    def changed(name, **changes): return write(folder/f"{name}.pt", [(floats, ints)], changes)
    def with_value(array, row, column, value):
        array = array.copy(); array[row, column] = value
        return torch.from_numpy(array)
    good = changed("good")
    files = {"code": changed("code", encoding_config=Code(folder/"ran")), "code alone": torch_file("alone", Code(folder/"ran")), "a list": torch_file("list", [1, 2]), "a model": torch_file("model", {"weight": torch.zeros(3)}),
        "no offsets": changed("a", game_offsets=...), "offsets outside": changed("b", game_offsets=torch.tensor([0, T + 5]), game_lengths=[T + 5]), "negative length": changed("c", game_lengths=[-T]), "no games": changed("d", game_offsets=torch.tensor([0]), game_lengths=[], num_games=0),
        "offsets that jump": changed("e", game_offsets=torch.tensor([3, T])), "a length of ten to the 40": changed("f", game_lengths=[10**40]), "lengths as text": changed("g", game_lengths=["many"]), "another count": changed("h", num_games=7),
        "NaN": changed("i", floats=with_value(floats, 700, 5, np.nan)), "infinity": changed("j", floats=with_value(floats, 700, 1, np.inf)), "far away": changed("k", floats=with_value(floats, 700, 1, 1e9)), "a stick between steps": changed("l", floats=with_value(floats, 700, 15, 0.123)),
        "half a stock": changed("m", floats=with_value(floats, 700, 10, 0.1)), "an action of 9,000": changed("n", ints=with_value(ints, 700, 0, 9000)), "a negative id": changed("o", ints=with_value(ints, 700, 2, -1)), "an id beyond any": changed("p", ints=with_value(ints, 700, 0, 2**40)),
        "a bit of 3": changed("q", floats=with_value(floats, 700, 12, 3)), "two stages": changed("r", ints=with_value(ints, 700, 16, 31)), "double floats": changed("s", floats=torch.from_numpy(floats).double()), "one row short": changed("t", ints=torch.from_numpy(ints[:-1])),
        "another width": changed("u", floats=torch.from_numpy(floats[:, :55]).clone()), "flags that contradict": changed("v", encoding_config={"state_age_as_embed": False}), "a scale of nothing": changed("w", encoding_config={"xy_scale": 0.0}), "a scale of NaN": changed("x", encoding_config={"xy_scale": math.nan}),
        "a tensor of one number that says it is 224 TB": changed("y", floats=torch.zeros(1).expand(10**12, 56)), "every second row": changed("z", floats=torch.zeros(2*T, 56)[::2])}
    data = good.read_bytes()
    for name, content in {"half": data[:len(data)//2], "no end": data[:-30], "empty": b"", "a page": b"<html>moved</html>", "a bare pickle": pickle.dumps({"floats": Code(folder/"ran")})}.items():
        files[name] = folder/f"raw {name}.pt"; files[name].write_bytes(content)
    with zipfile.ZipFile(good) as old, zipfile.ZipFile(folder/"packed.pt", "w", zipfile.ZIP_DEFLATED) as new:
        for entry in old.infolist(): new.writestr(entry.filename, old.read(entry))
    with zipfile.ZipFile(good) as old, zipfile.ZipFile(folder/"claims.pt", "w") as new:   # the data of the floats is cut, the pickle says otherwise
        for entry in old.infolist(): new.writestr(entry.filename, old.read(entry)[:1000 if entry.filename.endswith("/data/0") else None])
    return files | {"compressed entries": folder/"packed.pt", "cut data": folder/"claims.pt", "no file": folder/"nowhere.pt", "a folder": folder}


def test_hostile_files_end_in_one_line_and_leave_nothing(practice, tmp_path):
    heap = tmp_path/"heap"; heap.mkdir()
    files = hostile(heap, practice[0])
    (tmp_path/"out").mkdir()
    before = sorted(heap.iterdir())
    for what, path in files.items():
        with pytest.raises(UserError) as error: import_encoded(path, tmp_path/"out"/"shards", progress=False)
        assert "\n" not in str(error.value) and len(str(error.value)) < 700, what
        assert list((tmp_path/"out").iterdir()) == [], what
    assert not (heap/"ran").exists() and sorted(heap.iterdir()) == before


def test_output_that_is_in_use_is_left_alone(practice, tmp_path):
    path = write(tmp_path/"x.pt", [practice[0]])
    (tmp_path/"full").mkdir(); (tmp_path/"full"/"thesis.txt").write_text("years of work")
    (tmp_path/"file").write_text("mine")
    for name in ("full", "file"):
        with pytest.raises(UserError, match="holds something"): import_encoded(path, tmp_path/name, progress=False)
    assert (tmp_path/"full"/"thesis.txt").read_text() == "years of work" and (tmp_path/"file").read_text() == "mine"
    (tmp_path/"empty").mkdir()
    assert import_encoded(path, tmp_path/"empty", progress=False)["games"]
    with pytest.raises(UserError, match="as an id only"): import_encoded(path, tmp_path/"never", PLAIN, progress=False)
    with pytest.raises(UserError, match="no items"): import_encoded(path, tmp_path/"never", load_config("mamba2-projectiles"), progress=False)


def test_killed_import_leaves_no_half(practice, tmp_path, monkeypatch):
    "SIGKILL while the shards are written: there is no output, and the next import is whole and the same."
    monkeypatch.setattr(predecessor, "GAMES_PER_PIECE", 2)
    path, partial = write(tmp_path/"x.pt", [practice[0], practice[1]]*12), tmp_path/".shards.partial"
    code = f"from melee_wm import predecessor as p; p.GAMES_PER_PIECE = 2; p.import_encoded({str(path)!r}, {str(tmp_path/'shards')!r}, progress=False)"
    child = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "OMP_NUM_THREADS": "1"})
    while not list(partial.glob("shard-*.arrow")) and child.poll() is None: time.sleep(.002)
    child.send_signal(signal.SIGKILL); child.wait()
    assert not (tmp_path/"shards").exists() and list(partial.glob("shard-*.arrow"))
    index = import_encoded(path, tmp_path/"shards", progress=False)
    assert len(index["games"]) == 2 and index["refused"] == {"duplicate": 22} and len(index["shards"]) == 12
    def digest(folder): return {p.name: p.read_bytes() for p in folder.glob("*") if p.name != ".lock"}
    import_encoded(path, tmp_path/"again", progress=False)
    assert digest(tmp_path/"again") == digest(tmp_path/"shards") and not partial.exists()


def test_interrupted_import_cleans_up(practice, tmp_path, monkeypatch):
    path = write(tmp_path/"x.pt", [practice[0]])
    def stop(*_): raise KeyboardInterrupt
    monkeypatch.setattr(predecessor, "write_shard", stop)
    with pytest.raises(KeyboardInterrupt): import_encoded(path, tmp_path/"shards", progress=False)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.pt"]


def test_a_file_larger_than_memory_opens(tmp_path):
    "Under a limit of memory below the file's size torch cannot map it; here it is opened, checked and read at its end."
    rows = 500_000
    torch.save(dict(floats=torch.zeros(rows, 56), ints=torch.zeros(rows, 17, dtype=torch.int64), game_offsets=torch.tensor([0, rows]), game_lengths=[rows], num_games=1, encoding_config={}), tmp_path/"big.pt")
    code = """if True:
        import re, resource, sys, torch
        from melee_wm.predecessor import read_encoded
        used = int(re.search(r"VmData:\\s+(\\d+)", open("/proc/self/status").read())[1])*1024
        resource.setrlimit(resource.RLIMIT_DATA, (used + 60_000_000,)*2)
        try: torch.load(sys.argv[1], weights_only=True, mmap=True); print("torch could")
        except RuntimeError as error: print("torch could not" if "memory" in str(error) else error)
        file = read_encoded(sys.argv[1]); print(tuple(file.floats.shape), float(file.floats[-1].sum()))"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path/"big.pt")], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.stdout.splitlines() == ["torch could not", f"({rows}, 56) 0.0"], done.stdout + done.stderr


def test_v1_reads_a_folder_that_slippi_ai_parsed(toy, tmp_path):
    "As it is: v1 has all it needs; later encodings name what is missing, in memory and in shards."
    v1 = layout_of(load_config("v1").encoding)
    games, refused = load(toy, v1, progress=False)
    assert refused == {} and len(games) == 1 and games.frames == len(read_game(toy, games.md5s[0]))
    assert encode_dataset(toy, load_config("v1"), tmp_path/"v1", progress=False)["frames"] == games.frames
    assert torch.equal(open_shards(tmp_path/"v1", v1).game(0).floats, games.game(0).floats)
    missing = "speed_air_x, speed_y, speed_ground_x, knockback_x, knockback_y, state_age, hitlag, stocks"
    for name in ("v2", "v2.1", "mamba2-1a"):
        with pytest.raises(UserError, match="no game is left") as error: load(toy, layout_of(load_config(name).encoding), progress=False)
        assert f"1 x missing columns {missing}" in str(error.value)
        with pytest.raises(UserError, match="no game is left") as error: encode_dataset(toy, load_config(name), tmp_path/name, progress=False)
        assert missing in str(error.value)


# ----- parsed folders

def struct(values: dict) -> pa.StructArray:
    "A struct of arrays, of structs where the values are dicts."
    arrays = [struct(v) if isinstance(v, dict) else pa.array(v) for v in values.values()]
    return pa.StructArray.from_arrays(arrays, names=list(values))


def team_struct(game: Game, parser="physical", stage: int | None = None, items: dict | None = None, without=()) -> pa.StructArray:
    "A game in the layout of the team's parsers, written out by hand: `physical` (their first, whole percents) and `processed`."
    T, first, players = len(game), parser == "physical", {}
    for p in (0, 1):
        c = {name: values[:, p] for name, values in game.columns.items()}
        bits, whole = c["buttons_physical" if first else "buttons"], "int64" if not first else "uint8"
        press = {n: (bits.astype("uint32") >> s) & 1 == 1 for n, s in dict(A=8, B=9, X=10, Y=11, Z=4, L=6, R=5, D_UP=3).items()}
        shoulder = np.maximum(c["trigger_left"], c["trigger_right"]) if first else c["shoulder"]
        sticks = {f"{n}_stick": {a: c[f"{n}_{a}"]/np.float32(2) + np.float32(.5) for a in "xy"} for n in ("main", "c")}
        further = {n: c[n] for n in ("speed_air_x", "speed_y", "speed_ground_x")} | {"speed_attack_x": c["knockback_x"], "speed_attack_y": c["knockback_y"], "state_age": c["state_age"], "hitlag": c["hitlag"],
            "stocks": c["stocks"].astype("uint8" if first else "float32")} | {n: c[n].astype("int64" if n == "ground" else whole) for n in ("l_cancel", "hurtbox_state", "ground", "last_attack_landed", "combo_count")} \
            | {f"state_flags_{i}": c[f"state_flags_{i + 1}"] for i in range(5)} | {"hitstun_remaining": np.ones(T, "float32")}
        players[f"p{p}"] = {"percent": np.floor(c["percent"]).astype("uint16") if first else c["percent"], "x": c["x"], "y": c["y"], "shield_strength": c["shield"], "facing": c["facing"] if first else c["facing"].astype("float32"),
            "invulnerable": np.zeros(T, bool) if first else c["hurtbox_state"] != 0, "on_ground": c["on_ground"], "action": c["action_state"].astype("int64"), "jumps_left": c["jumps_left"].astype("int64"), "character": c["character"].astype("int64"),
            "controller": {**sticks, "shoulder": shoulder, "buttons": press}} | {n: v for n, v in further.items() if n not in without}
    z = np.zeros(T, "float32")
    slots = {f"item_{i}": {"exists": np.zeros(T, bool), "type": np.zeros(T, "uint16"), "state": np.zeros(T, "uint8"), "x": z, "y": z} for i in range(15)} | (items or {})
    return struct({**players, "stage": np.full(T, game.stage if stage is None else stage, "int64"), "randall": {"x": z, "y": z}, "fod_platforms": {"left": z, "right": z}, "items": slots})


def team_folder(folder: Path, structs: list[pa.StructArray], parser="physical") -> Path:
    "A folder as the team's programs left it; the games are called 0, 1, 2, ..."
    (folder/"games").mkdir(parents=True)
    for i, root in enumerate(structs):
        sink = io.BytesIO(); pq.write_table(pa.table({"root": root}), sink); (folder/"games"/f"{i:032x}").write_bytes(zlib.compress(sink.getvalue()))
    about = dict(name="x.slp", lastFrame=1, num_players=2, valid=True) if parser == "physical" else dict(source_file="x.slp.gz", num_frames=1)
    (folder/"meta.json").write_text(json.dumps([about | dict(slp_md5=f"{i:032x}", stage=root.field("stage")[0].as_py(), is_training=True, compression="zlib") for i, root in enumerate(structs)]))
    return folder


@pytest.mark.parametrize("parser", ["physical", "processed"])
@pytest.mark.parametrize("source", ["quick", "practice"])
def test_the_teams_parsed_folder_loads_as_it_is(request, tmp_path, source, parser):
    "Every field of v2.1 and of mamba2-1a equals the replay's to the last bit, but for percents that were cut to whole ones; in memory and in shards."
    originals = request.getfixturevalue(source)
    folder, apart = team_folder(tmp_path/"team", [team_struct(game, parser) for game in originals], parser), ("percent",) if parser == "physical" else ()
    for name in ("v1", "v2", "v2.1", "mamba2-1a"):
        games, refused = load(folder, layout_of(load_config(name).encoding), progress=False)
        assert refused == {} and len(games) == len(originals)
        for i, game in enumerate(originals): same_fields(games.game(i), game, games.layout, apart)
    assert encode_dataset(folder, EMBEDDED, tmp_path/"shards", progress=False)["refused"] == {}
    shards = open_shards(tmp_path/"shards", layout_of(EMBEDDED.encoding))
    for i, game in enumerate(originals): same_fields(shards.game(i), game, shards.layout, apart)
    for i, game in enumerate(originals):
        back = read_game(folder, f"{i:032x}")
        assert (back.stage, back.characters, back.info, back.items) == (game.stage, game.characters, {"source": "predecessor"}, None)
        assert all(np.array_equal(back[f"state_flags_{n}"], game[f"state_flags_{n}"]) for n in range(1, 6)) and "hitstun" not in back


def test_stages_of_the_teams_games(practice, tmp_path):
    "Slippi's id is not taken for libmelee's; where the match begins decides, and where nobody can tell, what the file says."
    here, aside = practice[0], Game(practice[0].stage, practice[0].columns | {"x": practice[0]["x"] + np.float32(5)})
    cases = [(here, None, here.stage), (here, 0, here.stage), (aside, 8, 8), (aside, 2, 2), (aside, 0, 0)]
    folder = team_folder(tmp_path/"team", [team_struct(game, stage=said) for game, said, _ in cases])
    assert [read_game(folder, f"{i:032x}").stage for i in range(len(cases))] == [stage for *_, stage in cases]


def test_the_teams_rows_played_twice_and_their_items(practice, tmp_path):
    "Rows that a rollback replaced go, and each item stays with its frame: here its x is the first player's."
    game, T = practice[0], len(practice[0])
    alive = np.arange(T) % 50 < 20
    item = {"exists": alive, "type": np.full(T, 54, "uint16"), "state": np.ones(T, "uint8"), "x": game["x"][:, 0].copy(), "y": np.arange(T, dtype="float32")}
    twice = np.sort(np.r_[np.arange(T), np.arange(200, 1200, 9)])
    folder = team_folder(tmp_path/"team", [team_struct(game, items={"item_3": item}).take(pa.array(twice))])
    back = read_game(folder, f"{0:032x}")
    dropped = len(twice) - len(back)
    assert .5*(len(twice) - T) < dropped <= len(twice) - T + 2
    frame = back.items["frame"]
    assert frame.dtype == np.int32 and (np.diff(frame) > 0).all() and frame[-1] < len(back)
    assert np.array_equal(back.items["x"], back["x"][frame, 0]) and set(back.items["type"].tolist()) == {54}
    assert abs(len(frame) - alive.sum()) < .2*len(twice)
    kept = np.unique(back.items["y"]).astype(int)
    assert len(kept) >= alive.sum() - 2   # nobody's item is lost with the repeats


def test_what_the_teams_games_lack_is_named(practice, tmp_path):
    "Zeros for what a replay lacked are not believed, and a folder from before v2.1 trains what it can."
    game = practice[0]
    zeros = Game(game.stage, game.columns | {name: np.zeros_like(game[name]) for name in ("hitlag", *(f"state_flags_{i}" for i in range(1, 6)))})
    early = ("l_cancel", "hurtbox_state", "ground", "last_attack_landed", "combo_count", *(f"state_flags_{i}" for i in range(5)), "hitstun_remaining")
    folder = team_folder(tmp_path/"team", [team_struct(zeros), team_struct(game, "processed", without=early)])
    lacking, old = (read_game(folder, f"{i:032x}") for i in (0, 1))
    assert {"hitlag", "state_flags_1", "state_flags_5"}.isdisjoint(lacking.columns) and "ground" in lacking
    assert {"hitlag", "speed_y", "stocks", "hurtbox_state"} <= set(old.columns) and set(early[:1] + early[2:]).isdisjoint(old.columns)
    with pytest.raises(UserError, match="missing column.*hitlag.*got one parsed by predecessor"): lacking["hitlag"]
    with pytest.raises(UserError, match="no game is left") as error: load(folder, layout_of(load_config("v2.1").encoding), progress=False)
    assert "hitlag" in str(error.value) and "l_cancel" in str(error.value)


def test_a_build_leaves_the_teams_folder_alone(practice, practice_slp, tmp_path):
    folder = team_folder(tmp_path/"team", [team_struct(practice[0])])
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match="made by another program"): build([practice_slp], folder, progress=False)
    assert all(path.read_bytes() == content for path, content in before.items())


# ----- checkpoints

VOCAB = dict(action=(400, 32), jumps=(8, 4), character=(33, 8), stage=(33, 4), l_cancel=(3, 2), hurtbox=(3, 2), ground=(32, 4), last_attack=(64, 8))
IDS = ("action", "jumps", "character", "l_cancel", "hurtbox", "ground", "last_attack")
CORE = dict(continuous=8, binary=6), dict(action=400, jumps=8)
ALL = dict(continuous=8, binary=6, velocity=10, dynamics=6), dict(action=400, jumps=8, l_cancel=3, hurtbox=3, ground=32, last_attack=64)


def old_network(arch, embed=True, press=False, heads=ALL, d=64, layers=2, headdim=32, d_state=16, K=10, seed=0) -> dict[str, torch.Tensor]:
    "Random weights under the predecessor's names, in the order of its modules."
    g = torch.Generator().manual_seed(seed)
    vocab, F = VOCAB | ({"state_age": (150, 8)} if embed else {}), 28 if embed else 29
    frame, controls = 2*(F + sum(w for n, (_, w) in vocab.items() if n != "stage")) + 4, 42 if press else 26
    shapes = {f"{n}_embed.weight": s for n, s in vocab.items()}
    def linear(n, a, b): return {f"{n}.weight": (a, b), f"{n}.bias": (a,)}
    if arch == "mlp": shapes |= linear("trunk.0", 96, K*frame + controls) | linear("trunk.3", d, 96)
    else:
        inner, H = 2*d, 2*d//headdim
        shapes |= linear("frame_proj", d, frame)
        for i in range(layers):
            m = f"layers.{i}.mamba."
            shapes |= {m + "dt_bias": (H,), m + "A_log": (H,), m + "D": (H,), m + "in_proj.weight": (2*inner + 2*d_state + H, d), m + "conv1d.weight": (inner + 2*d_state, 1, 4), m + "conv1d.bias": (inner + 2*d_state,),
                m + "norm.weight": (inner,), m + "out_proj.weight": (d, inner), f"layers.{i}.norm.weight": (d,)}
        shapes |= {"final_norm.weight": (d,)} | linear("ctrl_proj", d, controls)
    for n, w in heads[0].items(): shapes |= linear(f"{n}_head", w, d)
    for n, w in heads[1].items(): shapes |= linear(f"p0_{n}_head", w, d) | linear(f"p1_{n}_head", w, d)
    return {n: torch.randn(s, generator=g)*(1. if "embed" in n else 1/math.sqrt(s[-1])) for n, s in shapes.items()}


def old_forward(w, floats, ids, controls, embed):
    "The predecessor's network by its own rules: floats (B, K, F), ids (B, K, I) and the next controls (B, C), in its layout."
    names, n = (*IDS, *["state_age"]*embed), 7 + embed
    x = torch.cat([floats, *(w[f"{name}_embed.weight"][ids[..., p*n + i]] for p in (0, 1) for i, name in enumerate(names)), w["stage_embed.weight"][ids[..., -1]]], -1)
    def rms(x, weight): return x*torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)*weight
    if "trunk.0.weight" in w:
        x = torch.cat([x.flatten(1), controls], -1)
        for i in (0, 3): x = torch.relu(x @ w[f"trunk.{i}.weight"].T + w[f"trunk.{i}.bias"])
    else:
        x = x @ w["frame_proj.weight"].T + w["frame_proj.bias"]
        for i in range(sum(name.endswith("A_log") for name in w)):
            b = {name.removeprefix(f"layers.{i}.mamba."): v for name, v in w.items() if name.startswith(f"layers.{i}.mamba.")}
            inner, H = b["out_proj.weight"].shape[1], len(b["A_log"])
            N = (len(b["conv1d.bias"]) - inner)//2
            z, u, dt = (rms(x, w[f"layers.{i}.norm.weight"]) @ b["in_proj.weight"].T).split([inner, inner + 2*N, H], -1)
            padded = torch.nn.functional.pad(u, (0, 0, 3, 0))
            u = torch.nn.functional.silu(sum(padded[:, k:k + u.shape[1]]*b["conv1d.weight"][:, 0, k] for k in range(4)) + b["conv1d.bias"])
            v, B, C = u.split([inner, N, N], -1)
            v, dt, A, h, out = v.unflatten(-1, (H, -1)), torch.nn.functional.softplus(dt + b["dt_bias"]), -b["A_log"].exp(), 0, []
            for t in range(v.shape[1]):
                h = h*torch.exp(dt[:, t]*A)[..., None, None] + (dt[:, t, :, None]*v[:, t])[..., None]*B[:, t, None, None]
                out.append((h*C[:, t, None, None]).sum(-1) + b["D"][:, None]*v[:, t])
            x = x + rms(torch.stack(out, 1).flatten(2)*torch.nn.functional.silu(z), b["norm.weight"]) @ b["out_proj.weight"].T
        x = rms(x[:, -1], w["final_norm.weight"]) + controls @ w["ctrl_proj.weight"].T + w["ctrl_proj.bias"]
    return {name.removesuffix("_head.weight"): x @ w[name].T + w[name.replace(".weight", ".bias")] for name in w if name.endswith("_head.weight")}


def old_checkpoint(path: Path, weights, stages=(0,), dead=(13, ), embed=True, press=False, **changes) -> Path:
    "A checkpoint as the predecessor's trainer writes it; `dead` are float columns of a player that were always 0."
    moments = {n: torch.ones_like(w) for n, w in weights.items()}
    moments["stage_embed.weight"][[i for i in range(33) if i not in stages]] = 0
    first, F = ("trunk.0.weight" if "trunk.0.weight" in weights else "frame_proj.weight"), 28 if embed else 29
    frame = 2*(F + 60 + 8*embed) + 4
    for k in range(moments[first].shape[1]//frame):
        for column in dead: moments[first][:, [k*frame + column, k*frame + F + column]] = 0
    state = {i: {"step": torch.tensor(5.), "exp_avg": torch.zeros_like(m), "exp_avg_sq": m} for i, m in enumerate(moments.values())}
    said = {"xy_scale": .05, "action_vocab": 400, "state_age_as_embed": embed, "press_events": press, "lookahead": 0, "projectiles": False, "state_flags": False, "hitstun": False, "hitstun_scale": .02}
    torch.save({"epoch": 4, "model_state_dict": weights, "optimizer_state_dict": {"state": state, "param_groups": [{"lr": .1, "betas": (.9, .999), "params": list(range(len(state)))}]}, "val_loss": .25, "encoding_config": said, "context_len": 10} | changes, path)
    return path


@pytest.mark.parametrize("arch, embed, press, true_stages", [("mlp", True, False, False), ("mlp", False, True, True), ("mamba2", True, False, False), ("mamba2", True, True, True), ("mamba2", False, False, False)])
def test_an_old_checkpoint_predicts_the_same_numbers(practice, tmp_path, arch, embed, press, true_stages):
    "The old network on the old tensors, ours on ours: the same predictions for the same match."
    game, weights = practice[0], old_network(arch, embed, press, seed=4)
    stages = (game.stage, 3) if true_stages else (0,)
    dead = 13 if embed else 14   # invulnerable, after 12 or 13 continuous columns and facing
    path = old_checkpoint(tmp_path/"old.pt", weights, stages, () if true_stages else (dead,), embed, press)
    description = import_checkpoint(path, tmp_path/"model")
    model = load_model(tmp_path/"model")
    assert sum(w.numel() for w in weights.values()) == parameter_count(model.config) and model.missing_heads == [] and description["epoch"] == 5
    floats, ids = encoded(game, embed=embed, parser="processed", stage=game.stage if true_stages else 0)
    F = floats.shape[1]//2
    if not true_stages: floats[:, [dead, F + dead]] = 0
    starts = torch.arange(0, len(game) - 11, 97)
    windows = starts[:, None] + torch.arange(11)
    f, i = torch.from_numpy(floats)[windows], torch.from_numpy(ids)[windows]
    controls = torch.cat([f[:, 10, F - 13:F], f[:, 10, -13:]], -1)
    if press: controls = torch.cat([controls] + [((f[:, 10, a:a + 8] > .5) & (f[:, 9, a:a + 8] < .5)).float() for a in (F - 8, 2*F - 8)], -1)
    theirs = old_forward(weights, f[:, :10], i[:, :10], controls, embed)
    frames = take(encode_game(game, model.layout), windows)
    told = next_controls(controls_of(frames, model.layout)[:, 10:], model.layout, controls_of(frames, model.layout)[:, 9])
    with torch.inference_mode(): ours = model(take(frames, (slice(None), slice(10))), told)
    assert set(ours) == {*ALL[0], *ALL[1]}
    for name, value in ours.items():
        old = theirs[name].unflatten(-1, (2, -1)) if name in ALL[0] else torch.stack([theirs[f"p0_{name}"], theirs[f"p1_{name}"]], 1)
        torch.testing.assert_close(value[:, 0], old, atol=3e-5, rtol=3e-5)
        assert old.std() > .05, name
    assert ("only" in description["predecessor"]["stage"]) != true_stages and ("inputs" in description["predecessor"]) != true_stages


def test_an_old_checkpoint_plays(practice, tmp_path):
    "It seeds a world and steps, with the fields that it has no heads for carried on."
    import_checkpoint(old_checkpoint(tmp_path/"old.pt", old_network("mamba2", heads=CORE)), tmp_path/"model")
    model = load_model(tmp_path/"model")
    assert model.config.model.heads == ("core",) and not model.config.model.integrate_positions
    columns, starts = columns_of(practice[0], model.layout), np.array([300, 900])
    world = World(model)
    world.reset(seed_windows(columns, starts, 10), torch.full((2,), practice[0].stage))
    frames = world.run(replayed_controls(columns, starts, 5))
    assert all(v.isfinite().all() for v in frames.values() if v.is_floating_point()) and "hitlag" in world.roles["carried"]


def test_counts_are_the_records(tmp_path):
    "The sizes of the team's own models: what is read has their numbers of parameters."
    for (kind, said) in ((dict(d=256, layers=2, headdim=64, d_state=64), 1_206_578), (dict(d=384, layers=4, headdim=64, d_state=64), 4_282_386)):
        weights = old_network("mamba2", **kind)
        assert sum(w.numel() for w in weights.values()) == said == parameter_count(read_old(old_checkpoint(tmp_path/"x.pt", weights)).config)


def test_checkpoints_that_would_mislead_are_refused_by_name(tmp_path):
    weights = old_network("mlp", seed=1)
    said = {"state_age_as_embed": True, "press_events": False}
    def moved(name, value): return weights | {name: value}
    one = old_checkpoint(tmp_path/"one.pt", weights)
    optimizer = torch.load(one, weights_only=True)["optimizer_state_dict"]
    optimizer["state"].pop(3)
    cases = {"lookahead: it predicts the second frame": dict(encoding_config=said | {"lookahead": 1}), "projectiles: it sees the nearest item": dict(encoding_config=said | {"projectiles": True, "hitstun": True}),
        "xy_scale is 0.1, ours is 0.05": dict(encoding_config=said | {"xy_scale": .1}), "mirror_x: True, which we do not know": dict(encoding_config=said | {"mirror_x": True}), "ctrl_threshold_features": dict(encoding_config=said | {"ctrl_threshold_features": True}),
        "before the predecessor's v2.2": dict(encoding_config=..., config={"context_len": 10}), "without AdamW's state": dict(optimizer_state_dict=optimizer), "no row of the stage embedding": dict(optimizer_state_dict={"state": {i: {"exp_avg_sq": torch.zeros_like(w)} for i, w in enumerate(weights.values())}}),
        "policy_head.weight": dict(model_state_dict=moved("policy_head.weight", torch.zeros(3))), "not finite": dict(model_state_dict=moved("trunk.3.bias", torch.full((64,), torch.nan))), "no network that we know": dict(model_state_dict={"encoder.weight": torch.zeros(3)}),
        "expected (96, 1790), got (96, 1986)": dict(context_len=9), "model_state_dict and encoding_config": dict(model_state_dict=[1, 2])}
    for what, change in cases.items():
        path = tmp_path/"bad.pt"
        values = torch.load(one, weights_only=True) | change
        torch.save({key: value for key, value in values.items() if value is not ...}, path)
        with pytest.raises(UserError) as error: import_checkpoint(path, tmp_path/"never")
        assert what in str(error.value) and "\n" not in str(error.value), (what, str(error.value))
    with pytest.raises(UserError, match="weights of another model.*character"): read_old(old_checkpoint(tmp_path/"wide.pt", moved("character_embed.weight", torch.zeros(33, 16))))
    with pytest.raises(UserError, match="lookahead.*projectiles"): read_old(old_checkpoint(tmp_path/"both.pt", weights, encoding_config=said | {"lookahead": 1, "projectiles": True}))
    torch.save({"model_state_dict": Code(tmp_path/"ran")}, tmp_path/"code.pt")
    with pytest.raises(UserError, match="not a file of tensors"): read_old(tmp_path/"code.pt")
    assert not (tmp_path/"never").exists() and not (tmp_path/"ran").exists()
    import_checkpoint(one, tmp_path/"here")
    with pytest.raises(UserError, match="there is a checkpoint already"): import_checkpoint(one, tmp_path/"here")
