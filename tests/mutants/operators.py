"""Small faults in Python source: each is one edit that a test of the module should notice.

Left alone is what no test can check: texts, annotations, what a log line says, numbers named at module level, and
pauses of such a length.
"""

from __future__ import annotations

import ast
import difflib
from dataclasses import dataclass
from typing import Final

COMPARISONS: Final[dict[type[ast.cmpop], ast.cmpop]] = {
    ast.Lt: ast.LtE(),
    ast.LtE: ast.Lt(),
    ast.Gt: ast.GtE(),
    ast.GtE: ast.Gt(),
    ast.Eq: ast.NotEq(),
    ast.NotEq: ast.Eq(),
    ast.Is: ast.IsNot(),
    ast.IsNot: ast.Is(),
    ast.In: ast.NotIn(),
    ast.NotIn: ast.In(),
}
ARITHMETIC: Final[dict[type[ast.operator], ast.operator]] = {
    ast.Add: ast.Sub(),
    ast.Sub: ast.Add(),
    ast.Mult: ast.Add(),
    ast.Div: ast.Mult(),
    ast.FloorDiv: ast.Mult(),
    ast.Mod: ast.FloorDiv(),
}
CALLS: Final = {"min": "max", "max": "min", "any": "all", "all": "any", "reversed": "list"}
LOGGERS: Final = frozenset({"log", "logger"})


@dataclass(frozen=True, slots=True)
class Edit:
    """Replace source between two offsets in bytes."""

    start: int
    end: int
    text: str
    line: int
    kind: str

    def apply(self, source: str) -> str:
        """The source with this fault."""
        raw = source.encode()
        return (raw[: self.start] + self.text.encode() + raw[self.end :]).decode()

    def diff(self, source: str) -> str:
        """The changed lines, without context."""
        lines = difflib.unified_diff(source.splitlines(), self.apply(source).splitlines(), n=0, lineterm="")
        return "\n".join(line for line in lines if not line.startswith(("---", "+++", "@@")))


def edits_of(source: str) -> list[Edit]:
    """All edits of a module, in the order of its lines. A few of them may be no valid Python: see `is_valid`."""
    collector = _Collector(source)
    collector.visit(ast.parse(source))
    return sorted(set(collector.edits), key=lambda edit: (edit.start, edit.end, edit.text))


def is_valid(source: str) -> bool:
    """Whether a source can be parsed. For all edits of a package this takes seconds."""
    try:
        ast.parse(source)
    except SyntaxError:
        return False
    return True


