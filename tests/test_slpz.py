"""Compressed replays: what the program slpz writes is read, whatever is damaged ends in one line."""
import random
import struct
import time
import pyarrow as pa
import pytest
from melee_wm import slpz
from melee_wm.archives import replays_in
from melee_wm.slp import ReplayError, read_slp
from melee_wm.slpz import RAW_HEADER, event_lengths, slp_to_slpz, slpz_to_slp

# 24 events that are no game: a start of four bytes, controllers of three, an end of one
STREAM = b"\x35" + bytes([10]) + struct.pack(">BHBHBH", 0x36, 4, 0x37, 3, 0x39, 1) + b"\x36GAME" + b"\x37abc" + b"\x37abd" + b"\x37abe"*20 + b"\x39\x02"
SLP = RAW_HEADER + struct.pack(">i", len(STREAM)) + STREAM + b"U\x08metadata{U\x08playedOnSU\x07dolphin}}"
# the same as slpz's own code compresses it (github.com/AlexanderHarrison/slpz, format version 0, zstd level 3)
SLPZ = bytes.fromhex("00000000000000180000002300000028000000490000005e350a3600043700033900013647414d4555086d657461646174617b5508706c617965644f6e5355"
                     "07646f6c7068696e7d7d28b52ffd205eb5000060000000173739616263646502041000c97cf7c39f16")


def verdict(data: bytes, **options):
    "What reading gives: the replay, or the one line that says why not."
    try:
        return slpz_to_slp(data, "game.slpz", **options)
    except ReplayError as error:
        assert "\n" not in str(error) and "game.slpz" in str(error) and error.reason == "unreadable"
        return str(error)


def test_the_reference_program_and_we_agree():
    assert slpz_to_slp(SLPZ) == SLP
    ours = slp_to_slpz(SLP)
    assert slpz_to_slp(ours) == SLP and ours[:73] == SLPZ[:73]   # from byte 73 on it is zstd's, which may change with its version


def test_real_replays_come_back_to_the_last_byte(replays):
    sizes, versions = [], set()
    loose = [p.read_bytes() for p in sorted([*(replays/"quick").glob("*.slp"), *(replays/"odd").glob("*.slp")])]
    for data in [*loose, *(found.data for found in replays_in(replays/"versions.zip"))]:
        small = slp_to_slpz(data)
        assert slpz_to_slp(small) == data
        start = 15 + event_lengths(data[15:])[1]
        versions.add(tuple(data[start + 1:start + 3]))   # the game start begins with the version
        sizes.append((len(data), len(small)))
    assert len(sizes) == 37 and {v[0] for v in versions} == {0, 1, 2, 3}
    big, small = map(sum, zip(*sizes))
    assert big/small > 7 and all(b > 2*s for b, s in sizes)


def test_what_slpz_would_refuse_is_refused(replays):
    "Of the unreadable replays exactly those are compressed that its own code compresses too."
    refused = set()
    for path in (replays/"bad").glob("*.slp"):
        try: assert slpz_to_slp(slp_to_slpz(path.read_bytes(), path.name)) == path.read_bytes()
        except ReplayError as error: refused.add(path.stem); assert path.name in str(error)
    assert refused == {"bad-payload-size", "not-slp-html", "not-slp-png", "not-slp-text", "severed-metadata", "truncated-small", "unknown-event"}


def test_a_compressed_match_is_the_same_match(practice_slp, tmp_path):
    (tmp_path/"again.slp").write_bytes(slpz_to_slp(slp_to_slpz(practice_slp.read_bytes())))
    one, two = read_slp(practice_slp), read_slp(tmp_path/"again.slp")
    assert len(one) == len(two) > 100 and all((one[name] == two[name]).all() for name in one.columns)


@pytest.mark.parametrize("length", range(0, len(SLPZ)))
def test_every_truncation_is_noticed(length):
    assert "damaged replay" in verdict(SLPZ[:length])


def test_a_thousand_damaged_files(practice_slp):
    "Flipped bits, cuts, splices and lies in the header: a line, or a file of the same structure; never anything else, and fast."
    whole, draw = slp_to_slpz(practice_slp.read_bytes()), random.Random(0)
    outcomes, slowest = {"refused": 0, "read": 0}, 0
    for number in range(1000):
        data = bytearray(whole if number % 5 == 0 else SLPZ)
        for _ in range(draw.randint(1, 3)):
            at, kind = draw.randrange(len(data)), draw.choice("flip cut splice lie grow".split())
            if kind == "flip": data[at] ^= 1 << draw.randrange(8)
            elif kind == "cut": del data[at:]
            elif kind == "splice": data[at:at + 9] = draw.randbytes(draw.randrange(20))
            elif kind == "lie": offset = 4*draw.randrange(6); data[offset:offset + 4] = draw.randrange(1 << draw.choice((8, 16, 32))).to_bytes(4, "big")
            else: data += draw.randbytes(5)
            if not data: break
        started = time.perf_counter()
        result = verdict(bytes(data))
        slowest = max(slowest, time.perf_counter() - started)
        outcomes["refused" if isinstance(result, str) else "read"] += 1
        if isinstance(result, bytes):   # a changed value; sizes agree all the same
            assert result[:11] == RAW_HEADER and int.from_bytes(result[11:15], "big") <= len(result) - 15
    assert outcomes["refused"] > 500 and sum(outcomes.values()) == 1000 and slowest < 5, (outcomes, slowest)


def bomb(content: bytes, promised: int) -> bytes:
    "A file whose compressed part is this."
    return SLPZ[:20] + promised.to_bytes(4, "big") + SLPZ[24:73] + pa.Codec("zstd", compression_level=19).compress(content, asbytes=True)


def test_what_is_promised_is_what_must_come():
    columns = pa.decompress(SLPZ[73:], decompressed_size=94, codec="zstd", asbytes=True)
    assert slpz_to_slp(bomb(columns, 94)) == SLP
    zeros = bomb(bytes(100 << 20), 1000)
    assert len(zeros) < 20_000
    assert "cannot be unpacked" in verdict(zeros)                            # it holds more than it says
    assert "cannot be unpacked" in verdict(bomb(columns, 100 << 20))    # and less
    assert "more events than bytes" in verdict(bomb(b"\xff"*1000, 1000))
    assert "are announced" in verdict(bomb(columns + b"!", 95))


def test_absurd_expansion_is_refused_before_it_happens(monkeypatch):
    assert verdict(SLPZ, limit=94) == SLP
    monkeypatch.setattr(slpz.pa, "decompress", None)   # whoever calls it fails
    zeros = bomb(bytes(200 << 20), 200 << 20)
    assert len(zeros) < 40_000
    for data, options in ((zeros, {}), (bomb(b"", 2**32 - 1), {}), (SLPZ, {"limit": 93})):
        assert "too large for a replay" in verdict(data, **options)
