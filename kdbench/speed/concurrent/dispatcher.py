"""Concurrent runs in one process: each run has its own thread, and the runs take turns, one step each.

Only one run executes at a time. The runner of each run executes steps through a `ConcurrentStep`, which passes the
turn to the next run before each step. State that exists once per process (torch's random generators, TF32 settings)
is restored at each turn. On CUDA, every run launches its kernels into its own stream and continues without waiting,
so that the GPU works on several steps at the same time. If students of several runs have the same architecture, the
steps of these runs may be computed together, as a joint step (module `joint_step`).
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
"""Number of rounds (one step of every run) that are timed together in the comparison of joint and separate steps."""

TRIAL_CHUNKS = 8
"""Number of chunks (groups of timed rounds) in the comparison of joint and separate steps.

Chunks of joint steps and chunks of separate steps alternate. The first chunk of each kind is a warm-up."""


class ConcurrentRun:
    """One of several training runs in one process, whose steps a dispatcher alternates.

    Args:
        dispatcher: the dispatcher.
        label: short text that distinguishes the run, such as `seed=2`.

    Attributes:
        runner: training loop of the run's present stage.
        stacking_key: key that is equal for runs that may execute joint steps (one computation for several runs). None
            for a run that must execute its steps alone.
        obstacle: reason why the run must execute its steps alone, or an empty string.
        window: micro-batches of the next step; None until the micro-batches are available.
        exception: exception of the last joint step, until the run raises this exception.
        result: return value of the run's task, or the exception that ended the task.
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
        """Lets the dispatcher schedule the steps of a runner, and waits until every other run has had one turn.

        The turn of a run ends before the run's next step, or at the end of the run.
        """
        self.runner, self.recorded_mode = runner, None
        stacks = self.dispatcher.stack is not False
        self.obstacle = stacking_obstacle(runner) if stacks else ""
        self.stacking_key = stacking_key(runner) if stacks and not self.obstacle else None
        runner.use(ConcurrentStep(self, runner, runner.strategy))
        self.dispatcher.pass_turn(self)

    def record_mode(self) -> None:
        """Records in the run's manifest whether its next steps are joint or separate, and the reason.

        A joint step computes one step of several runs together. An unchanged mode is not recorded again.
        """
        runner, mode = self.runner, self.dispatcher.mode_of(self)
        if runner is None or mode is None or mode == self.recorded_mode:
            return
        self.recorded_mode = mode
        position = str(runner.progress.steps_done)
        labels = [run.label for run in self.dispatcher.runs]
        steps = {runner.stage.name: {position: {"form": mode[0], "why": mode[1]}}}
        runner.notices.record({"concurrent": {"label": self.label, "runs": labels, "from_step": steps}})


