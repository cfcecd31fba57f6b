"""Writing in place, made into what it computes. It knows operations and nodes, and no model.

A stage is cut by what reads what: a write into a tensor that others read is lost on the way. torch undoes all writes by
tracing the graph once more, which takes longer than the first trace. Most of them write into a tensor of their own,
that nothing else shares memory with: those need only another name.
"""

from __future__ import annotations

import operator

import torch
from torch._ops import OpOverload
from torch.fx import Graph, Node


def is_mutable(node: Node) -> bool:
    return isinstance(node.target, OpOverload) and node.target._schema.is_mutable


def undo_plain_writes(graph: Graph) -> bool:
    """Let nodes of `graph` that write into a tensor of their own make a new one.

    Returns:
        Whether none is left that writes.
    """
    for node in list(graph.nodes):
        if is_mutable(node):
            _undo(graph, node)
    return not any(map(is_mutable, graph.nodes))


def _undo(graph: Graph, node: Node) -> None:
    target = _functional(node.target)  # type: ignore[arg-type]
    base = node.args[0] if node.args else None
    if (
        target is None
        or not isinstance(base, Node)
        or not _owns_its_memory(base, node)
        or not _keeps_dtype(node, base)
        or any(user.op == "output" for user in node.users)  # which goes by the node's name
    ):
        return
    with graph.inserting_before(node):
        made = graph.call_function(target, node.args, node.kwargs)
    made.meta = dict(node.meta)
    for reader in [user for user in base.users if node < user]:
        reader.replace_input_with(base, made)
    node.replace_all_uses_with(made)
    graph.erase_node(node)


def _functional(target: OpOverload) -> OpOverload | None:
    """`aten.mul.Tensor` for `aten.mul_.Tensor`; None for what writes elsewhere than into its first argument."""
    written = [number for number, own in enumerate(target._schema.arguments) if own.alias_info is not None]
    packet = getattr(getattr(torch.ops, target.namespace), target._opname.removesuffix("_"), None)
    if not target._opname.endswith("_") or written != [0] or packet is None:
        return None
    functional: OpOverload | None = getattr(packet, target._overloadname, None)
    if functional is None or _may_share(functional):
        return None
    taken, wanted = ([own.name for own in op._schema.arguments] for op in (target, functional))
    return functional if taken == wanted else None


def _owns_its_memory(base: Node, writer: Node) -> bool:
    """Whether `base` is a tensor that its operation has made, and no other tensor lies in its memory."""
    maker = base.args[0] if base.target is operator.getitem else base
    return (
        isinstance(maker, Node)
        and maker.op == "call_function"
        and not _may_share(maker.target)
        and all(user is writer or (user.op == "call_function" and not _may_share(user.target)) for user in base.users)
    )


def _may_share(target: object) -> bool:
    """Whether what `target` returns may lie in the memory of what it is given."""
    if not isinstance(target, OpOverload):
        return True
    composite = torch._C._dispatch_has_kernel_for_dispatch_key(target._name, "CompositeImplicitAutograd")
    return composite or any(own.alias_info is not None for own in target._schema.returns)


def _keeps_dtype(node: Node, base: Node) -> bool:
    """Whether what is computed of these arguments has the dtype of what was to be written."""
    dtype = base.meta["val"].dtype
    others = [
        other.meta["val"].dtype for other in node.all_input_nodes if isinstance(other.meta.get("val"), torch.Tensor)
    ]
    return all(torch.promote_types(dtype, other) == dtype for other in others)
