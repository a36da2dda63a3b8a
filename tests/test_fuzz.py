"""Damaged replays through the real build: no crash, no hang, every outcome has a class, and the dataset can be read afterwards.

A short seeded sample by default; in full: python -m pytest tests/test_fuzz.py --mutations 1000 -s"""
import gzip, random, re, struct, time, zipfile
from collections import Counter
from pathlib import Path
import numpy as np
import py7zr
import pytest
from py7zr.io import BytesIOFactory
from melee_wm.build import SECONDS_PER_REPLAY, build
from melee_wm.core import replays_dir
from melee_wm.frame import check
from melee_wm.parsed import read_game
from melee_wm.dataset import read_meta
from melee_wm.slp import ReplayError
from melee_wm.slpz import slp_to_slpz

START, PRE, POST, FRAME_START, ITEM, BOOKEND = 0x36, 0x37, 0x38, 0x3A, 0x3B, 0x3C


def events(data: bytes) -> tuple[dict[int, int], list[int]]:
    "Payload sizes by command, and where each event of a sound replay begins."
    end, at = 15 + int.from_bytes(data[11:15], "big"), 15
    sizes = {data[i]: int.from_bytes(data[i + 1:i + 3], "big") for i in range(17, 16 + data[16], 3)}
    sizes[0x35], found = data[16], []
    while at < end:
        found.append(at)
        at += 1 + sizes[data[at]]
    return sizes, found


def shorten(data: bytes, frames: int) -> bytes:
    "The first frames of a sound replay, with its own header and metadata: small enough to damage a thousand times."
    _, found = events(data)
    start, end = 15, 15 + int.from_bytes(data[11:15], "big")
    stop = next((at for at in found if data[at] in (PRE, POST, FRAME_START, ITEM, BOOKEND) and struct.unpack_from(">i", data, at + 1)[0] > frames - 124), end)
    return data[:11] + (stop - start).to_bytes(4, "big") + data[start:stop] + data[end:]


def bases(practice: Path) -> list[bytes]:
    "Small sound replays of many versions; a synthetic one where there are no real ones."
    raw = [practice.read_bytes()]
    if folder := replays_dir():
        raw += [p.read_bytes() for p in [*sorted((folder/"quick").glob("*.slp"))[:2], *sorted((folder/"odd").glob("*.slp"))]]
        with zipfile.ZipFile(folder/"versions.zip") as archive: raw += [archive.read(name) for name in sorted(archive.namelist())]
        with py7zr.SevenZipFile(folder/"ladder.7z") as archive:
            archive.extract(targets=archive.getnames()[:2], factory=(unpacked := BytesIOFactory(64 << 20)))
            raw += [member.read() for member in unpacked.products.values()]
    return [shorten(data, 400) for data in raw]


def flip(data: bytearray, rng, low=0, high=None):
    for _ in range(rng.choice((1, 1, 4, 64))): data[rng.randrange(low, min(high or len(data), len(data)))] ^= 1 << rng.randrange(8)


def block(data: bytearray, rng):
    at, size, value = rng.randrange(len(data)), rng.choice((1, 16, 700, 5000)), rng.choice((0, 0, 255))
    data[at:at + size] = bytes([value])*len(data[at:at + size])