class _Collector(ast.NodeVisitor):
    def __init__(self, source: str) -> None:
        self.edits: list[Edit] = []
        self._starts = [0]
        for line in source.encode().splitlines(keepends=True):
            self._starts.append(self._starts[-1] + len(line))

    # ---------------------------------------------------------------- statements
    def visit_If(self, node: ast.If) -> None:
        if isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            return
        self._negate(node.test)
        self.generic_visit(node)

    def visit_IfExp(self, node: ast.IfExp) -> None:
        self._negate(node.test)
        self.generic_visit(node)

    def visit_comprehension(self, node: ast.comprehension) -> None:
        for condition in node.ifs:
            self._negate(condition)
        self.generic_visit(node)

    def visit_Expr(self, node: ast.Expr) -> None:
        if isinstance(node.value, ast.Constant) or _is_log(node.value) or _is_fixed_pause(node.value):
            return
        if isinstance(node.value, ast.Call | ast.Await):
            self._replace(node, "pass", "delete a call")
        self.generic_visit(node)

    def visit_Assign(self, node: ast.Assign) -> None:
        # A constructor that does not store its argument fails at the first use, which no test has to look for.
        is_stored = isinstance(node.value, ast.Name)
        if not is_stored and all(isinstance(target, ast.Attribute | ast.Subscript) for target in node.targets):
            self._replace(node, "pass", "delete an assignment")
        self.visit(node.value)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        name = node.target.id if isinstance(node.target, ast.Name) else ""
        # Tests use the bounds and pauses of a module by their names, so another value changes both.
        is_named_number = name.strip("_").isupper() and (not _has_names(node.value) or _is_number(node.value))
        if node.value is not None and not is_named_number:
            self.visit(node.value)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        self._replace(node, "pass", "delete an assignment")
        self.generic_visit(node)

    def visit_Return(self, node: ast.Return) -> None:
        if node.value is None:
            return
        # `return None` instead of `return False` says the same to an `if`; the constant is an edit of its own.
        if not (isinstance(node.value, ast.Constant) and node.value.value in {None, False}):
            self._replace(node, "return None", "return nothing")
        self.generic_visit(node)

    def visit_Raise(self, node: ast.Raise) -> None:
        self._replace(node, "pass", "delete a raise")

    def visit_Break(self, node: ast.Break) -> None:
        self._replace(node, "continue", "break to continue")

    def visit_Continue(self, node: ast.Continue) -> None:
        self._replace(node, "pass", "delete a continue")

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        # `frozen` and `gc` among the bases say how its values are stored.
        for statement in node.body:
            self.visit(statement)

    def visit_keyword(self, node: ast.keyword) -> None:
        # `zip(strict=True)` guards against defects, and says nothing where there are none.
        if node.arg != "strict":
            self.generic_visit(node)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        # Annotations are for the type checker, and decorators are tested with what they decorate.
        for default in (*node.args.defaults, *node.args.kw_defaults):
            if default is not None:
                self.visit(default)
        for statement in node.body:
            self.visit(statement)

    # ---------------------------------------------------------------- expressions
    def visit_Compare(self, node: ast.Compare) -> None:
        for index, operator in enumerate(node.ops):
            other = COMPARISONS[type(operator)]
            ops = [*node.ops[:index], other, *node.ops[index + 1 :]]
            self._replace(node, ast.Compare(node.left, ops, node.comparators), "comparison")
        self.generic_visit(node)

    def visit_BoolOp(self, node: ast.BoolOp) -> None:
        other = ast.Or() if isinstance(node.op, ast.And) else ast.And()
        self._replace(node, ast.BoolOp(other, node.values), "and/or")
        self.generic_visit(node)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> None:
        if isinstance(node.op, ast.Not):
            self._replace(node, node.operand, "drop not")
        self.generic_visit(node)

    def visit_BinOp(self, node: ast.BinOp) -> None:
        other = ARITHMETIC.get(type(node.op))
        is_text = any(isinstance(side, ast.JoinedStr) or _is_text(side) for side in (node.left, node.right))
        if other is not None and not is_text:
            self._replace(node, ast.BinOp(node.left, other, node.right), "arithmetic")
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        if _is_log(node):
            return
        if isinstance(node.func, ast.Name) and node.func.id in CALLS:
            self._replace(node.func, CALLS[node.func.id], "call")
        self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        if isinstance(node.value, bool):
            self._replace(node, repr(not node.value), "constant")
        elif isinstance(node.value, int | float):
            for step in (1, -1):
                self._replace(node, repr(node.value + step), "constant")

    def visit_JoinedStr(self, node: ast.JoinedStr) -> None:
        """Texts are not changed."""

    # ---------------------------------------------------------------- edits
    def _negate(self, test: ast.expr) -> None:
        """Negate a condition, unless another edit of it does the same."""
        is_negation = isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not)
        if not is_negation and not isinstance(test, ast.Compare):
            self._replace(test, ast.UnaryOp(ast.Not(), test), "negate")

    def _replace(self, node: ast.stmt | ast.expr, by: ast.expr | str, kind: str) -> None:
        assert node.end_lineno is not None
        assert node.end_col_offset is not None
        start = self._starts[node.lineno - 1] + node.col_offset
        end = self._starts[node.end_lineno - 1] + node.end_col_offset
        text = by if isinstance(by, str) else f"({ast.unparse(by)})"
        self.edits.append(Edit(start, end, text, node.lineno, kind))


def _has_names(node: ast.expr | None) -> bool:
    return node is not None and any(isinstance(part, ast.Name) for part in ast.walk(node))


def _is_number(node: ast.expr | None) -> bool:
    """Whether this computes a number of numbers and of other named ones, such as `4 * POLL_INTERVAL_S`."""
    match node:
        case ast.BinOp(left=left, right=right):
            return _is_number(left) and _is_number(right)
        case ast.Name(id=name):
            return name.isupper()
        case ast.Constant(value=int() | float()):
            return True
    return False


def _is_text(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str | bytes)


def _is_fixed_pause(node: ast.expr) -> bool:
    """Whether this waits for a named time, such as `closed.wait(PAUSE_S)`: without it a loop turns faster, no more.

    Pauses whose length is computed are edited: tests count the tries of these.
    """
    match node:
        case ast.Call(func=ast.Attribute(attr="wait"), args=[ast.Name(id=name)], keywords=[]):
            return name.isupper() and name.endswith(("PAUSE_S", "INTERVAL_S"))
    return False


def _is_log(node: ast.AST) -> bool:
    """Whether this is a call of a logger, such as `log.info(…)`."""
    return any(
        isinstance(part, ast.Name) and part.id in LOGGERS
        for call in [node]
        if isinstance(call, ast.Call)
        for part in ast.walk(call.func)
    )
