"""Batch norm -> add -> activation in the graph of a forward: where it is, and whether it may become one operation."""

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from tritonbn.activations import IDENTITY, Activation, of_call, of_method, of_module
from tritonbn.aliasing import aliases, arguments, may_write, visible_input
from tritonbn.epilogue import children, following, fused, is_norm, is_sequential, opened, tail
from tritonbn.tracing import IN_PLACE

_IADD = IN_PLACE["iadd"]


@dataclass(frozen=True)
class Use:
    """One call of a batch norm by a container: what it becomes one operation with, or why with nothing."""

    norm: _BatchNorm
    steps: str  # "relu", "add", "add + relu"; "" for none
    why: str = ""  # for none
    others: tuple[nn.Module, ...] = ()  # whose hooks would suspend it


@dataclass(frozen=True)
class Chain:
    """Nodes that follow each other, each the only user of the one before: norm, idle modules, add, activation."""

    norm: fx.Node
    idle: tuple[fx.Node, ...]
    add: fx.Node | None
    act: fx.Node | None
    activation: Activation | None

    @property
    def end(self) -> fx.Node:
        """The last node, whose value the fused operation computes in its place."""
        last = self.act or self.add
        assert last is not None
        return last

    @property
    def residual(self) -> fx.Node | None:
        """What is added."""
        if self.add is None:
            return None
        left, right = self.add.args
        return right if left is (self.norm, *self.idle)[-1] else left  # type: ignore[return-value]

    @property
    def steps(self) -> str:
        """What is fused, in words."""
        return " + ".join([*(["add"] if self.add else []), *([str(self.activation)] if self.act else [])])


def fuse(graph: fx.Graph, module: nn.Module) -> list[Use]:
    """Replace each chain of the graph by one call of `fused`; what became of each call of a batch norm."""
    modules = dict(module.named_modules())
    uses: list[Use] = []
    chains: list[Chain] = []
    taken: set[fx.Node] = set()
    nodes = [node for node in graph.nodes if node.op == "call_module" and tail(modules[node.target]) is not None]
    # Where both operands of an add are batch norms: one that stands here rather than one at the end of a Sequential.
    for node in sorted(nodes, key=lambda node: not is_norm(modules[node.target])):
        norm = tail(modules[node.target])
        assert norm is not None
        found = _chain(node, modules, taken)
        if isinstance(found, Chain):
            found = _obstacle(found, modules, norm) or found
        if isinstance(found, Chain):
            chains.append(found)
            taken |= {found.add} if found.add else set()
            calls = [node for node in (found.norm, *found.idle, found.act) if node and node.op == "call_module"]
            uses.append(Use(norm, found.steps, others=_skipped([modules[str(node.target)] for node in calls])))
        else:
            uses.append(Use(norm, "", found))
    for chain in chains:
        _rewrite(graph, chain, modules)
    return uses


def fuse_sequence(sequence: nn.Module) -> list[Use]:
    """What `run` does with the batch norms of a Sequential; what follows the last module, only others know."""
    modules = children(sequence)
    uses = []
    for i, module in enumerate(modules[:-1]):
        if (norm := tail(module)) is not None:
            end = following(modules, i + 1)
            name = list(sequence._modules)[i + 1]
            why = f"its output goes to '{name}' ({type(modules[i + 1]).__name__})"
            if end is None:
                uses.append(Use(norm, "", why))
            else:
                uses.append(Use(norm, str(of_module(modules[end])), others=_skipped(modules[i : end + 1])))
    return uses


def _skipped(modules: list[nn.Module]) -> tuple[nn.Module, ...]:
    """The modules that a fused operation does not call: these, and what the Sequentials among them end with."""
    found = list(modules)
    for module in found:
        if is_sequential(module):
            found.append(children(module)[-1])
    return tuple(found)


def _chain(node: fx.Node, modules: dict[str, nn.Module], taken: set[fx.Node]) -> Chain | str:
    """The longest chain that begins with the batch norm `node` and leaves what is taken, or why there is none."""
    if len(node.args) != 1 or node.kwargs or not isinstance(node.args[0], fx.Node):
        return "it is called with other arguments than one tensor"
    idle: list[fx.Node] = []
    last, user = node, only_user(node)
    while isinstance(user, fx.Node) and _activation(user, last, modules) == IDENTITY:
        idle.append(user)
        last, user = user, only_user(user)
    if not isinstance(user, fx.Node):
        return user
    if user in taken:
        return "it is added to another batch norm, which is fused with the add"
    add = user if _is_addition(user, last) else None
    if add is not None:
        last, user = add, only_user(add)
    activation = _activation(user, last, modules) if isinstance(user, fx.Node) else None
    act = user if isinstance(user, fx.Node) and activation not in (None, IDENTITY) else None
    if add is None and act is None:
        return f"its output goes to {_described(last, user, modules)}"
    return Chain(node, tuple(idle), add, act, activation if act else None)


