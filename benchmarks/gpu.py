"""GPU benchmark: measures the claims that need a GPU, in parts of less than nine minutes, resumable by one command.

    python benchmarks/gpu.py --out gpu --data DATA --torchdistill OVERLAY --mdistiller CHECKOUT --minutes 9

Repeat the command until it prints "all parts are complete". Each part runs in a separate process and writes one JSON
file (`measured` next to `predicted`); `state.json` contains the status of the parts. A part that does not fit into the
remaining minutes is measured in the next call; long runs resume from their checkpoints. `--list` prints the parts,
`--only NAME ...` selects parts, `--again NAME ...` repeats parts. On a CPU, `--device cpu --quick` runs every part at
toy size, to check that it works.
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
from gpu_common import PartContext, PartSkipped, file_name
from gpu_parts import PARTS

MARGIN = 20.0
"""Seconds before the limit at which the last part must be complete."""
MAX_ATTEMPTS = 3


def main() -> int:
    parser = argument_parser(__doc__)
    parser.set_defaults(out=Path("gpu"))
    parser.add_argument("--data", type=Path, help="folder with CIFAR-100; default: random images, no accuracies")
    parser.add_argument("--torchdistill", type=Path, help="folder of the torchdistill installation")
    parser.add_argument("--mdistiller", type=Path, help="checkout of megvii-research/mdistiller")
    parser.add_argument("--workers", type=int, default=16, help="processes of torchdistill's data loader")
    parser.add_argument("--minutes", type=float, default=9.0, help="time limit of this call")
    parser.add_argument("--only", nargs="+", metavar="NAME", default=list(PARTS), help="measure only these parts")
    parser.add_argument("--again", nargs="+", metavar="NAME", default=[], help="measure these parts again")
    parser.add_argument("--list", action="store_true", help="print the parts and their status")
    parser.add_argument("--part", help=argparse.SUPPRESS)  # set in the process of a part
    args = parser.parse_args()
    unknown = [name for name in (*args.only, *args.again, *filter(None, [args.part])) if name not in PARTS]
    if unknown:
        parser.error(f"no part {unknown[0]!r}; the parts are: {', '.join(PARTS)}")
    args.out = args.out.resolve()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.part:
        return measure_part(args.part, args)
    state = read_state(args.out)
    for name in args.again:
        state.pop(name, None)
    if args.list:
        for name, part in PARTS.items():
            print(f"{state.get(name, {}).get('status', 'pending'):12}{part.minutes:5.1f} min  {name}: {part.what}")
        return 0
    return run_parts(args, state)


def run_parts(args: argparse.Namespace, state: dict[str, dict[str, Any]]) -> int:
    """Measures pending parts until the time limit.

    Returns:
        Exit code: 0 if all parts are complete, otherwise 1.
    """
    end = time.monotonic() + 60 * args.minutes - MARGIN
    pending = [name for name in PARTS if name in args.only and not _is_complete(state.get(name, {}))]
    for position, name in enumerate(pending):
        remaining = end - time.monotonic()
        # The first part always starts, because it would not fit into a later call either.
        if not args.quick and position and remaining < 60 * PARTS[name].minutes:
            break
        start = time.monotonic()
        entry = state[name] = {"attempts": state.get(name, {}).get("attempts", 0) + 1, "status": "running"}
        write_state(args.out, state)  # before the part, so that a killed call counts as an attempt
        status, error = attempt(name, args, remaining)
        entry |= {"status": status, "seconds": round(time.monotonic() - start, 1)}
        if error:
            entry["error"] = error
        if status == "interrupted" and PARTS[name].resumes:
            entry["attempts"] -= 1  # the call was no failure: the checkpoint of the part has advanced
        write_state(args.out, state)
        print(f"{name}: {status}, {entry['seconds']:.0f} s" + (f" ({error})" if error else ""), flush=True)
        if status == "interrupted":
            break
    pending = [name for name in args.only if not _is_complete(state.get(name, {}))]
    print(f"pending: {', '.join(pending)}" if pending else "all parts are complete")
    return 1 if pending else 0


def _is_complete(entry: dict[str, Any]) -> bool:
    """Returns whether a part needs no further call, because it is done, skipped, or has failed `MAX_ATTEMPTS` times."""
    return entry.get("status") in ("done", "skipped") or entry.get("attempts", 0) >= MAX_ATTEMPTS


def attempt(name: str, args: argparse.Namespace, seconds: float) -> tuple[str, str]:
    """Measures a part of the benchmark in a separate process, or in this process with `--quick`.

    Returns:
        Status (done, skipped, failed or interrupted), and the reason; the reason of "done" is empty.
    """
    if args.quick:
        code, stderr = measure_part(name, args), ""
    else:
        command = [sys.executable, str(Path(__file__).resolve()), "--part", name, *_forwarded_arguments(args)]
        try:
            code, stderr = run_command(command, max(seconds, 60))
        except subprocess.TimeoutExpired:
            return "interrupted", "time limit reached"
        stderr = " ".join(stderr.split())[-600:]
    result = args.out / f"{file_name(name)}.json"
    if code:
        return "failed", stderr or f"exit code {code}"
    reason = json.loads(result.read_text(encoding="utf-8"))["measured"].get("skipped")
    return ("skipped", reason) if reason else ("done", "")


def run_command(command: list[str], seconds: float) -> tuple[int, str]:
    """Runs a command and returns its exit code and stderr.

    Raises:
        subprocess.TimeoutExpired: the command took longer than `seconds`. It is killed with all child processes,
            because otherwise they would share the GPU with the next part.
    """
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        try:
            _, stderr = process.communicate(timeout=seconds)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    return process.returncode, stderr


def _forwarded_arguments(args: argparse.Namespace) -> list[str]:
    names = ("device", "threads", "out", "data", "torchdistill", "mdistiller", "workers")
    values = {name: getattr(args, name) for name in names}
    return [word for name, value in values.items() if value is not None for word in (f"--{name}", str(value))]


def measure_part(name: str, args: argparse.Namespace) -> int:
    """Measures one part in this process and writes its JSON file. For a skipped part, the file contains the reason."""
    part = PARTS[name]
    flags = argparse.Namespace(**{k: v for k, v in vars(args).items() if k not in ("only", "again", "minutes", "part")})
    result = result_header(part.what, __file__, flags) | {"part": name}
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
    """Returns name -> status of the parts that earlier calls of the script measured."""
    file = folder / "state.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


def write_state(folder: Path, state: dict[str, dict[str, Any]]) -> None:
    """Writes the status of the parts atomically, so that a kill leaves either the old or the new file."""
    file = folder / "state.json"
    temporary = file.with_suffix(".tmp")
    temporary.write_text(json.dumps(state, indent=1) + "\n", encoding="utf-8")
    temporary.replace(file)


if __name__ == "__main__":
    sys.exit(main())
