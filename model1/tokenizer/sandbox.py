"""What a chat template may do: Jinja restricted until its work is linear in its input.

Jinja's own sandbox stops attribute escapes but not memory or processor bombs. Here a template
uses only the node types, filters and calls listed below: one loop level, no repetition, no
formatting, no macros; joined strings and the output have size limits on top. Jinja is imported
when the first template is compiled.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NoReturn

from model1.errors import TokenizerError

if TYPE_CHECKING:
    from jinja2 import nodes
    from jinja2.runtime import Context
    from jinja2.sandbox import SandboxedEnvironment

MAX_SOURCE_CHARS = 65_536
MAX_JOINED_CHARS = 1 << 24  # one string made with +

# names of jinja2.nodes classes
_ALLOWED_NODES = frozenset(
    {"Template", "Output", "TemplateData", "For", "If", "Assign", "NSRef", "Name", "Const"}
    | {"List", "Tuple", "Getattr", "Getitem", "Slice", "Call", "Keyword", "Filter", "Test"}
    | {"Compare", "Operand", "CondExpr", "And", "Or", "Not", "Add", "Sub", "Neg"}
)
_ALLOWED_FILTERS = frozenset({"trim", "length", "count", "first", "last", "default", "d"})
_ALLOWED_FUNCTIONS = frozenset({"raise_exception", "namespace"})
_ALLOWED_METHODS = frozenset({"strip", "lstrip", "rstrip", "startswith", "endswith", "get"})


class CompiledTemplate:
    """A checked and compiled template. Raises TokenizerError if the source breaks a rule."""

    def __init__(self, source: str) -> None:
        from jinja2 import TemplateError

        if len(source) > MAX_SOURCE_CHARS:
            raise TokenizerError(
                f"chat template must have at most {MAX_SOURCE_CHARS} characters, got {len(source)}"
            )
        environment = _environment()
        try:
            _check_node(environment.parse(source), in_loop=False)
            self._template = environment.from_string(source)
        except (TemplateError, RecursionError) as error:
            raise TokenizerError(f"chat template is not valid Jinja: {error}") from error

    def render(self, variables: Mapping[str, Any], *, max_chars: int) -> str:
        """The output for these variables; TokenizerError if it fails or is over max_chars."""
        pieces: list[str] = []
        num_chars = 0
        try:
            for piece in self._template.generate(variables):
                num_chars += len(piece)
                if num_chars > max_chars:
                    raise TokenizerError(f"chat template output exceeds {max_chars} characters")
                pieces.append(piece)
        except TokenizerError:
            raise
        # a template is outside code: whatever it trips over is its error, not ours
        except Exception as error:
            raise TokenizerError(f"chat template failed: {error}") from error
        return "".join(pieces)


def _environment() -> SandboxedEnvironment:
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.utils import Namespace

    class BoundedEnvironment(ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset({"+"})

        def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
            sized = hasattr(left, "__len__") and hasattr(right, "__len__")
            if sized and len(left) + len(right) > MAX_JOINED_CHARS:
                raise TokenizerError(f"chat template joins more than {MAX_JOINED_CHARS} characters")
            return super().call_binop(context, operator, left, right)

    class PlainNamespace(Namespace):
        def __repr__(self) -> str:
            return "<namespace>"  # Jinja's own grows exponentially when nested

    environment = BoundedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals.clear()
    environment.globals.update(raise_exception=_raise_exception, namespace=PlainNamespace)
    return environment


def _raise_exception(message: str) -> NoReturn:
    raise TokenizerError(f"chat template refuses the messages: {message}")


def _check_node(node: nodes.Node, *, in_loop: bool) -> None:
    refused = _refused(node, in_loop=in_loop)
    if refused is not None:
        raise TokenizerError(f"chat template line {node.lineno}: {refused} is not allowed")
    in_loop = in_loop or type(node).__name__ == "For"
    for child in node.iter_child_nodes():
        _check_node(child, in_loop=in_loop)


def _refused(node: nodes.Node, *, in_loop: bool) -> str | None:
    """What in this node, children apart, breaks a rule."""
    from jinja2 import nodes

    kind = type(node).__name__
    if kind not in _ALLOWED_NODES:
        return kind
    if isinstance(node, nodes.Filter) and node.name not in _ALLOWED_FILTERS:
        return f"filter {node.name!r}"
    if isinstance(node, nodes.Getattr) and node.attr.startswith("_"):
        return f"attribute {node.attr!r}"
    if isinstance(node, nodes.Call):
        return _refused_call(node)
    if isinstance(node, nodes.For) and (in_loop or node.recursive):
        return "a loop in a loop"
    if isinstance(node, nodes.List | nodes.Tuple):
        constant = all(isinstance(item, nodes.Const) for item in node.items)
        return None if constant else "a list of anything but constants"
    return None


def _refused_call(node: nodes.Call) -> str | None:
    from jinja2 import nodes

    target = node.node
    if isinstance(target, nodes.Name) and target.name in _ALLOWED_FUNCTIONS:
        return None
    if isinstance(target, nodes.Getattr) and target.attr in _ALLOWED_METHODS:
        return None
    name = getattr(target, "name", getattr(target, "attr", type(target).__name__))
    return f"call of {name!r}"
