"""Several runs in one process, each in a thread of its own: one moves at a time, and they take turns by steps.

A run knows nothing of it: whoever drives the gang hands it `Member.attend`, which stands in for `Runner.step` and gives
the turn away before each step. What the process has one of (torch's generators, number formats) is put right at each
turn. On CUDA every member launches its kernels into a stream of its own and goes on without waiting, so that the
device works at several steps at once. Members of one kind may step together as a stack (`joint_step.py`).
"""

from __future__ import annotations

import contextlib
import ctypes
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, Literal, TypeVar

import torch

from kdbench.data.loading.build import shared_splits
from kdbench.engine.network.operands import Batch
from kdbench.engine.train.runner import Runner
from kdbench.speed.concurrent.joint_step import EXACT, JointStep, stacking_error, stacking_key, stacking_obstacle

T = TypeVar("T")


Stack = Literal["auto", True, False]


CHUNK = 5
"""Rounds that are timed as one, when both forms are tried."""


CHUNKS = 8
"""Chunks of such a trial, alternating; the first of each form warms up."""


class ConcurrentRun:
    """One run of a gang.

    Args:
        label: what sets it apart, such as `seed=2`.
    """

    def __init__(self, gang: Dispatcher[Any], label: str) -> None:
        self.gang, self.label = gang, label
        self.go = threading.Semaphore(0)
        self.alive, self.stopping = True, False
        self.runner: Runner | None = None
        self.ordinary: Callable[[Sequence[Batch]], None] = _nothing
        self.kind: Any = None
        self.why_alone = ""
        self.form: tuple[str, str] | None = None
        self.window: Sequence[Batch] | None = None
        self.taken = False
        self.error: BaseException | None = None
        self.result: Any = None
        self.stream = torch.cuda.Stream(gang.device) if gang.device.type == "cuda" else None

    def attend(self, runner: Runner) -> None:
        """Steps of this runner are steps of the gang from now on; returns when every member has come as far."""
        self.runner, self.ordinary, self.form = runner, runner.step, None
        runner.step = self.step  # type: ignore[method-assign]
        self.why_alone = stacking_obstacle(runner) if self.gang.stack is not False else ""
        self.kind = stacking_key(runner) if self.gang.stack is not False and not self.why_alone else None
        self.gang.turn(self)

    def step(self, window: Sequence[Batch]) -> None:
        """One step of this member, at its turn, by itself or with others."""
        runner, self.window = self.runner, window
        assert runner is not None
        self.gang.turn(self)  # by then every other member has a batch at hand too
        runner.forget_lap()
        if not self.taken:
            self.gang.together(self)
        self._record()
        self.window = None
        if self.error is not None:
            error, self.error = self.error, None
            raise error
        if self.taken:  # the device has its work: what is left is to count the step
            self.taken = False
            perform, runner.perform = runner.perform, _nothing
            self.ordinary(window)
            runner.perform = perform
        else:
            runner.seed_draws()  # another member has seeded for itself meanwhile
            self.ordinary(window)

    def _record(self) -> None:
        """Writes down how its steps are done from the coming one on, whenever that changes."""
        runner, form = self.runner, self.gang.form_of(self)
        if runner is None or form is None or form == self.form:
            return
        self.form = form
        steps = {runner.stage.name: {str(runner.steps_done): {"form": form[0], "why": form[1]}}}
        runs = [member.label for member in self.gang.runs]
        runner.record({"concurrent": {"label": self.label, "runs": runs, "from_step": steps}})