class ConcurrentStep:
    """Step strategy that waits for the turn of its run, then executes a joint step with other runs or a separate step.

    Args:
        run: the run, one of several in the process.
        runner: training loop of the run's present stage.
        strategy: step strategy that executes separate steps.
    """

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
    """Dispatcher of concurrent runs: each run is a task in its own thread, and the runs take turns, one step each.

    Args:
        labels: short text for each run, such as `seed=2`.
        device: device of all runs.
        stack: True: runs whose students have the same architecture execute joint steps, one computation for all of
            these runs. False: each run executes its own steps. `auto`: joint and separate steps are timed, and the
            faster kind is used. On the CPU, `auto` uses joint steps only if results are bit-identical.
        notice: function that receives messages to the user about several runs.
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
        """Executes one task for each run, and returns the result or the exception of each task, in the same order.

        Raises:
            KeyboardInterrupt: the user pressed Ctrl-C, and all runs have ended.
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
        """Lets every other run continue until its next step or its end, then returns, so that `run` continues."""
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
        """Raises KeyboardInterrupt in every run: in the current run at once, in all other runs at their next turn."""
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
        """Executes one joint step of all runs in a stack (runs with equal students), if `run` is the first of them.

        If `run` is a later run of its stack, or if the next step is separate, the method does nothing.
        """
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
        """Returns the stack (group of runs with equal students) of a run; None if the run executes its steps alone.

        A stack is created as soon as each of its runs has the batch of its next step.
        """
        if self.stack is False:
            return None
        if run.stacking_key is None:
            self._report(f"{run.label}: this run is not stacked with other runs, because {run.obstacle}.")
            return None
        alike = [each for each in self.runs if each.alive and each.stacking_key == run.stacking_key]
        stack = self.stacks.get(run.stacking_key)
        if stack is None or not stack.consists_of(alike):
            if any(each.window is None for each in alike):
                return None  # not all have come as far
            stack = self.stacks[run.stacking_key] = RunStack(self, alike)
        return stack if stack.enabled else None

    def mode_of(self, run: ConcurrentRun) -> tuple[str, str] | None:
        """Returns the mode of a run's steps (`stacked`, `unstacked` or `both`) and the reason for the mode.

        Stacked steps compute one step of several runs together. The result is None if the mode is not decided yet.
        """
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
        """Orders the CUDA kernels of the `with` block after all earlier, and before all later kernels of the runs."""
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
    """Group of runs with equal students, which decides whether steps are joint (one computation) or separate.

    Args:
        dispatcher: dispatcher of the runs.
        runs: runs with the same stacking key. The batch of each run's next step must be available.

    Attributes:
        strategy: step strategy that executes joint steps.
        enabled: False if all steps are separate.
        reason: reason for the present choice, which the manifests of the runs record.
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
            labels = ", ".join(run.label for run in runs)
            dispatcher.notice(f"{labels}: the student is not stacked with students of other runs, because {obstacle}.")
        elif not self.trying:
            dispatcher.notice(f"{len(runs)} runs step as one stack ({self.accuracy}).")

    @property
    def mode(self) -> str:
        return "both" if self.trying else "stacked" if self.enabled else "unstacked"

    def contains(self, run: ConcurrentRun) -> bool:
        """Returns True if a run belongs to the stack, and still uses the training loop that the stack was built for."""
        return run in self.runs and self.runners[self.runs.index(run)] is run.runner

    def consists_of(self, runs: Sequence[ConcurrentRun]) -> bool:
        """Returns whether this stack (one network of grouped layers) was built from exactly these runs and their
        current training loops."""
        present = [(id(run), id(run.runner)) for run in runs]
        return present == [(id(run), id(runner)) for run, runner in zip(self.runs, self.runners, strict=True)]

    def _prepare(self) -> str:
        """Builds the joint step of the runs, and returns an empty string, or the reason why it is not possible."""
        dispatcher, runners = self.dispatcher, [runner for runner in self.runners if runner is not None]
        if len(runners) < 2:
            return "there is no other run with an equal student" if dispatcher.stacks else "no two students are equal"
        if dispatcher.stacks and any(not _steps_eagerly(runner) for runner in runners):
            return "their steps are recorded as CUDA graphs, and stacking would move the memory of the recordings"
        if not self.has_equal_batches():
            return "their batches differ in size"
        try:
            with dispatcher.joint_section(self.runs):
                exact, in_precision = stacking_errors(runners, self.micro_batches())
        except Exception as error:  # anything that a user's network raises when its channels belong to several runs
            return f"the stacked student raises an error ({' '.join(str(error).split())[:200]})"
        if not exact <= EXACT:
            return f"the stacked student gives other values (difference in float64: {exact:.1e} of the largest value)"
        equal = in_precision == 0.0
        self.accuracy = "the same bits as unstacked" if equal else f"equal to unstacked up to {in_precision:.0e}"
        if dispatcher.stack == "auto" and not equal and dispatcher.device.type == "cpu":
            return f"rounding differs on this CPU ({self.accuracy}); hydra.launcher.stack=true stacks nevertheless"
        with dispatcher.joint_section(self.runs):
            self.strategy = joint_strategy(JointStep(runners), dispatcher.notice)
        return ""

    def micro_batches(self) -> list[MicroBatch]:
        """Returns one micro-batch for each run: the batch of the run's next step."""
        return [run.window[0] for run in self.runs if run.window is not None]

    def has_equal_batches(self) -> bool:
        """Returns True if the next step of every run has one micro-batch, and all micro-batches have the same shape."""
        windows = [run.window for run in self.runs if run.window is not None and len(run.window) == 1]
        return len(windows) == len(self.runs) and len({shape_of(window) for window in windows}) == 1

    def steps_jointly_now(self) -> bool:
        """Returns True if the next round (one step of every run) is a joint step, computed for all runs together.

        During the comparison of joint and separate steps, the choice changes every `ROUNDS_PER_CHUNK` rounds.
        """
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
    """Restores the TF32 settings of the process after the block, because each run changes them for its stage."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before
