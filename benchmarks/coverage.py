"""How far every torchvision classification network and hundreds of timm's fold, each with its certificate.

    python benchmarks/coverage.py [--only REGEX] [--again] [--no-proof] [--timeout 600]

Random weights, batch-norm statistics around those of a probe, γ of both signs. Each network is measured in a process that may
die without taking the others along; what was measured stays in ``results/coverage.json`` and is not measured again unless asked.
"""

from __future__ import annotations

import argparse
import datetime
import json
import re
import subprocess
import sys
import threading
from pathlib import Path

import machine
from coverage_page import page

HERE = Path(__file__).resolve().parent
NETWORKS = HERE / "coverage_networks.json"
RESTART_ABOVE_GIB = 3.0  # what a process once held, it keeps


class Worker:
    """A process that measures networks by name, one after another."""

    def __init__(self, proof: bool) -> None:
        command = [sys.executable, str(HERE / "coverage_worker.py"), *([] if proof else ["--no-proof"])]
        self.peak_gib = 0.0
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def measure(self, name: str, entry: dict, timeout: float) -> dict:
        """The row of one network; "died" or "timeout" in place of an outcome where the process did not answer."""
        timer = threading.Timer(timeout, self._process.kill)
        timer.start()
        try:
            self._process.stdin.write(json.dumps({"name": name, **entry}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        overdue = not timer.is_alive()
        timer.cancel()
        if line:
            found = json.loads(line)
            self.peak_gib = found.get("peak_gib", 0.0)
            return found
        return {"outcome": "timeout" if overdue else f"died ({self._process.wait()})", "detail": ""}

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="networks whose name matches")
    parser.add_argument("--names", type=Path, help="a JSON list of names to measure, in this order")
    parser.add_argument("--again", action="store_true", help="measure what was measured")
    parser.add_argument("--no-proof", action="store_true", help="fold without the certificate")
    parser.add_argument("--timeout", type=float, default=600)
    parser.add_argument("--json", type=Path, default=HERE / "results" / "coverage.json")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "coverage.md")
    args = parser.parse_args(argv)
    rows = json.loads(args.json.read_text())["rows"] if args.json.exists() else {}
    networks = json.loads(NETWORKS.read_text())
    asked = json.loads(args.names.read_text()) if args.names else list(networks)
    todo = [name for name in asked if re.search(args.only, name) and (args.again or name not in rows)]
    worker = None
    for at, name in enumerate(todo, 1):
        worker = worker if worker is not None and worker.alive else Worker(not args.no_proof)
        if worker.peak_gib > RESTART_ABOVE_GIB:
            worker.close()
            worker = Worker(not args.no_proof)
        rows[name] = {**worker.measure(name, networks[name], args.timeout), "family": networks[name]["family"]}
        print(f"{at}/{len(todo)} {name}: {rows[name]['outcome']} {rows[name].get('detail', '')[:200]}", file=sys.stderr, flush=True)
        ordered = {each: rows[each] for each in networks if each in rows}
        found = {"date": f"{datetime.date.today()}", "machine": machine.describe(), "rows": ordered}
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    if worker is not None:
        worker.close()
    args.out.write_text(page(json.loads(args.json.read_text())))
    return 0


if __name__ == "__main__":
    sys.exit(main())
