"""Which nodes of a graph may change the memory of which values. In doubt they do."""

from collections.abc import Iterator

from torch import fx, nn
from torch.nn.modules.conv import _ConvNd

from tritonbn.epilogue import children, is_norm, is_sequential


def arguments(node: fx.Node) -> Iterator[fx.Node]:
    """The nodes that a node takes, as often as it takes them."""
    found: list[fx.Node] = []
    fx.node.map_arg((node.args, node.kwargs), found.append)
    return iter(found)


def visible_input(call: fx.Node, modules: dict[str, nn.Module]) -> list[fx.Node]:
    """The value that the batch norm of a call reads, or from which it was made; none where nobody else sees it."""
    module = modules[str(call.target)]
    while is_sequential(module):
        *first, module = children(module)
        if first and _is_fresh(first[-1]):
            return []
    return [call.args[0]]  # type: ignore[list-item]


def aliases(values: list[fx.Node], modules: dict[str, nn.Module]) -> set[fx.Node]:
    """The values that may share memory with these."""
    seen = set(values)
    waiting = list(values)
    while waiting:
        node = waiting.pop()
        near = [user for user in node.users if not _makes_fresh(user, modules)]
        if node.op == "placeholder":
            near += [other for other in node.graph.nodes if other.op == "placeholder"]
        elif not _makes_fresh(node, modules):
            near += arguments(node)
        waiting += [other for other in near if other not in seen]
        seen.update(near)
    return seen


def _makes_fresh(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    return node.op == "call_module" and _is_fresh(modules[str(node.target)])


def _is_fresh(module: nn.Module) -> bool:
    """Whether the module returns a tensor of its own: no input, no view of one."""
    if is_sequential(module):
        return _is_fresh(children(module)[-1])
    return is_norm(module) or (isinstance(module, (_ConvNd, nn.Linear)) and _is_torchs(module))


def _is_torchs(module: nn.Module) -> bool:
    return type(module).__module__.startswith("torch.nn.modules.")


def may_write(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Whether the node may change a tensor that it is given."""
    if node.op == "call_module":
        return _module_may_write(modules[str(node.target)])
    name = str(getattr(node.target, "__name__", node.target))
    if node.op == "call_method":
        return name.endswith("_") or name == "__call__"
    if node.op != "call_function":
        return False
    home = str(getattr(node.target, "__module__", None) or "torch")
    return (
        home.split(".")[0] not in ("torch", "_operator", "builtins", "math")  # IN_PLACE is ours
        or name.endswith("_")
        or any(given is True for given in (*node.args, *node.kwargs.values()))  # inplace=True, or as good as
        or "out" in node.kwargs
        or bool(getattr(getattr(node.target, "_schema", None), "is_mutable", False))
    )


def _module_may_write(module: nn.Module) -> bool:
    if is_sequential(module):
        for child in children(module):
            if _module_may_write(child):
                return True
            if _is_fresh(child):
                return False
        return False
    return not is_norm(module) and (not _is_torchs(module) or bool(getattr(module, "inplace", False)))