def length_lie(data: bytearray, rng):
    data[11:15] = rng.choice((b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", (int.from_bytes(data[11:15], "big") + rng.randrange(-5000, 5000)).to_bytes(4, "big", signed=True)))


def size_lie(data: bytearray, rng):
    entry = 17 + 3*rng.randrange((data[16] - 1)//3)
    if rng.random() < 0.3: data[entry] = rng.randrange(256)
    else: data[entry + 1:entry + 3] = rng.choice((0, 1, 65535, rng.randrange(1000), max(0, int.from_bytes(data[entry + 1:entry + 3], "big") + rng.choice((-1, 1, -4, 4, 8))))).to_bytes(2, "big")


def version_lie(data: bytearray, rng):
    start = events(data)[1][1]
    data[start + 1:start + 5] = bytes([rng.choice((0, 1, 2, 3, 3, 4, 255)), rng.randrange(20), 0, 0])


def frame_lie(data: bytearray, rng):
    for at in rng.sample([at for at in events(data)[1] if data[at] in (PRE, POST, ITEM, FRAME_START, BOOKEND)], rng.choice((1, 3))):
        struct.pack_into(">i", data, at + 1, rng.choice((-2**31, 2**31 - 1, -124, 0, 10**6, struct.unpack_from(">i", data, at + 1)[0] + rng.choice((-1, 1, 60)))))


def port_lie(data: bytearray, rng):
    for at in rng.sample([at for at in events(data)[1] if data[at] in (PRE, POST)], rng.choice((1, 20))): data[at + 5 + rng.randrange(2)] = rng.choice((1, 2, 3, 4, 200))


def value_lie(data: bytearray, rng):
    sizes, found = events(data)
    for at in rng.sample([at for at in found if data[at] in (PRE, POST, ITEM)], rng.choice((1, 5, 50))):
        where = at + 7 + rng.randrange(max(1, sizes[data[at]] - 10))
        data[where:where + 4] = rng.choice((struct.pack(">f", float("nan")), struct.pack(">f", float("inf")), b"\xff\xff\xff\xff", b"\x80\0\0\0", struct.pack(">f", 3.8e22)))


def events_lost(data: bytearray, rng):
    _, found = events(data)
    first = rng.randrange(2, len(found) - 1)
    last = min(len(found) - 1, first + rng.choice((1, 3, 50)))
    piece = data[found[first]:found[last]]
    if rng.random() < 0.5: del data[found[first]:found[last]]
    else: data[found[first]:found[first]] = piece*rng.choice((1, 2))
    data[11:15] = (int.from_bytes(data[11:15], "big") + (len(piece) if rng.random() < 0.3 else 0)).to_bytes(4, "big")


def metadata_lie(data: bytearray, rng):
    flip(data, rng, 15 + int.from_bytes(data[11:15], "big"))


def truncate(data: bytearray, rng): del data[rng.choice((rng.randrange(len(data)), rng.randrange(2000), len(data) - rng.randrange(1, 40))):]


def shift(data: bytearray, rng):
    at = rng.randrange(len(data))
    if rng.random() < 0.5: del data[at:at + rng.randrange(1, 300)]
    else: data[at:at] = rng.randbytes(rng.randrange(1, 300))


def header_flip(data: bytearray, rng): flip(data, rng, 0, 900)


KINDS = (flip, header_flip, truncate, block, length_lie, size_lie, version_lie, frame_lie, port_lie, value_lie, events_lost, metadata_lie, shift, "splice")


def mutants(sound: list[bytes], count: int, seed: int = 0):
    "(name of the damage, container, bytes) of so many damaged replays; the same seed gives the same ones."
    rng = random.Random(seed)
    for number in range(count):
        kind, data = KINDS[number % len(KINDS)], bytearray(rng.choice(sound))
        if kind == "splice":
            other = rng.choice(sound)
            if rng.random() < 0.5: data[rng.randrange(len(data)):] = other[rng.randrange(len(other)):]
            else: data[rng.choice(events(bytes(data))[1]):] = other[rng.choice(events(other)[1]):]
        else: kind(data, rng)
        if rng.random() < 0.1: flip(data, rng)
        container = rng.choice((".slp",)*6 + (".slp.gz", ".slpz"))
        packed = bytes(data)
        if container == ".slp.gz":
            packed = bytearray(gzip.compress(packed, 1, mtime=0))
            if rng.random() < 0.3: flip(packed, rng)
        if container == ".slpz":
            try: packed = bytearray(slp_to_slpz(packed))
            except ReplayError: packed = bytearray(slp_to_slpz(rng.choice(sound))); flip(packed, rng)
        yield (kind if isinstance(kind, str) else kind.__name__), container, bytes(packed)


def reason_class(reason: str) -> str:
    "A reason without the figures and names that differ from file to file."
    return re.sub(r"0x[0-9a-f]+|-?\d[\d,.]*|\([^)]*\)", "#", reason.split(".slp: ")[-1])[:90]


def test_shortened_replays_are_sound(practice_slp, tmp_path):
    for number, data in enumerate(bases(practice_slp)):
        (tmp_path/f"{number}.slp").write_bytes(data)
    result = build([tmp_path], tmp_path/"out", workers=2, progress=False, min_frames=100)
    assert not result["quarantined"]
    assert result["games_added"] >= (20 if replays_dir() else 1)


def test_damaged_replays(practice_slp, tmp_path, request):
    count, heap, kinds = request.config.getoption("mutations"), tmp_path/"heap", {}
    heap.mkdir()
    for number, (kind, container, data) in enumerate(mutants(bases(practice_slp), count)):
        (heap/f"{number:05d}{container}").write_bytes(data)
        kinds[f"{number:05d}"] = kind
    started = time.perf_counter()
    result = build([heap], tmp_path/"out", workers=2, progress=False, min_frames=100)
    reasons = {Path(q["path"]).name: q["reason"] for q in result["quarantined"]}
    print(f"\n{count} damaged replays in {time.perf_counter() - started:.1f} s: {result['games_added']} kept, {result['duplicates']} duplicates, refused {result['refused']}, {len(reasons)} quarantined:")
    for reason, n in Counter(map(reason_class, reasons.values())).most_common(): print(f"{n:5d} {reason}")
    assert result["found"] == count == result["games_added"] + result["duplicates"] + sum(result["refused"].values()) + len(reasons)
    assert set(result["refused"]) <= {"not_two_players", "cpu_player", "too_short", "no_frames"}
    bad = {name: (kinds[name[:5]], reason) for name, reason in reasons.items() if not reason or "defect" in reason or "stuck" in reason or "process died" in reason}
    assert not bad, bad
    assert result["seconds"] < SECONDS_PER_REPLAY + count*0.5
    records = read_meta(tmp_path/"out")
    assert len(records) == result["games_added"] and len(list((tmp_path/"out/games").iterdir())) == len(records)
    for record in records:
        game = read_game(tmp_path/"out", record["slp_md5"])
        assert len(game) == record["frames"] and check(game) is game and np.isfinite(game["x"]).all()


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "splice"], ids=lambda kind: kind.__name__)
def test_every_damage_damages(practice_slp, kind):
    "A mutation that changes nothing would test nothing."
    sound, changed = shorten(practice_slp.read_bytes(), 200), []
    for seed in range(10):
        data = bytearray(sound)
        kind(data, random.Random(seed))
        changed.append(bytes(data) != sound)
    assert sum(changed) >= 5
