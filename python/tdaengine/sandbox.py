"""Jinja for templates of strangers: what they may call, compute and build is bounded.

Jinja's own sandbox keeps them from the interpreter's insides and from long ranges. But loops may be
nested, and texts doubled.
"""

from __future__ import annotations

import functools
import re
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from jinja2 import Template, nodes, pass_context
from jinja2.exceptions import SecurityError
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

# For one conversation. Templates of checkpoints take milliseconds, and make a few times its text.
MAX_SECONDS = 5.0  # of the thread's own computing
MAX_MADE = 50_000_000  # characters of all that is built on the way
ITEM = 16  # as many characters as an item of a list takes part in the above
MAX_BITS = 10_000  # of an integer

# Names that no template can spell.
_PASS, _MADE = "a pass", "made"
_WIDE = re.compile(r"%[^a-zA-Z%]*(\d{5}|\*)")
_DEEP = ("join", "pprint", "string", "tojson")  # filters that write all of a nested value


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """Templates that take too long or make too much raise SecurityError as they are rendered."""

    intercepted_binops = frozenset(("*", "**", "%", "+"))

    def __init__(self, **options: Any) -> None:
        super().__init__(finalize=pass_context(lambda _, value: self._printed(value)), **options)
        self._state = threading.local()  # of the template that this thread renders
        # pass_context also keeps Jinja from calling them ahead, as it does with constants.
        self.filters[_PASS] = pass_context(lambda _, text: self._charge(text))
        self.filters[_MADE] = pass_context(lambda _, value: self._made(value))

    def bound_filters(self) -> None:
        """To be called once all filters are there."""
        self.filters = {
            name: each if name in (_PASS, _MADE) else self._bounded(name, each)
            for name, each in self.filters.items()
        }

    def from_string(self, source: Any, *arguments: Any, **options: Any) -> Template:
        tree = self.parse(source)
        _Metered().visit(tree)
        tree.set_environment(self)
        return super().from_string(tree, *arguments, **options)

    def render(self, template: Template, values: Mapping[str, Any]) -> str:
        self._state.deadline = time.thread_time() + MAX_SECONDS
        self._state.left = MAX_MADE
        try:
            return template.render(values)
        finally:
            del self._state.deadline, self._state.left

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        _check_operands(operator, left, right)
        return self._made(super().call_binop(context, operator, left, right))

    # Jinja's names for these parameters leave all others to the callee.
    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        name, text = getattr(__obj, "__name__", ""), getattr(__obj, "__self__", None)
        _check_arguments(name, text, [*args, *kwargs.values()])
        return __self._made(super().call(__context, __obj, *args, **kwargs))

    def _bounded(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        # What Jinja passes first, such as its context, is none of the template's.
        own = 0 if getattr(function, "jinja_pass_arg", None) is None else 1

        @functools.wraps(function)
        def bounded(*arguments: Any, **options: Any) -> Any:
            given = [*arguments[own:], *options.values()]
            _check_arguments(name, given[0], given[1:])
            if name in _DEEP:
                self._charge(_weight(given[0]))
            return self._made(function(*arguments, **options))

        return bounded

    def _printed(self, value: Any) -> Any:
        self._charge(_weight(value))
        return value

    def _made(self, value: Any) -> Any:
        if isinstance(value, str | bytes):
            self._charge(len(value))
        elif isinstance(value, list | tuple | dict):
            self._charge(len(value) * ITEM)
        return value

    def _charge(self, size: int) -> None:
        left = getattr(self._state, "left", MAX_MADE) - size
        if left < 0:
            raise SecurityError(f"it makes more than {MAX_MADE} characters, expected fewer")
        if hasattr(self._state, "left"):  # else it is being compiled
            self._state.left = left
            if time.thread_time() > self._state.deadline:
                raise SecurityError(f"it takes more than {MAX_SECONDS} s, expected less")


class _Metered(NodeTransformer):
    """Puts a charge at all that grows without a call: passes of loops, `~`, {% set %} blocks."""

    def visit_For(self, node: nodes.For) -> nodes.For:
        self.generic_visit(node)
        text = sum(len(each.data) for each in node.find_all(nodes.TemplateData))
        charge = _filtered(nodes.Const(text, lineno=node.lineno), _PASS, node.lineno)
        node.body.insert(0, nodes.ExprStmt(charge, lineno=node.lineno))
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Filter:
        self.generic_visit(node)
        return _filtered(node, _MADE, node.lineno)

    def visit_AssignBlock(self, node: nodes.AssignBlock) -> nodes.AssignBlock:
        self.generic_visit(node)
        node.filter = _filtered(node.filter, _MADE, node.lineno)
        return node


def _filtered(node: nodes.Expr | None, name: str, line: int) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=line)


def _check_operands(operator: str, left: Any, right: Any) -> None:
    integers = isinstance(left, int) and isinstance(right, int)
    bits = 0
    if operator == "*" and integers:
        bits = left.bit_length() + right.bit_length()
    elif operator == "**" and integers:
        bits = left.bit_length() * right
    elif operator == "*":
        for sequence, count in ((left, right), (right, left)):
            if isinstance(count, int) and isinstance(sequence, str | bytes | list | tuple):
                _check_size(len(sequence) * count)
    elif operator == "%" and isinstance(left, str) and _WIDE.search(left):
        raise SecurityError(f"it formats by {left[:80]!r}, expected narrower fields")
    if bits > MAX_BITS:
        raise SecurityError(f"it makes an integer of {bits} bits, expected at most {MAX_BITS}")


def _check_arguments(name: str, text: Any, arguments: list[Any]) -> None:
    """Raises for what a function of this name would make too long of a text."""
    length = len(text) if isinstance(text, str | bytes) else 1
    for argument in arguments:
        if isinstance(argument, int):  # a width, a count
            _check_size(argument * (length if name in ("expandtabs", "indent") else 1))
    if name == "replace" and len(arguments) > 1 and isinstance(text, str):
        old, new = str(arguments[0]), str(arguments[1])
        _check_size(text.count(old) * len(new))
    if name == "join" and arguments and isinstance(arguments[0], list | tuple):
        _check_size(_weight(arguments[0]) + length * len(arguments[0]))


def _check_size(size: int) -> None:
    if size > MAX_MADE:
        raise SecurityError(f"it makes {size} characters at once, expected at most {MAX_MADE}")


def _weight(value: Any) -> int:
    """What a nested value makes when it is written out."""
    total, rest = 0, [value]
    while rest and total <= MAX_MADE:
        each = rest.pop()
        total += len(each) if isinstance(each, str | bytes) else ITEM
        if isinstance(each, dict):
            rest += [*each.keys(), *each.values()]
        elif isinstance(each, list | tuple | set | frozenset):
            rest += each
    return total
