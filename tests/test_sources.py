"""Downloads against a real server on this machine that cuts, hangs, lies and changes its mind: the right bytes, or one line."""
import base64
import contextlib
import errno
import hashlib
import http.server
import io
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections import namedtuple
from email.utils import formatdate
from pathlib import Path
import py7zr
import pytest
from melee_wm import sources
from melee_wm.archives import find_files
from melee_wm.core import UserError
from melee_wm.sources import SOURCES, TRIES, DownloadFailed, Source, fetch, fetched_text, find_source, list_sources, sources_text

PAGE = b"<!DOCTYPE html><title>Please confirm</title>" + b" "*2000


def zipped(seed: int, size: int) -> bytes:
    "An archive of two files that pass for replays."
    out, draw = io.BytesIO(), random.Random(seed)
    with zipfile.ZipFile(out, "w") as archive:
        for name in ("one.slp", "two.slp"): archive.writestr(zipfile.ZipInfo(name), draw.randbytes(size//2))
    return out.getvalue()


BODY, OTHER = zipped(0, 1_500_000), zipped(1, 1_100_000)
HALF = len(BODY)//2


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers as told: status, body, headers (None leaves one out), stop_after (bytes, then hang up), hang (seconds),
    ranges ("refuse", "ignore the condition", or the Content-Range to claim), change (the file, from now on)."""
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        server = self.server
        fault = server.faults.pop(0) if server.faults else server.habit
        server.log.append((self.path, dict(self.headers)))
        if "change" in fault: server.body, server.version = fault["change"], server.version + 1
        validators = {"ETag": f'"v{server.version}"', "Last-Modified": formatdate(1.7e9 + server.version, usegmt=True)}
        validators = {name: value for name, value in validators.items() if name in server.validators}
        body, asked = fault.get("body", server.body), re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        ranges = fault.get("ranges", "honour")
        holds = ranges == "ignore the condition" or self.headers.get("If-Range") in (None, *validators.values())
        start = int(asked[1]) if asked and holds and ranges != "refuse" and fault.get("status", 206) == 206 else 0
        if start and start >= len(body): return self.send_error(416)
        headers = {**validators, "Content-Type": "application/octet-stream", "Content-Length": len(body) - start}
        if start: headers["Content-Range"] = ranges if ranges.startswith("bytes") else f"bytes {start}-{len(body) - 1}/{len(body)}"
        self.send_response(fault.get("status", 206 if start else 200))
        for name, value in {**headers, **fault.get("headers", {})}.items():
            if value is not None: self.send_header(name, str(value))
        self.end_headers()
        stop = min(len(body), start + fault.get("stop_after", len(body)))
        for at in range(start, stop, 32768):
            self.wfile.write(body[at:min(at + 32768, stop)])
            time.sleep(fault.get("pace", 0))
        server.gone.wait(fault.get("hang", 0))
        self.close_connection = fault.get("status") != 302   # without a word

    def log_message(self, *_): pass


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, faults=(), habit=None, body=BODY, validators=("ETag", "Last-Modified")):
        super().__init__(("127.0.0.1", 0), Handler)
        self.faults, self.habit, self.body, self.validators, self.version, self.log, self.gone = list(faults), habit or {}, body, validators, 1, [], threading.Event()
        self.source = Source("here", "an example", 2, "two.zip", f"http://127.0.0.1:{self.server_port}/two.zip")
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def handle_error(self, request, client_address): pass   # a client that hangs up

    def starts(self) -> list[int]:
        "From which byte on each request wanted the file."
        return [int(re.search(r"\d+", headers.get("Range", "0"))[0]) for _, headers in self.log]


@pytest.fixture
def serve(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with contextlib.ExitStack() as stack:
        def start(*args, **options) -> Server:
            server = Server(*args, **options)
            stack.callback(server.server_close); stack.callback(server.shutdown); stack.callback(server.gone.set)
            return server
        yield start


@pytest.fixture
def get(tmp_path):
    "fetch into tmp_path, without waiting between attempts."
    def get(source, **options):
        return fetch(source, tmp_path, **{"progress": False, "timeout": 0.5, "sleep": lambda seconds: None, **options})
    return get


def files(folder: Path) -> set[str]:
    return {p.name for p in folder.iterdir()} - {".two.zip.lock"}


def fails(call, *words, error=DownloadFailed) -> str:
    "One line with these words, and nothing under the final name."
    with pytest.raises(error) as caught: call()
    assert "\n" not in str(caught.value) and all(word in str(caught.value) for word in words), str(caught.value)
    return str(caught.value)


DONE = {"two.zip", "two.zip.json"}
KEPT = {"two.zip.part", "two.zip.part.json"}


# --- what recovers

@pytest.mark.parametrize("seed", range(3))
def test_cut_at_random_places(serve, get, tmp_path, seed):
    draw = random.Random(seed)
    server = serve([{"stop_after": draw.randrange(1, 120_000)} for _ in range(20)])
    result = get(server.source)
    assert (tmp_path/"two.zip").read_bytes() == BODY and files(tmp_path) == DONE
    assert result["received"] == len(BODY) == result["bytes"] and result["sha256"] == hashlib.sha256(BODY).hexdigest() and result["replays"] == 2
    starts = server.starts()
    assert len(starts) >= 15 and starts == sorted(starts) and len(set(starts)) == len(starts)   # never from the start again


RECOVERS = {
    "500 and 503, then fine": [{"status": 500, "body": PAGE}, {"status": 503, "body": b""}, {"status": 500, "body": PAGE}],
    "cut before the first byte": [{"stop_after": 0}, {"stop_after": 1}],
    "hangs, then fine": [{"stop_after": HALF, "hang": 30}],
    "hangs before the first byte": [{"stop_after": 0, "hang": 30}],
    "claims more than it sends": [{"stop_after": HALF}, {"headers": {"Content-Length": HALF}, "stop_after": HALF - 100_000}],
    "refuses ranges": [{"stop_after": HALF}, {"ranges": "refuse"}],
    "another piece": [{"stop_after": HALF}, {"ranges": f"bytes 0-{len(BODY) - 1}/{len(BODY)}"}],
    "a piece of a longer file": [{"stop_after": HALF}, {"ranges": f"bytes {HALF}-{len(BODY)}/{len(BODY) + 1}"}],
    "a piece it does not name": [{"stop_after": HALF}, {"headers": {"Content-Range": None}}],
    "a piece nobody asked for": [{"status": 206}],
    "file replaced, condition honoured": [{"stop_after": HALF}, {"change": OTHER}],
    "file replaced, condition ignored": [{"stop_after": HALF}, {"change": OTHER, "ranges": "ignore the condition"}],
    "file replaced twice": [{"stop_after": HALF}, {"change": OTHER, "stop_after": HALF//2}, {"change": BODY}],
    "file became shorter": [{"stop_after": HALF}, {"change": zipped(2, HALF//2), "ranges": "ignore the condition"}],
    "busy": [{"status": 429, "body": b"", "headers": {"Retry-After": "1"}}, {"status": 408, "body": b""}],
}


@pytest.mark.parametrize("faults", RECOVERS.values(), ids=RECOVERS)
def test_recovers(serve, get, tmp_path, faults):
    server = serve(faults)
    result = get(server.source)
    assert (tmp_path/"two.zip").read_bytes() == server.body and files(tmp_path) == DONE
    assert result["sha256"] == hashlib.sha256(server.body).hexdigest() and not server.faults
    requests = len(server.log)
    assert get(server.source)["received"] == 0 and len(server.log) == requests >= 2


@pytest.mark.parametrize("validators, source, resumes", [(["ETag"], {}, True), (["Last-Modified"], {}, True), ([], {}, False), ([], {"sha256": hashlib.sha256(BODY).hexdigest()}, True)])
def test_resumes_only_what_can_be_told_apart(serve, get, tmp_path, validators, source, resumes):
    server = serve([{"stop_after": HALF}], validators=validators)
    get(server.source._replace(**source))
    assert (tmp_path/"two.zip").read_bytes() == BODY and (server.starts() == [0, HALF]) == resumes


def test_two_halves_of_two_files_are_noticed(serve, get, tmp_path):
    "No validators, a checksum, and the file replaced by one of the same length."
    same_length = zipped(3, 1_500_000)
    assert len(same_length) == len(BODY)
    server = serve([{"stop_after": HALF}, {"change": same_length}], validators=[])
    fails(lambda: get(server.source._replace(md5=hashlib.md5(BODY).hexdigest())), "wrong checksum", "the registry's md5", "removed")
    assert files(tmp_path) == set()


def test_a_server_that_comes_back(serve, get, tmp_path):
    server = serve()
    port, late = server.server_port, []
    server.shutdown(); server.server_close()
    def sleep(seconds):
        if len(late) < 3: late.append(seconds)
        elif len(late) == 3:
            again = http.server.ThreadingHTTPServer.__new__(Server)
            http.server.ThreadingHTTPServer.__init__(again, ("127.0.0.1", port), Handler)
            again.faults, again.habit, again.body, again.validators, again.version, again.log, again.gone = [], {}, BODY, ("ETag",), 1, [], threading.Event()
            threading.Thread(target=again.serve_forever, args=(0.01,), daemon=True).start()
            late.append(again)
    get(server.source, sleep=sleep)
    late[-1].shutdown(); late[-1].server_close()
    assert (tmp_path/"two.zip").read_bytes() == BODY


def test_redirects_are_followed(serve, get, tmp_path):
    target = serve([{"stop_after": HALF}])
    server = serve(habit={"status": 302, "body": b"", "headers": {"Location": target.source.url}})
    get(server.source)
    assert (tmp_path/"two.zip").read_bytes() == BODY and target.starts() == [0, HALF]
    loop = serve(); loop.habit = {"status": 302, "body": b"", "headers": {"Location": loop.source.url}}
    fails(lambda: get(loop.source._replace(archive="loop.zip")), "leads nowhere")


def test_7z(serve, get, tmp_path):
    archive = tmp_path/"a.7z"
    with py7zr.SevenZipFile(archive, "w", filters=[{"id": py7zr.FILTER_LZMA2, "preset": 1}]) as z:
        for number in range(3): z.writestr(random.Random(number).randbytes(90_000), f"day/{number}.slp")
    body = archive.read_bytes()
    server = serve([{"stop_after": 100_000}], body=body)
    result = fetch(server.source._replace(archive="cup.7z"), tmp_path/"out", progress=False, sleep=lambda s: None)
    assert result["replays"] == 3 and (tmp_path/"out/cup.7z").read_bytes() == body
    cut = serve(body=body[:200_000])
    fails(lambda: get(cut.source._replace(archive="cut.7z")), "no archive of replays", "removed")
    assert not list(tmp_path.glob("cut.7z*"))


# --- what ends in one line

ENDS = {   # faults for ever; words of the line; what is left
    "404": ({"status": 404, "body": PAGE}, ["the server refuses", "404 Not Found"], set()),
    "403": ({"status": 403, "body": PAGE}, ["the server refuses", "403 Forbidden"], set()),
    "410": ({"status": 410, "body": b""}, ["410 Gone"], set()),
    "a web page": ({"body": PAGE, "headers": {"Content-Type": "text/html; charset=utf-8"}}, ["a web page, not an archive"], set()),
    "a web page in disguise": ({"body": PAGE}, ["a web page, not an archive"], set()),
    "another file": ({"body": b"\x89PNG" + bytes(500)}, ["not an archive", "expected a .zip file"], set()),
    "a 7z where a zip was meant": ({"body": b"7z\xbc\xaf\x27\x1c" + bytes(500)}, ["not an archive"], set()),
    "nothing": ({"body": b""}, ["not an archive"], set()),
    "no length": ({"headers": {"Content-Length": None}}, ["does not say how long"], set()),
    "packed once more": ({"headers": {"Content-Encoding": "gzip"}}, ["packed the file once more"], set()),
    "announces less": ({"headers": {"Content-Length": HALF}}, ["no archive of replays", "removed"], set()),
    "a damaged archive": ({"body": BODY[:-40] + bytes(40)}, ["no archive of replays", "removed"], set()),
    "always 500": ({"status": 500, "body": PAGE}, ["500 Internal Server Error", f"{TRIES} times"], set()),
    "always another piece": ({"stop_after": HALF, "ranges": "bytes 9-99/100"}, ["does not get on", "the same command again"], KEPT),
    "announces more": ({"headers": {"Content-Length": len(BODY) + 9}, "ranges": "refuse"}, ["does not get on", "are kept"], KEPT),
    "never past the middle": ({"stop_after": HALF, "ranges": "refuse"}, ["does not get on", f"{TRIES} times", "are kept"], KEPT),
    "always a piece nobody asked for": ({"status": 206}, ["another piece than it was asked for"], set()),
    "hangs for ever": ({"stop_after": 0, "hang": 30}, ["ReadTimeout"], set()),
}


@pytest.mark.parametrize("habit, words, left", ENDS.values(), ids=ENDS)
def test_ends_in_one_line(serve, get, tmp_path, habit, words, left):
    server = serve(habit=habit)
    fails(lambda: get(server.source, timeout=0.1), *words)
    assert files(tmp_path) == left
    final = len(server.log)
    assert final == 1 if not left and "times" not in str(words) and "piece" not in str(words) and "Timeout" not in str(words) else TRIES <= final <= 2*TRIES + 1
    server.habit = {}   # the server is itself again: so is the download
    get(server.source)
    assert (tmp_path/"two.zip").read_bytes() == BODY and files(tmp_path) == DONE


def test_no_server_at_all(serve, get, tmp_path):
    server = serve()
    server.shutdown(); server.server_close()
    fails(lambda: get(server.source), "does not get on", "ConnectError")
    fails(lambda: get(server.source._replace(url="gopher://127.0.0.1/two.zip")), "leads nowhere")
    assert files(tmp_path) == set()


def test_a_login_page_does_not_cost_the_part(serve, get, tmp_path):
    "A web page or a refusal in place of the rest: what arrived stays, and is continued."
    server = serve([{"stop_after": HALF}, {"body": PAGE, "ranges": "refuse"}])
    fails(lambda: get(server.source), "a web page")
    for refusal in ({"status": 403, "body": PAGE}, {"body": PAGE, "ranges": "refuse", "headers": {"Content-Type": "text/html"}}):
        server.faults = [refusal]
        fails(lambda: get(server.source))
    assert (tmp_path/"two.zip.part").read_bytes() == BODY[:HALF]
    get(server.source)
    assert (tmp_path/"two.zip").read_bytes() == BODY and server.starts() == [0] + 4*[HALF]
    server = serve([{"stop_after": HALF}, {"body": PAGE}, {"body": PAGE}])   # the page is shorter than the part: 416, then the page
    fails(lambda: get(server.source._replace(archive="other.zip")), "a web page")
    assert (tmp_path/"other.zip.part").read_bytes() == BODY[:HALF]


def test_an_archive_that_lies_about_its_contents(serve, get, tmp_path):
    empty, bomb = io.BytesIO(), io.BytesIO()
    with zipfile.ZipFile(empty, "w") as archive: archive.writestr("readme.txt", "no replays")
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        for number in range(3): archive.writestr(f"{number}.slp", bytes(70 << 20))
    for body, words in ((empty, "there are no replays in it"), (bomb, "expands from")):
        server = serve(body=body.getvalue())
        fails(lambda: get(server.source), "no archive of replays", words)
        assert files(tmp_path) == set()


@pytest.mark.parametrize("checksum", ["sha256", "md5", "server"])
def test_checksums(serve, get, tmp_path, checksum):
    digest = hashlib.new("md5" if checksum == "server" else checksum, BODY)
    habit = {"headers": {"x-goog-hash": "crc32c=n03x6A==,md5=" + base64.b64encode(digest.digest()).decode()}} if checksum == "server" else {}
    known = {} if checksum == "server" else {checksum: digest.hexdigest().upper()}
    server = serve([{**habit, "stop_after": HALF}], habit=habit)
    get(server.source._replace(**known))                   # the right one
    damaged = bytes([*BODY[:HALF], BODY[HALF] ^ 1, *BODY[HALF + 1:]])
    server = serve([{**habit, "stop_after": HALF}], habit=habit, body=damaged)
    for name in DONE: (tmp_path/name).unlink()
    fails(lambda: get(server.source._replace(**known)), "wrong checksum", digest.hexdigest(), "removed")
    assert files(tmp_path) == set()


def test_the_first_checksum_holds(serve, get, tmp_path):
    server = serve()
    get(server.source)
    (tmp_path/"two.zip").unlink()
    server.body, server.version = OTHER, 2
    fails(lambda: get(server.source), "wrong checksum", "the first download's", "two.zip.json")
    assert files(tmp_path) == {"two.zip.json"}
    (tmp_path/"two.zip.json").unlink()                     # as the line says
    assert get(server.source)["bytes"] == len(OTHER)


def test_sizes_in_the_registry_hold(serve, get, tmp_path):
    server = serve([{"stop_after": HALF}], habit={"headers": {"Content-Length": None, "Connection": "close"}})
    fails(lambda: get(server.source._replace(size=len(BODY) + 1)), "another length")
    server.faults = [{}]
    assert get(server.source._replace(size=len(BODY)))["bytes"] == len(BODY)   # and stand in for a missing Content-Length


# --- the disk

Usage = namedtuple("Usage", "total used free")


def test_disk_too_small(serve, get, tmp_path, monkeypatch):
    server = serve([{"stop_after": HALF}, {"status": 404}])
    free = [len(BODY) - 1]
    monkeypatch.setattr(sources.shutil, "disk_usage", lambda folder: Usage(1e9, 0, free[0]))
    server.faults.insert(0, {})
    fails(lambda: get(server.source), "not enough room on the disk", "1.5 MB free", error=UserError)
    assert files(tmp_path) == set()
    free[0] = len(BODY)
    fails(lambda: get(server.source), "404")
    free[0] = HALF                                          # half of it is there already
    get(server.source)
    assert (tmp_path/"two.zip").read_bytes() == BODY


def test_disk_full_in_the_middle(serve, get, tmp_path, monkeypatch):
    server, write = serve(), sources._Part.write
    def full(self, data):
        if self.have > HALF: raise OSError(errno.ENOSPC, "No space left on device")
        write(self, data)
    with monkeypatch.context() as patch:
        patch.setattr(sources._Part, "write", full)
        fails(lambda: get(server.source), "the disk is full", "what arrived is kept", error=UserError)
    assert files(tmp_path) == KEPT
    get(server.source)
    assert (tmp_path/"two.zip").read_bytes() == BODY and server.starts()[1] > HALF


def test_a_folder_that_cannot_be_used(serve, tmp_path):
    server = serve()
    (tmp_path/"file").touch()
    fails(lambda: fetch(server.source, tmp_path/"file", progress=False), "the folder cannot be", error=UserError)
    assert not server.log


# --- what is there already

def test_a_finished_file_is_not_fetched_again(serve, get, tmp_path):
    server = serve()
    first = get(server.source)
    second = get(server.source)
    assert len(server.log) == 1 and second["received"] == 0 and {**second, "received": 0, "seconds": 0} == {**first, "received": 0, "seconds": 0}
    assert "nothing was downloaded" in fetched_text(second) and "melee-wm data build" in fetched_text(second)
    for changed in (BODY + b"!", BODY[:-1] + b"!"):         # one is longer, one of the same length
        (tmp_path/"two.zip").write_bytes(changed)
        fails(lambda: get(server.source), "not what was downloaded", "remove it", error=UserError)
        assert (tmp_path/"two.zip").read_bytes() == changed   # it is the user's to remove
    (tmp_path/"two.zip.json").write_text("{")
    fails(lambda: get(server.source), "record of a download is damaged", error=UserError)
    (tmp_path/"two.zip.json").unlink()
    fails(lambda: get(server.source), "of which nothing is known", error=UserError)
    assert len(server.log) == 1


@pytest.mark.parametrize("note", ["", "{", "[]", "{}", '{"url": "elsewhere", "bytes": 5}', b"\xff\xfe"])
def test_a_part_that_nobody_vouches_for(serve, get, tmp_path, note):
    (tmp_path/"two.zip.part").write_bytes(b"rubbish of an earlier program")
    (tmp_path/"two.zip.part.json").write_bytes(note if isinstance(note, bytes) else note.encode())
    server = serve()
    get(server.source)
    assert (tmp_path/"two.zip").read_bytes() == BODY and server.starts() == [0]


def test_a_part_is_never_taken_for_replays(serve, get, tmp_path):
    server = serve([{"stop_after": HALF}, {"status": 404}])
    fails(lambda: get(server.source))
    assert files(tmp_path) == KEPT and find_files([tmp_path]) == []


# --- interruptions

DOWNLOAD = """
import sys
from melee_wm.sources import Source, fetch
fetch(Source("here", "an example", 2, "two.zip", sys.argv[1]), sys.argv[2], progress=False)
"""


def start_download(server: Server, folder: Path) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", DOWNLOAD, server.source.url, str(folder)], stderr=subprocess.PIPE, text=True, env={**os.environ, "NO_PROXY": "127.0.0.1"})


def wait_for(path: Path, size: int):
    deadline = time.monotonic() + 30
    while not (path.exists() and path.stat().st_size >= size):
        assert time.monotonic() < deadline, "the download did not begin"
        time.sleep(0.01)


def test_killed_in_the_middle_again_and_again(serve, get, tmp_path):
    "SIGKILL at three moments of a real process; each next one goes on from what was written down."
    server = serve(habit={"pace": 0.1})
    for share in (0.2, 0.5, 0.8):
        process = start_download(server, tmp_path)
        wait_for(tmp_path/"two.zip.part", int(share*len(BODY)))
        process.kill(); process.communicate()
        assert files(tmp_path) == KEPT and BODY.startswith((tmp_path/"two.zip.part").read_bytes())
    server.habit = {}
    result = get(server.source)
    assert (tmp_path/"two.zip").read_bytes() == BODY and files(tmp_path) == DONE
    starts = server.starts()
    assert starts == sorted(starts) and 0 < starts[-1] == len(BODY) - result["received"]


def test_power_cut(serve, get, tmp_path):
    "Bytes after the ones that were flushed may be anything; they are not used."
    server = serve([{"stop_after": HALF}, {"status": 404}])
    fails(lambda: get(server.source))
    with open(tmp_path/"two.zip.part", "ab") as part: part.write(bytes(50_000))
    get(server.source)
    assert (tmp_path/"two.zip").read_bytes() == BODY and server.starts()[-1] == HALF


def test_ctrl_c(serve, get, tmp_path):
    server = serve(habit={"pace": 0.05})
    process = start_download(server, tmp_path)
    wait_for(tmp_path/"two.zip.part", 200_000)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=30)[1]
    assert process.returncode != 0 and "the same command continues there" in said and "of 1.5 MB are kept" in said
    kept = json.loads((tmp_path/"two.zip.part.json").read_text())["bytes"]
    assert kept >= 200_000 and (tmp_path/"two.zip.part").read_bytes() == BODY[:kept]
    server.habit = {}
    get(server.source)
    assert (tmp_path/"two.zip").read_bytes() == BODY and server.starts() == [0, kept]


def test_killed_at_the_very_end(serve, get, tmp_path, monkeypatch):
    "Between the record and the new name, and between the new name and the last clearing up."
    server = serve()
    for owner, step in ((sources.os, "replace"), (Path, "unlink")):
        real = getattr(owner, step)
        def killed(*args, **options):
            if str(args[0]).endswith((".part", ".part.json")): raise KeyboardInterrupt
            return real(*args, **options)
        with monkeypatch.context() as patch:
            patch.setattr(owner, step, killed)
            with pytest.raises(KeyboardInterrupt): get(server.source)
    requests = len(server.log)
    assert get(server.source)["bytes"] == len(BODY) and (tmp_path/"two.zip").read_bytes() == BODY
    assert len(server.log) == requests == 1   # everything was there


def test_two_at_once(serve, get, tmp_path):
    server = serve(habit={"pace": 0.03})
    first = threading.Thread(target=get, args=(server.source,))
    first.start()
    wait_for(tmp_path/"two.zip.part", 100_000)
    fails(lambda: get(server.source), "another download of it is under way", error=UserError)
    first.join()
    assert (tmp_path/"two.zip").read_bytes() == BODY and get(server.source)["received"] == 0 and len(server.log) == 1


# --- patience

def test_waits_longer_and_longer(serve, get):
    server, waits = serve(habit={"status": 503, "body": b""}), []
    fails(lambda: get(server.source, sleep=waits.append), "503")
    assert len(waits) == TRIES - 1 == len(server.log) - 1
    assert all(0.5*2**n <= wait <= 2**n for n, wait in enumerate(waits[:6])) and max(waits) <= 60 and len(set(waits)) == len(waits)
    server, waits = serve([{"status": 503, "body": b"", "headers": {"Retry-After": wait}} for wait in ("20", "86400", "Sat, 21 Nov 2026 10:00:00 GMT")]), []
    get(server.source, sleep=waits.append)
    assert waits[:2] == [20, 120] and waits[2] <= 4   # what is asked for, within reason


def test_progress_sets_the_count_back(serve, get, tmp_path):
    "Far more cuts than tries, each a little further on."
    server = serve([{"stop_after": 30_000}]*40)
    get(server.source)
    assert (tmp_path/"two.zip").read_bytes() == BODY and len(server.log) == 41 > 4*TRIES


def test_progress_is_shown(serve, get, capsys):
    server = serve([{"stop_after": HALF}])
    get(server.source, progress=True)
    shown = capsys.readouterr()
    assert shown.out == "" and "two.zip: 100%" in shown.err and "1.50M/1.50M" in shown.err and "trying again in" in shown.err


def test_any_mixture_of_faults(serve, get, tmp_path):
    "Sixty bad evenings: one line or the right bytes, and never anything else under the final name."
    draw = random.Random(7)
    menu = [*(fault for faults in RECOVERS.values() for fault in faults), *(habit for habit, _, _ in ENDS.values()), *({"stop_after": draw.randrange(len(BODY))} for _ in range(40))]
    menu = [{**fault, "hang": min(fault.get("hang", 0), 0.2)} for fault in menu]
    outcomes = {"bytes": 0, "line": 0}
    for evening in range(60):
        folder = tmp_path/str(evening)
        server = serve([draw.choice(menu) for _ in range(draw.randint(1, 12))])
        for _ in range(30):
            try:
                fetch(server.source, folder, progress=False, timeout=0.1, sleep=lambda s: None)
                break
            except DownloadFailed as error:
                assert "\n" not in str(error) and not (folder/"two.zip").exists()
                outcomes["line"] += 1
                (folder/"two.zip.json").unlink(missing_ok=True)
        assert (folder/"two.zip").read_bytes() == server.body and files(folder) == DONE
        outcomes["bytes"] += 1
    assert outcomes["bytes"] == 60 and outcomes["line"] > 10


# --- the registry

def test_the_registry_is_the_one_of_the_mission():
    fetched = {s.name: (s.replays, s.url.removeprefix("https://storage.googleapis.com/slippi.appspot.com/")) for s in SOURCES.values() if s.url}
    assert fetched == {"gang": (3561, "dump/gang-replays.7z"), "full-bloom-5": (4502, "dump/full-bloom-5-replays.7z"), "fight-pitt-9": (1150, "dump/fight-pitt-9-replays.7z"),
        "pound-2019": (11019, "dump/pound-2019-replays.7z"), "nma-2": (2817, "dump/national-melee-arcadian-2.7z"), "summit-11": (419, "replays/bundles/Summit-11.zip")}
    assert SOURCES["phillip-matchups"].replays == 596 and {"own", "onedrive", "testdataset-32"} <= SOURCES.keys() and sum(s.replays for n, s in SOURCES.items() if n.startswith("ranked")) == 850_155
    archives = [s.archive for s in SOURCES.values() if s.archive]
    assert len(set(archives)) == len(archives) and all(bool(s.url) != bool(s.how) for s in SOURCES.values())


def test_the_listing_says_everything():
    listed = json.loads(json.dumps(list_sources(), allow_nan=False))
    assert [s["name"] for s in listed["sources"]] == list(SOURCES) and "none stated" in listed["licence"]
    text = sources_text()
    assert all(s.name in text and s.how in text for s in SOURCES.values()) and "3,561" in text


def test_what_only_a_person_can_fetch_is_refused_with_the_way(get, tmp_path):
    for source in SOURCES.values():
        if source.url: continue
        line = fails(lambda: fetch(source.name, tmp_path/"new"), source.name, source.how, "melee-wm data build", error=UserError)
        assert "by hand" in line
    assert "~/Slippi" in line and not (tmp_path/"new").exists()
    fails(lambda: get("pound-2018"), "no such source", "did you mean pound-2019?", error=UserError)
    fails(lambda: find_source("zzz"), "melee-wm data sources", error=UserError)
    for archive in ("../two.zip", "two.exe", ""):
        fails(lambda: get(Source("x", "x", 1, archive, "http://127.0.0.1/")), "not the name of an archive", error=UserError)
