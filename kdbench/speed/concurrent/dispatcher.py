"""Concurrent runs in one process: each in a thread of its own, one executes at a time, and they alternate by steps.

A run does not know about the others. Its runner executes steps through a `ConcurrentStep`, which passes the turn to the
next run before each step. State that exists once per process (torch's generators, number formats) is restored at each
turn. On CUDA every run launches its kernels into a stream of its own and continues without waiting, so that the device
works on several steps at the same time. Runs with students of the same architecture may step jointly (`joint_step`).
"""

from __future__ import annotations

import contextlib
import ctypes
import statistics
import threading
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, Generic, Literal, TypeVar

import torch

from kdbench.data.loading.batch import MicroBatch, Window
from kdbench.data.loading.build import shared_splits
from kdbench.engine.train.runner import Runner
from kdbench.engine.train.steps import EagerStep, StepStrategy
from kdbench.speed.concurrent.joint_step import (
    EXACT,
    JointStep,
    joint_strategy,
    stacking_errors,
    stacking_key,
    stacking_obstacle,
)
from kdbench.speed.cuda_graph import shape_of

T = TypeVar("T")
StackOption = Literal["auto", True, False]

ROUNDS_PER_CHUNK = 5
"""Rounds that are timed together while both ways of stepping are tried."""

TRIAL_CHUNKS = 8
"""Chunks of such a trial, alternating between both ways; the first chunk of each warms up."""


class ConcurrentRun:
    """One of several runs that the dispatcher alternates.

    Args:
        label: what distinguishes it, such as `seed=2`.

    Attributes:
        runner: of the present stage.
        stacking_key: equal for runs that may step jointly; None if this one may not, for the reason `obstacle`.
        window: the batch of the coming step, once it is available.
        error: of the last joint step.
        result: of the whole run, or its exception.
    """

    def __init__(self, dispatcher: Dispatcher[Any], label: str) -> None:
        self.dispatcher, self.label = dispatcher, label
        self.turn = threading.Semaphore(0)
        self.alive, self.stopping = True, False
        self.runner: Runner | None = None
        self.stacking_key: Hashable | None = None
        self.obstacle = ""
        self.recorded_mode: tuple[str, str] | None = None
        self.window: Window | None = None
        self.stepped_jointly = False
        self.exception: BaseException | None = None
        self.result: Any = None
        self.stream = torch.cuda.Stream(dispatcher.device) if dispatcher.device.type == "cuda" else None

    def join(self, runner: Runner) -> None:
        """Lets the dispatcher schedule the steps of a runner; returns when every other run has come as far."""
        self.runner, self.recorded_mode = runner, None
        stacks = self.dispatcher.stack is not False
        self.obstacle = stacking_obstacle(runner) if stacks else ""
        self.stacking_key = stacking_key(runner) if stacks and not self.obstacle else None
        runner.use(ConcurrentStep(self, runner, runner.strategy))
        self.dispatcher.pass_turn(self)

    def record_mode(self) -> None:
        """Records in the manifest how the steps are executed from the coming one on, whenever that changes."""
        runner, mode = self.runner, self.dispatcher.mode_of(self)
        if runner is None or mode is None or mode == self.recorded_mode:
            return
        self.recorded_mode = mode
        position = str(runner.progress.steps_done)
        labels = [run.label for run in self.dispatcher.runs]
        steps = {runner.stage.name: {position: {"form": mode[0], "why": mode[1]}}}
        runner.notices.record({"concurrent": {"label": self.label, "runs": labels, "from_step": steps}})