def only_user(node: fx.Node) -> fx.Node | str:
    """The one node that uses the value of `node` once, and does not return it; else the reason."""
    users = list(node.users)
    times = sum(argument is node for user in users for argument in arguments(user))
    if times != 1:
        return f"its output is used {times} times" if times else "its output is not used"
    return "its output is returned" if users[0].op == "output" else users[0]


def _is_addition(user: fx.Node, value: fx.Node) -> bool:
    """Whether user adds another tensor to value, and does not change that tensor."""
    in_place = _adds_in_place(user)
    known = user.target in (operator.add, torch.add) if user.op == "call_function" else user.target == "add"
    if not (known or in_place) or user.op not in ("call_function", "call_method"):
        return False
    if len(user.args) != 2 or user.kwargs not in ({}, {"alpha": 1}):
        return False
    left, right = user.args
    other = right if left is value else left
    return isinstance(other, fx.Node) and (left is value or not in_place)


def _adds_in_place(node: fx.Node) -> bool:
    return node.target is _IADD if node.op == "call_function" else node.op == "call_method" and node.target == "add_"


def _activation(user: fx.Node, value: fx.Node, modules: dict[str, nn.Module]) -> Activation | None:
    """The Activation of value that user computes; None if it computes something else."""
    if user.args[:1] != (value,):
        return None
    if user.op == "call_module" and len(user.args) == 1 and not user.kwargs:
        return of_module(modules[str(user.target)])
    if user.op == "call_function" and callable(user.target):
        return of_call(user.target, user.args[1:], user.kwargs)
    if user.op == "call_method" and len(user.args) == 1 and not user.kwargs:
        return of_method(str(user.target))
    return None


def _described(value: fx.Node, user: Any, modules: dict[str, nn.Module]) -> str:
    """A node in words, as someone who uses value."""
    if user.op == "call_module":
        return f"'{user.target}' ({type(modules[user.target]).__name__})"
    if _adds_in_place(user) and user.args[0] is not value:
        return "an add in place, which changes the other operand"
    return str(user.target) if user.op == "call_method" else str(getattr(user.target, "__name__", user.target))


def _obstacle(chain: Chain, modules: dict[str, nn.Module], norm: _BatchNorm) -> str:
    """Why the batch norm may not run as late as the end of its chain; "" if it may."""
    chained = {*chain.idle, chain.add, chain.act}
    statistics = {f"{name}.{buffer}" for name, m in modules.items() if m is norm for buffer in norm._buffers}
    needed = visible_input(chain.norm, modules)
    node = chain.norm.next
    while node is not chain.end:
        if node is chain.add:
            needed = [*needed, *([chain.residual] if chain.residual else [])]
        if node not in chained:
            if node.op == "call_module" and norm in modules[str(node.target)].modules():
                return "it is called again before its output is used"
            if node.op == "get_attr" and node.target in statistics:
                return "its statistics are read before its output is used"
            if may_write(node, modules) and not aliases(needed, modules).isdisjoint(arguments(node)):
                return f"{_described(chain.norm, node, modules)} may change what it reads, before its output is used"
        node = node.next
    return ""


def _rewrite(graph: fx.Graph, chain: Chain, modules: dict[str, nn.Module]) -> None:
    norm: Any
    x: Any
    with graph.inserting_before(chain.norm):
        norm, x = _module(graph, chain.norm), chain.norm.args[0]
        if is_sequential(modules[str(chain.norm.target)]):
            both = graph.call_function(opened, (norm, x))
            norm, x = (graph.call_function(operator.getitem, (both, i)) for i in range(2))
    with graph.inserting_before(chain.end):
        act = _module(graph, chain.act) if chain.act and chain.act.op == "call_module" else chain.activation
        idle = tuple(_module(graph, node) for node in chain.idle)
        in_place = chain.add is not None and _adds_in_place(chain.add)
        call = graph.call_function(fused, (norm, x, chain.residual, in_place, act, idle))
    chain.end.replace_all_uses_with(call)
    for node in (chain.act, chain.add, *reversed(chain.idle), chain.norm):
        if node is not None:
            graph.erase_node(node)


def _module(graph: fx.Graph, call: fx.Node) -> fx.Node:
    """The module that a call_module node calls, as a value."""
    return graph.create_node("get_attr", call.target)
