"""A folder in place of Modal's volume, as strict as the real one: what was not committed is gone with the container."""
import json
import os
import shutil
import sys
from pathlib import Path


class StandIn:
    "One container's view of a volume. `durable` is what has been committed; `path` is what this container sees."

    def __init__(self, durable, path, call="fc-1", running=()):
        self.durable, self.path, self.running, self._call = Path(durable), Path(path), running, call
        self.path.mkdir(parents=True, exist_ok=True)
        self.durable.mkdir(parents=True, exist_ok=True)

    @property
    def commits(self) -> list[list[str]]:
        "The files that each commit made safe."
        log = self.durable.with_suffix(".commits")
        return [json.loads(line) for line in log.read_text().split("\n")[:-1]] if log.exists() else []

    def commit(self):
        changed = [name for name in self._changed(self.path, self.durable) if not name.endswith(".tmp")]
        for name in changed: self._copy(self.path / name, self.durable / name)
        for path in sorted(self.durable.rglob("*"), reverse=True):      # what was removed here is removed there
            if not (self.path / path.relative_to(self.durable)).exists(): path.rmdir() if path.is_dir() else path.unlink()
        with open(self.durable.with_suffix(".commits"), "a") as log: log.write(json.dumps(sorted(changed)) + "\n")

    def reload(self):
        for name in self._changed(self.durable, self.path): self._copy(self.durable / name, self.path / name)

    def call(self): return self._call
    def is_running(self, call): return call in self.running

    @staticmethod
    def _changed(here: Path, there: Path) -> list[str]:
        def stamp(path):
            try: return path.stat().st_size, path.stat().st_mtime_ns
            except FileNotFoundError: return None
        return [str(p.relative_to(here)) for p in here.rglob("*") if p.is_file() and stamp(p) != stamp(there / p.relative_to(here))]

    @staticmethod
    def _copy(source: Path, target: Path):
        target.parent.mkdir(parents=True, exist_ok=True)
        beside = target.with_name(f".{target.name}.{os.getpid()}.copy")
        try: shutil.copy2(source, beside)
        except FileNotFoundError: return       # replaced by its writer at this moment
        os.replace(beside, target)


def main(durable, path, calls):
    "A container: call some functions of the app one after another, and print what each returns."
    from melee_wm import remote
    remote.cloud = StandIn(durable, path)
    for name, arguments in json.loads(calls): print(json.dumps(remote.FUNCTIONS[name].local(**arguments)), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