class ConcurrentStep:
    """A step strategy: waits for the run's turn, then steps jointly with other runs, or by the run's own strategy."""

    def __init__(self, run: ConcurrentRun, runner: Runner, strategy: StepStrategy) -> None:
        self.concurrent_run, self.runner, self.strategy = run, runner, strategy

    def run(self, window: Window) -> None:
        run, runner = self.concurrent_run, self.runner
        run.window = window
        run.dispatcher.pass_turn(run)  # when it returns, every other run has a batch available too
        runner.timer.restart()
        if not run.stepped_jointly:
            run.dispatcher.step_jointly(run)
        run.record_mode()
        run.window = None
        if run.exception is not None:
            error, run.exception = run.exception, None
            raise error
        if run.stepped_jointly:
            run.stepped_jointly = False
            return
        runner.seed_generators()  # another run has seeded them for itself meanwhile
        self.strategy.run(window)

    @property
    def is_eager(self) -> bool:
        return isinstance(self.strategy, EagerStep)


class Dispatcher(Generic[T]):
    """Executes tasks, each in a thread, that take turns by steps.

    Args:
        labels: what distinguishes each run.
        device: of all runs.
        stack: whether runs with equal students step jointly: `auto` times both ways and keeps the faster one, on the
            CPU only if both give the same bits.
        notice: receives messages about the runs as a whole.
    """

    def __init__(
        self,
        labels: Sequence[str],
        device: torch.device,
        *,
        stack: StackOption = "auto",
        notice: Callable[[str], None] = print,
    ) -> None:
        self.device, self.stack, self.notice = device, stack, notice
        self.runs = [ConcurrentRun(self, label) for label in labels]
        self.joint_stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.stopped = False
        self.current: ConcurrentRun | None = None
        self.threads: dict[ConcurrentRun, threading.Thread] = {}
        self.stacks: dict[Hashable, RunStack] = {}
        self.reported: set[str] = set()

    def run_all(self, tasks: Sequence[Callable[[ConcurrentRun], T]]) -> list[T | BaseException]:
        """Executes one task for each run; returns the result or the exception of each, in order.

        Raises:
            KeyboardInterrupt: the user interrupted; no run executes any more.
        """
        threads = torch.get_num_threads()
        for run, task in zip(self.runs, tasks, strict=True):
            thread = threading.Thread(target=self._thread, args=(run, task, threads), name=run.label, daemon=True)
            self.threads[run] = thread
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices), shared_splits(), _number_formats_restored():
            for thread in self.threads.values():
                thread.start()
            self._give_turn(self.runs[0])
            try:
                for thread in self.threads.values():
                    thread.join()
            except KeyboardInterrupt:
                self._stop()
                raise
        return [run.result for run in self.runs]

    def _thread(self, run: ConcurrentRun, task: Callable[[ConcurrentRun], T], threads: int) -> None:
        torch.set_num_threads(threads)  # OpenMP keeps this number for each thread
        run.turn.acquire()
        try:
            self._raise_if_stopped(run)
            with torch.cuda.stream(run.stream) if run.stream is not None else contextlib.nullcontext():
                run.result = task(run)
                if run.stream is not None:
                    run.stream.synchronize()
        except BaseException as error:
            run.result = error
        finally:
            run.alive = False
            self._give_turn(self._next(run))

    # Turns. Only the run whose turn it is executes, so nothing below needs a lock.

    def pass_turn(self, run: ConcurrentRun) -> None:
        """Lets every other run continue to its next step, or to its end; returns when it is this run's turn again."""
        following = self._next(run)
        if following is not run:
            with _number_formats_restored():
                self._give_turn(following)
                run.turn.acquire()
        self._raise_if_stopped(run)

    def _next(self, run: ConcurrentRun) -> ConcurrentRun | None:
        start = self.runs.index(run) + 1
        ring = (*self.runs[start:], *self.runs[:start])
        return next((candidate for candidate in ring if candidate.alive), None)

    def _give_turn(self, run: ConcurrentRun | None) -> None:
        self.current = run
        if run is not None:
            run.turn.release()

    def _raise_if_stopped(self, run: ConcurrentRun) -> None:
        if self.stopped:
            run.stopping = True
            raise KeyboardInterrupt

    def _stop(self) -> None:
        """Ends every run as Ctrl-C ends a single one: the current run where it is, the others at their turn."""
        self.stopped = True
        while any(thread.is_alive() for thread in self.threads.values()):
            current = self.current
            if current is not None and current.alive and not current.stopping:
                current.stopping = True
                thread_id = ctypes.c_ulong(self.threads[current].ident or 0)
                ctypes.pythonapi.PyThreadState_SetAsyncExc(thread_id, ctypes.py_object(KeyboardInterrupt))
            time.sleep(0.02)

    # Joint steps

    def step_jointly(self, run: ConcurrentRun) -> None:
        """Executes the coming step of a whole stack if this run is its first one; otherwise does nothing."""
        stack = self._stack_of(run)
        if stack is None or stack.runs[0] is not run or not stack.has_equal_batches() or not stack.steps_jointly_now():
            return
        try:
            with self.joint_section(stack.runs):
                stack.strategy.run(stack.micro_batches())
        except Exception as error:
            for member in stack.runs:
                member.exception = error
        for member in stack.runs:
            member.stepped_jointly = True

    def _stack_of(self, run: ConcurrentRun) -> RunStack | None:
        """Returns the stack that contains a run, built when all its runs have a batch for the first time."""
        if self.stack is False:
            return None
        if run.stacking_key is None:
            self._report(f"{run.label}: not stacked, because {run.obstacle}.")
            return None
        alike = [each for each in self.runs if each.alive and each.stacking_key == run.stacking_key]
        stack = self.stacks.get(run.stacking_key)
        if stack is None or not stack.consists_of(alike):
            if any(each.window is None for each in alike):
                return None  # not all have come as far
            stack = self.stacks[run.stacking_key] = RunStack(self, alike)
        return stack if stack.enabled else None

    def mode_of(self, run: ConcurrentRun) -> tuple[str, str] | None:
        """Returns how a run's steps are executed (`stacked`, `unstacked`, `both`) and why; None: not decided yet."""
        if self.stack is False:
            return "unstacked", "stack: false"
        if run.stacking_key is None:
            return "unstacked", run.obstacle
        stack = self.stacks.get(run.stacking_key)
        return (stack.mode, stack.reason) if stack is not None and stack.contains(run) else None

    def _report(self, text: str) -> None:
        if text not in self.reported:
            self.reported.add(text)
            self.notice(text)

    @contextlib.contextmanager
    def joint_section(self, runs: Sequence[ConcurrentRun]) -> Iterator[None]:
        """Orders a joint step between the kernels that its runs have launched and their next kernels."""
        if self.joint_stream is None:
            yield
            return
        for run in runs:
            assert run.stream is not None
            self.joint_stream.wait_stream(run.stream)
        with torch.cuda.stream(self.joint_stream):
            yield
        for run in runs:
            assert run.stream is not None
            run.stream.wait_stream(self.joint_stream)

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