class Dispatcher(Generic[T]):
    """Runs tasks, one in each thread, that take turns by steps.

    Args:
        labels: what sets each member apart.
        device: of all members.
        stack: whether members of one kind step together: `auto` tries both and takes the faster, on the CPU only where
            both give the same bits.
        say: tells the person something about the gang as a whole.
    """

    def __init__(
        self,
        labels: Sequence[str],
        device: torch.device,
        *,
        stack: Stack = "auto",
        say: Callable[[str], None] = print,
    ) -> None:
        self.device, self.stack, self.say = device, stack, say
        self.runs = [ConcurrentRun(self, label) for label in labels]
        self.common = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.stopped = False
        self.holder: ConcurrentRun | None = None
        self.threads: dict[ConcurrentRun, threading.Thread] = {}
        self.stacks: dict[Any, _Stacking] = {}
        self.told: set[str] = set()

    def run(self, tasks: Sequence[Callable[[ConcurrentRun], T]]) -> list[T | BaseException]:
        """Runs one task for each member to its end; returns what each gave or raised, in order.

        Raises:
            KeyboardInterrupt: the person stopped it; every member has come to rest.
        """
        threads = torch.get_num_threads()
        for member, task in zip(self.runs, tasks, strict=True):
            thread = threading.Thread(target=self._thread, args=(member, task, threads), name=member.label, daemon=True)
            self.threads[member] = thread
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []), shared_splits(), _formats_kept():
            for thread in self.threads.values():
                thread.start()
            self._give(self.runs[0])
            try:
                for thread in self.threads.values():
                    thread.join()
            except KeyboardInterrupt:
                self._stop()
                raise
        return [member.result for member in self.runs]

    def _thread(self, member: ConcurrentRun, task: Callable[[ConcurrentRun], T], threads: int) -> None:
        torch.set_num_threads(threads)  # OpenMP keeps this number for each thread
        member.go.acquire()
        try:
            self._refuse_stopped(member)
            with torch.cuda.stream(member.stream) if member.stream is not None else contextlib.nullcontext():
                member.result = task(member)
                if member.stream is not None:
                    member.stream.synchronize()
        except BaseException as error:
            member.result = error
        finally:
            member.alive = False
            self._give(self._after(member))

    # Turns: only the holder moves, so nothing below needs a lock

    def turn(self, member: ConcurrentRun) -> None:
        """Lets every other member go on to its next step, or its end, before this one does."""
        following = self._after(member)
        if following is not member:
            with _formats_kept():
                self._give(following)
                member.go.acquire()
        self._refuse_stopped(member)

    def _after(self, member: ConcurrentRun) -> ConcurrentRun | None:
        start = self.runs.index(member) + 1
        ring = (*self.runs[start:], *self.runs[:start])
        return next((other for other in ring if other.alive), None)

    def _give(self, member: ConcurrentRun | None) -> None:
        self.holder = member
        if member is not None:
            member.go.release()

    def _refuse_stopped(self, member: ConcurrentRun) -> None:
        if self.stopped:
            member.stopping = True
            raise KeyboardInterrupt

    def _stop(self) -> None:
        """Ends every member as Ctrl-C ends a run of its own: the holder where it is, the others at their turn."""
        self.stopped = True
        while any(thread.is_alive() for thread in self.threads.values()):
            holder = self.holder
            if holder is not None and holder.alive and not holder.stopping:
                holder.stopping = True
                where, what = ctypes.c_ulong(self.threads[holder].ident or 0), ctypes.py_object(KeyboardInterrupt)
                ctypes.pythonapi.PyThreadState_SetAsyncExc(where, what)
            time.sleep(0.02)

    # Steps together

    def together(self, member: ConcurrentRun) -> None:
        """Does the coming step of a whole stack if this member leads one; else leaves the member to itself."""
        stack = self._stack(member)
        if stack is None or stack.members[0] is not member or not stack.ready():
            return
        if not stack.stacks_now():
            return
        windows = [other.window[0] for other in stack.members if other.window is not None]
        try:
            with self._common(stack.members):
                stack.joint.perform(windows)
        except Exception as error:
            for other in stack.members:
                other.error = error
        for other in stack.members:
            other.taken = True

    def _stack(self, member: ConcurrentRun) -> _Stacking | None:
        """The stack that this member is in, made when its members are all there for the first time."""
        if self.stack is False:
            return None
        if member.kind is None:
            self._tell(f"{member.label}: unstacked, since {member.why_alone}.")
            return None
        alike = [other for other in self.runs if other.alive and other.kind == member.kind]
        known = self.stacks.get(member.kind)
        if known is not None and known.of(alike):
            return known if known.use else None
        if any(other.window is None for other in alike):
            return None  # not all have come as far
        self.stacks[member.kind] = found = _Stacking(self, alike)
        return found if found.use else None

    def form_of(self, member: ConcurrentRun) -> tuple[str, str] | None:
        """How a member's steps are done by now (`stacked`, `unstacked`, `both`), and why; None: not known yet."""
        if self.stack is False:
            return "unstacked", "stack: false"
        if member.kind is None:
            return "unstacked", member.why_alone
        stack = self.stacks.get(member.kind)
        return (stack.form, stack.why) if stack is not None and stack.has(member) else None

    def _tell(self, text: str) -> None:
        if text not in self.told:
            self.told.add(text)
            self.say(text)

    @contextlib.contextmanager
    def _common(self, members: Sequence[ConcurrentRun]) -> Iterator[None]:
        """One stream for a joint step, after what its members have launched and before what they launch next."""
        if self.common is None:
            yield
            return
        for member in members:
            assert member.stream is not None
            self.common.wait_stream(member.stream)
        with torch.cuda.stream(self.common):
            yield
        for member in members:
            assert member.stream is not None
            member.stream.wait_stream(self.common)

    def synchronise(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


class _Stacking:
    """Whether the members of one kind are stacked: what speaks against it, and which form is the faster.

    Args:
        members: all of one kind, each with a batch at hand.
    """

    joint: JointStep

    def __init__(self, gang: Dispatcher[Any], members: Sequence[ConcurrentRun]) -> None:
        self.gang, self.members = gang, list(members)
        self.runners = [member.runner for member in members]
        self.rounds, self.since = 0, 0.0
        self.spent: dict[bool, list[float]] = {True: [], False: []}
        refused = self._refused()
        self.use = not refused
        self.trying = self.use and gang.stack == "auto"
        self.why = refused or (f"both are timed in turn; {self.same}" if self.trying else f"stack: true; {self.same}")
        if refused:
            gang.say(f"{', '.join(member.label for member in members)}: unstacked, since {refused}.")
        elif not self.trying:
            gang.say(f"{len(members)} runs step as one stack ({self.same}).")

    @property
    def form(self) -> str:
        return "both" if self.trying else "stacked" if self.use else "unstacked"

    def has(self, member: ConcurrentRun) -> bool:
        """Whether a member is in it, with the runner that it was made for."""
        return member in self.members and self.runners[self.members.index(member)] is member.runner

    def _refused(self) -> str:
        """Why these members are not stacked, in words; makes the stack where nothing speaks against it."""
        gang, runners = self.gang, [runner for runner in self.runners if runner is not None]
        if len(runners) < 2:
            return "no other run is left to stack with" if gang.stacks else "no two runs have students of one kind"
        if any(getattr(runner.perform, "__func__", None) is not Runner.execute for runner in runners) and gang.stacks:
            return "the others' captured steps stay as they are"  # their memory must not move
        if not self.ready():
            return "their batches differ in size"
        windows = [member.window[0] for member in self.members if member.window is not None]
        try:
            with gang._common(self.members):
                exact, own = stacking_error(runners, windows)
        except Exception as error:  # whatever a network of the user's does when its channels are others'
            return f"stacked, the student does not run ({' '.join(str(error).split())[:200]})"
        if not exact <= EXACT:
            return f"stacked, the student gives other values (by {exact:.1e} of the largest, in float64)"
        self.same = "the same bits as unstacked" if own == 0.0 else f"rounding of up to {own:.0e} apart from unstacked"
        if gang.stack == "auto" and own > 0.0 and gang.device.type == "cpu":
            return (
                f"on this CPU a stack rounds otherwise ({self.same}); hydra.launcher.stack=true takes it all the same"
            )
        with gang._common(self.members):
            self.joint = JointStep(runners, gang.say)
        return ""

    def of(self, members: Sequence[ConcurrentRun]) -> bool:
        """Whether these are its members, with the runners that it was made for."""
        now = [(id(member), id(member.runner)) for member in members]
        return now == [(id(m), id(r)) for m, r in zip(self.members, self.runners, strict=True)]

    def ready(self) -> bool:
        """Whether every member has a batch, and all batches are of one shape."""
        windows = [member.window for member in self.members]
        return all(w is not None and len(w) == 1 for w in windows) and len({_shapes(w) for w in windows}) == 1

    def stacks_now(self) -> bool:
        """Whether the coming round is a joint one; while both forms are tried, they alternate by chunks."""
        if not self.trying:
            return self.use
        number, inside = divmod(self.rounds, CHUNK)
        if inside == 0:
            self.gang.synchronise()
            now = time.perf_counter()
            if number > 2:  # the first chunk of each form warms up
                self.spent[number % 2 == 0].append(now - self.since)
            self.since = now
            if number == CHUNKS:
                return self._choose()
        self.rounds += 1
        return number % 2 == 1

    def _choose(self) -> bool:
        stacked, alone = (statistics.median(self.spent[form]) / CHUNK for form in (True, False))
        self.trying, self.use = False, stacked < alone
        form = "as one stack" if self.use else "each by itself"
        self.why = f"{1000 * stacked:.1f} ms a round stacked, {1000 * alone:.1f} ms unstacked ({self.same})"
        self.gang.say(f"{len(self.members)} runs step {form}: {self.why}.")
        return self.use


def _shapes(window: Sequence[Batch] | None) -> tuple[Any, ...]:
    fields = ((s, n, v.shape, v.dtype) for batch in window or () for s, own in batch.items() for n, v in own.items())
    return tuple(fields)


def _nothing(window: Sequence[Batch]) -> None:
    """The work of a step that has been done."""


@contextlib.contextmanager
def _formats_kept() -> Iterator[None]:
    """Puts the number formats of the process back, which each member sets for its stage."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before
