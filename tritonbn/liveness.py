"""Which local variables are read after a statement, before they are written again. In doubt, they are."""

import ast
from collections.abc import Sequence

Names = frozenset[str]
_NONE: Names = frozenset()


class Liveness:
    """The variables of a function's body."""

    def __init__(self, body: Sequence[ast.stmt]) -> None:
        self._after: dict[int, Names] = {}
        self._before: dict[int, Names] = {}
        self._block(body, _NONE, _NONE, _NONE, _NONE)

    def after(self, s: ast.stmt) -> Names:
        """What is read after a statement."""
        return self._after[id(s)]

    def before(self, s: ast.stmt) -> Names:
        """What is read by a statement or after it."""
        return self._before[id(s)]

    def is_last(self, s: ast.stmt, name: str) -> bool:
        """Whether a statement, but for its blocks, reads a variable once, and nobody does afterwards."""
        if sum(reads(part, name) for part in _header(s)) != 1:
            return False
        blocks = [block for block in (getattr(s, "body", []), getattr(s, "orelse", [])) if block]
        if any(name in self.before(block[0]) for block in blocks):
            return False
        return name not in self.after(s) or name in _written(s)

    def _block(self, body: Sequence[ast.stmt], after: Names, exits: Names, again: Names, caught: Names) -> Names:
        """What is read from a block on; exits, again: after break and continue; caught: by handlers around it."""
        for s in reversed(body):
            after |= caught
            self._after[id(s)] = after
            after = self._before[id(s)] = self._statement(s, after, exits, again, caught)
        return after

    def _statement(self, s: ast.stmt, after: Names, exits: Names, again: Names, caught: Names) -> Names:
        if isinstance(s, (ast.Return, ast.Raise)):
            return _read(s) | caught
        if isinstance(s, (ast.Break, ast.Continue)):
            return (exits if isinstance(s, ast.Break) else again) | caught
        if isinstance(s, (ast.If, ast.With)):
            own = frozenset[str]().union(*map(_read, _header(s)))
            orelse = (
                self._block(getattr(s, "orelse", []), after, exits, again, caught) if isinstance(s, ast.If) else own
            )
            return own | orelse | self._block(s.body, after, exits, again, caught)
        if isinstance(s, (ast.For, ast.While)):
            head = _NONE
            while True:
                once = self._block(s.body, head, after, head, caught) | self._block(
                    s.orelse, after, exits, again, caught
                )
                once |= after | _read(s.test if isinstance(s, ast.While) else s.target)
                if once <= head:
                    return head | (_read(s.iter) if isinstance(s, ast.For) else _NONE)
                head |= once
        blocks = [getattr(s, name, []) for name in ("body", "orelse", "finalbody")]
        blocks += [part.body for part in (*getattr(s, "handlers", []), *getattr(s, "cases", []))]
        if any(blocks) and not isinstance(s, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):  # try, match
            anything = _read(s) | after
            for block in blocks:
                self._block(block, anything, exits | anything, again | anything, anything | {"try"})
            return anything
        return (after - _written(s)) | _read(s)


def reads(part: ast.AST, name: str) -> int:
    """How often an expression reads a variable, at most."""
    if isinstance(part, ast.IfExp):
        return reads(part.test, name) + max(reads(part.body, name), reads(part.orelse, name))
    own = isinstance(part, ast.Name) and part.id == name and isinstance(part.ctx, ast.Load)
    return own + sum(reads(child, name) for child in ast.iter_child_nodes(part))


def _header(s: ast.stmt) -> list[ast.AST]:
    """The parts of a statement that come before its blocks."""
    if isinstance(s, (ast.If, ast.While)):
        return [s.test]
    if isinstance(s, ast.For):
        return [s.iter]
    return [*s.items] if isinstance(s, ast.With) else [s]


def _read(part: ast.AST) -> Names:
    """The names that it reads or deletes; those that it adds to in place, too."""
    added = [part.target] if isinstance(part, ast.AugAssign) else []
    names = [n for n in ast.walk(part) if isinstance(n, ast.Name) and not isinstance(n.ctx, ast.Store)]
    return frozenset(n.id for n in (*names, *added) if isinstance(n, ast.Name))


def _written(s: ast.stmt) -> Names:
    """The names that it writes in any case."""
    targets = s.targets if isinstance(s, ast.Assign) else [s.target] if isinstance(s, ast.AnnAssign) and s.value else []
    return frozenset(target.id for target in targets if isinstance(target, ast.Name))
