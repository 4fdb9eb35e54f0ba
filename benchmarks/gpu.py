"""The evidence that needs a GPU, in parts of under nine minutes, by one command that goes on where it stopped.

    python benchmarks/gpu.py --out gpu --data DATA --torchdistill OVERLAY --mdistiller CHECKOUT --minutes 9

Repeat the command until it says that nothing is left. Each part runs in a process of its own and leaves one JSON in
the folder (`measured` beside what had been `predicted`); `state.json` says which parts are done. A part that does not
fit into the minutes that are left waits for the next call; long runs go on from their checkpoints. `--list` shows the
parts, `--only NAME ...` chooses, `--again NAME ...` measures anew. On a CPU, `--device cpu --quick` runs every part at
toy size, to see that it works.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from common import argument_parser, result_header
from gpu_parts import PARTS, PartContext, PartSkipped, file_name

MARGIN = 20.0
"""Seconds of the given minutes that are kept for ending."""
ATTEMPTS = 3


def main() -> int:
    parser = argument_parser(__doc__)
    parser.set_defaults(out=Path("gpu"))
    parser.add_argument("--data", type=Path, help="folder that holds CIFAR-100; without: random images, no accuracies")
    parser.add_argument("--torchdistill", type=Path, help="folder that torchdistill was installed to")
    parser.add_argument("--mdistiller", type=Path, help="a checkout of megvii-research/mdistiller")
    parser.add_argument("--workers", type=int, default=16, help="processes of torchdistill's loader")
    parser.add_argument("--minutes", type=float, default=9.0, help="stop before so many have passed")
    parser.add_argument("--only", nargs="+", metavar="NAME", default=list(PARTS))
    parser.add_argument("--again", nargs="+", metavar="NAME", default=[], help="measure these anew")
    parser.add_argument("--list", action="store_true", help="show the parts and how far they are")
    parser.add_argument("--part", help=argparse.SUPPRESS)  # what a process of its own measures
    args = parser.parse_args()
    unknown = [name for name in (*args.only, *args.again, *filter(None, [args.part])) if name not in PARTS]
    if unknown:
        parser.error(f"no part {unknown[0]!r}; there are: {', '.join(PARTS)}")
    args.out = args.out.resolve()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.part:
        return measured(args.part, args)
    state = read_state(args.out)
    for name in args.again:
        state.pop(name, None)
    if args.list:
        for name, part in PARTS.items():
            print(f"{state.get(name, {}).get('status', 'waits'):12}{part.minutes:5.1f} min  {name}: {part.what}")
        return 0
    return go_on(args, state)


def go_on(args: argparse.Namespace, state: dict[str, dict[str, Any]]) -> int:
    """Measures one part after the other until the minutes are over; returns 0 when nothing is left to do."""
    end = time.monotonic() + 60 * args.minutes - MARGIN
    waiting = [name for name in PARTS if name in args.only and not _over(state.get(name, {}))]
    for position, name in enumerate(waiting):
        left = end - time.monotonic()
        if not args.quick and position and left < 60 * PARTS[name].minutes:
            break
        started = time.monotonic()
        entry = state[name] = {"attempts": state.get(name, {}).get("attempts", 0) + 1, "status": "running"}
        write_state(args.out, state)
        status, error = attempt(name, args, left)
        entry |= {"status": status, "seconds": round(time.monotonic() - started, 1)}
        if error:
            entry["error"] = error
        if status == "interrupted" and PARTS[name].resumes:
            entry["attempts"] -= 1  # it has come on
        write_state(args.out, state)
        print(f"{name}: {status}, {entry['seconds']:.0f} s" + (f" ({error})" if error else ""), flush=True)
        if status == "interrupted":
            break
    rest = [name for name in args.only if not _over(state.get(name, {}))]
    print(f"left: {', '.join(rest)}" if rest else "nothing is left")
    return 1 if rest else 0


def _over(entry: dict[str, Any]) -> bool:
    """Whether a part needs no further call: measured, skipped, or failed too often. One that a kill cut off does."""
    return entry.get("status") in ("done", "skipped") or entry.get("attempts", 0) >= ATTEMPTS


def attempt(name: str, args: argparse.Namespace, seconds: float) -> tuple[str, str]:
    """Measures a part in a process of its own (at toy size, in this one). Returns how it went, and why not well."""
    if args.quick:
        code, told = measured(name, args), ""
    else:
        command = [sys.executable, str(Path(__file__).resolve()), "--part", name, *_passed_on(args)]
        try:
            code, told = finished(command, max(seconds, 60))
        except subprocess.TimeoutExpired:
            return "interrupted", "the minutes were over"
        told = " ".join(told.split())[-600:]
    result = args.out / f"{file_name(name)}.json"
    if code:
        return "failed", told or f"exit code {code}"
    skipped = json.loads(result.read_text(encoding="utf-8"))["measured"].get("skipped")
    return ("skipped", skipped) if skipped else ("done", "")


def finished(command: list[str], seconds: float) -> tuple[int, str]:
    """Runs a command to its end; returns its exit code and its stderr.

    Raises:
        subprocess.TimeoutExpired: it took longer. Whatever it had started is ended with it: a sweep that went on would
            share the GPU with the next part.
    """
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        try:
            _, told = process.communicate(timeout=seconds)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    return process.returncode, told


def _passed_on(args: argparse.Namespace) -> list[str]:
    names = ("device", "threads", "out", "data", "torchdistill", "mdistiller", "workers")
    return [
        word for name in names if getattr(args, name) is not None for word in (f"--{name}", str(getattr(args, name)))
    ]


def measured(name: str, args: argparse.Namespace) -> int:
    """Measures one part here and writes its JSON; what cannot be measured here says why in it."""
    part = PARTS[name]
    told = argparse.Namespace(**{k: v for k, v in vars(args).items() if k not in ("only", "again", "minutes", "part")})
    result = result_header(part.what, __file__, told) | {"part": name}
    result["images"] = "CIFAR-100" if args.data and not args.quick else "random"
    result["predicted"] = dict(part.predicted)
    start = time.perf_counter()
    try:
        result["measured"] = part.measure(PartContext(args, args.out))
    except PartSkipped as reason:
        result["measured"] = {"skipped": str(reason)}
    result["seconds"] = round(time.perf_counter() - start, 1)
    file = args.out / f"{file_name(name)}.json"
    file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


def read_state(folder: Path) -> dict[str, dict[str, Any]]:
    file = folder / "state.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


def write_state(folder: Path, state: dict[str, dict[str, Any]]) -> None:
    """In one step: a kill leaves the old state or the new one."""
    file = folder / "state.json"
    temporary = file.with_suffix(".tmp")
    temporary.write_text(json.dumps(state, indent=1) + "\n", encoding="utf-8")
    temporary.replace(file)


if __name__ == "__main__":
    sys.exit(main())