class RunStack:
    """Runs whose students can be stacked: obstacles, and which way of stepping is faster.

    Args:
        runs: all with the same stacking key, each with a batch available.

    Attributes:
        strategy: executes joint steps.
        enabled: whether steps are joint at all.
        reason: of the present mode, for the manifest.
    """

    strategy: StepStrategy

    def __init__(self, dispatcher: Dispatcher[Any], runs: Sequence[ConcurrentRun]) -> None:
        self.dispatcher, self.runs = dispatcher, list(runs)
        self.runners = [run.runner for run in runs]
        self.rounds, self.chunk_start = 0, 0.0
        self.seconds: dict[bool, list[float]] = {True: [], False: []}
        obstacle = self._prepare()
        self.enabled = not obstacle
        self.trying = self.enabled and dispatcher.stack == "auto"
        forced = f"stack: true; {self.accuracy}" if self.enabled else ""
        self.reason = obstacle or (f"both are timed in turn; {self.accuracy}" if self.trying else forced)
        if obstacle:
            dispatcher.notice(f"{', '.join(run.label for run in runs)}: not stacked, because {obstacle}.")
        elif not self.trying:
            dispatcher.notice(f"{len(runs)} runs step as one stack ({self.accuracy}).")

    @property
    def mode(self) -> str:
        return "both" if self.trying else "stacked" if self.enabled else "unstacked"

    def contains(self, run: ConcurrentRun) -> bool:
        """Returns whether a run belongs to the stack, with the runner that the stack was built for."""
        return run in self.runs and self.runners[self.runs.index(run)] is run.runner

    def consists_of(self, runs: Sequence[ConcurrentRun]) -> bool:
        """Returns whether these are the stack's runs, with the runners that it was built for."""
        present = [(id(run), id(run.runner)) for run in runs]
        return present == [(id(run), id(runner)) for run, runner in zip(self.runs, self.runners, strict=True)]

    def _prepare(self) -> str:
        """Builds the joint step, or returns the reason why these runs cannot step jointly."""
        dispatcher, runners = self.dispatcher, [runner for runner in self.runners if runner is not None]
        if len(runners) < 2:
            return "no other run is left to stack with" if dispatcher.stacks else "no two runs have equal students"
        if dispatcher.stacks and any(not _steps_eagerly(runner) for runner in runners):
            return "steps that were recorded as CUDA graphs keep their memory"  # stacking would move it
        if not self.has_equal_batches():
            return "their batches differ in size"
        try:
            with dispatcher.joint_section(self.runs):
                exact, in_precision = stacking_errors(runners, self.micro_batches())
        except Exception as error:  # anything that a user's network raises when its channels belong to several runs
            return f"the stacked student does not run ({' '.join(str(error).split())[:200]})"
        if not exact <= EXACT:
            return f"the stacked student gives other values (by {exact:.1e} of the largest, in float64)"
        equal = in_precision == 0.0
        self.accuracy = "the same bits as unstacked" if equal else f"equal up to rounding of {in_precision:.0e}"
        if dispatcher.stack == "auto" and not equal and dispatcher.device.type == "cpu":
            return f"on this CPU stacking rounds differently ({self.accuracy}); hydra.launcher.stack=true accepts that"
        with dispatcher.joint_section(self.runs):
            self.strategy = joint_strategy(JointStep(runners), dispatcher.notice)
        return ""

    def micro_batches(self) -> list[MicroBatch]:
        """Returns the micro-batch of each run."""
        return [run.window[0] for run in self.runs if run.window is not None]

    def has_equal_batches(self) -> bool:
        """Returns whether every run has one micro-batch available, all of one shape."""
        windows = [run.window for run in self.runs if run.window is not None and len(run.window) == 1]
        return len(windows) == len(self.runs) and len({shape_of(window) for window in windows}) == 1

    def steps_jointly_now(self) -> bool:
        """Returns whether the next round is a joint one. During the trial both ways alternate by chunks of rounds."""
        if not self.trying:
            return self.enabled
        chunk, round_in_chunk = divmod(self.rounds, ROUNDS_PER_CHUNK)
        if round_in_chunk == 0:
            self.dispatcher.synchronize()
            now = time.perf_counter()
            if chunk > 2:  # the first chunk of each way warms up
                self.seconds[chunk % 2 == 0].append(now - self.chunk_start)
            self.chunk_start = now
            if chunk == TRIAL_CHUNKS:
                return self._choose()
        self.rounds += 1
        return chunk % 2 == 1

    def _choose(self) -> bool:
        stacked, alone = (statistics.median(self.seconds[jointly]) / ROUNDS_PER_CHUNK for jointly in (True, False))
        self.trying, self.enabled = False, stacked < alone
        times = f"{1000 * stacked:.1f} ms a round stacked, {1000 * alone:.1f} ms unstacked"
        self.reason = f"{times} ({self.accuracy})"
        choice = "as one stack" if self.enabled else "separately"
        self.dispatcher.notice(f"{len(self.runs)} runs step {choice}: {self.reason}.")
        return self.enabled


def _steps_eagerly(runner: Runner) -> bool:
    strategy = runner.strategy
    return isinstance(strategy, ConcurrentStep) and strategy.is_eager


@contextlib.contextmanager
def _number_formats_restored() -> Iterator[None]:
    """Restores the number formats of the process afterwards; each run sets them for its stage."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before
