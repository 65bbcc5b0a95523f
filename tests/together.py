"""Triton's interpreter with programs that take turns, so that they can wait for each other.

It runs the programs of a grid one after another: at a barrier the first would wait for ever. Here each has a thread of
its own, only one of which runs at a time; at each atomic operation it hands over to another one, drawn at random.
"""

import inspect
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import triton.runtime.interpreter as interpreter

PATIENCE = 60.0  # seconds that a program waits for its turn


class Turns:
    """Who may run: one program at a time."""

    def __init__(self, programs: list[tuple[int, int, int]], seed: int) -> None:
        self.waiting = {program: threading.Semaphore(0) for program in programs}
        self.random = random.Random(seed)
        self.failure: BaseException | None = None
        self.done = threading.Event()

    def next(self) -> None:
        """Wake one of those that are left."""
        if not self.waiting:
            self.done.set()
            return
        program = self.random.choice(list(self.waiting))
        interpreter.interpreter_builder.set_grid_idx(*program)
        self.waiting[program].release()

    def wait(self, program: tuple[int, int, int]) -> None:
        if not self.waiting[program].acquire(timeout=PATIENCE):
            raise TimeoutError(f"program {program} had no turn for {PATIENCE} s")
        if self.failure is not None:
            raise SystemExit  # another one failed: all end

    def run(self, program: tuple[int, int, int], work: Any) -> None:
        try:
            self.wait(program)
            work()
        except SystemExit:
            pass
        except BaseException as error:
            self.failure = error
        finally:
            del self.waiting[program]
            self.next()


@contextmanager
def together(seed: int = 0) -> Iterator[None]:
    """Within, the programs of each interpreted kernel run at a time, in an order that `seed` draws."""
    executor, builder = interpreter.GridExecutor, interpreter.InterpreterBuilder
    call, atomic = executor.__call__, builder.create_atomic_rmw
    turns: list[Turns] = []
    here = threading.local()

    def run_grid(self: Any, *args: Any, **kwargs: Any) -> None:
        known = inspect.getfullargspec(self.fn).args
        given = inspect.getcallargs(self.fn, *args, **{name: v for name, v in kwargs.items() if name in known})
        scope = interpreter._patch_lang(self.fn)
        try:
            values = {n: v if n in self.constexprs else interpreter._implicit_cvt(v) for n, v in given.items()}
            size = (*self.grid, 1, 1)[:3]
            interpreter.interpreter_builder.set_grid_dim(*size)
            programs = [(x, y, z) for x in range(size[0]) for y in range(size[1]) for z in range(size[2])]
            turn = Turns(programs, seed)
            turns[:] = [turn]

            def work(program: tuple[int, int, int]) -> None:
                here.program = program
                turn.run(program, lambda: self.fn(**values))

            threads = [threading.Thread(target=work, args=(program,), daemon=True) for program in programs]
            for thread in threads:
                thread.start()
            turn.next()
            assert turn.done.wait(PATIENCE), "programs wait for each other for ever"
            if turn.failure is not None:
                raise turn.failure
        finally:
            scope.restore()

    def hand_over(self: Any, *args: Any) -> Any:
        result = atomic(self, *args)
        turns[0].next()
        turns[0].wait(here.program)
        return result

    executor.__call__, builder.create_atomic_rmw = run_grid, hand_over
    try:
        yield
    finally:
        executor.__call__, builder.create_atomic_rmw = call, atomic
