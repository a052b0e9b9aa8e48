"""Running chains and groups: one built-in machine whose state is what is left to do.

However many parts a chain has, it is one instance: it schedules a part's tasks as its children, parks, and goes on with
their results when all of them have ended. A chain or a group inside a group is a child that is such an instance itself.
It waits in the queue of its first task and takes that task's priority, unless it has options of its own.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from durable.children import Child
from durable.context import Context
from durable.errors import DatabaseUnavailableError, GroupFailed, OutcomeError, TaskFailed, UnknownTaskError
from durable.instance import NewInstance
from durable.machine import Encode, Machine, MachineDefinition, MachineOptions, step
from durable.outcomes import OUTCOMES, Done, Outcome, Retry, ScheduleChildren, Stop
from durable.signatures import Signature, insert_options
from durable.task import MAPS, ASubmit, AsyncTask, Submit, Task, TaskOptions

NAME = "durable.canvas"
MAP, ASYNC_MAP = MAPS
BUILT_IN = frozenset({NAME, *MAPS})
"""Names of what every app has registered."""
NAMED_FAILURES = 10
"""Parts of a failed group that its message names."""

Definition = Task[..., Any] | MachineDefinition
Find = Callable[[str], Definition]


class Canvas(Machine):
    """State: `parts` left to do; of the part that runs: whether it is a `group`, and its `on_error`."""

    @step(initial=True)
    def run(self, ctx: Context) -> Outcome:
        """Begin with the first part."""
        return _scheduled(ctx.state["parts"])

    @step
    def joined(self, ctx: Context) -> Outcome:
        """All children of a part have ended: go on with their results."""
        children = list(ctx.children)
        failures = [(index, child) for index, child in enumerate(children) if child.status != "done"]
        if not ctx.state["group"]:
            (child,) = children
            if failures:
                return Stop(_error_of(child))
            value = child.result
        elif failures and ctx.state["on_error"] == "fail":
            return Stop(_group_failed(len(children), failures))
        else:
            value = [child.result if child.status == "done" else _failure(child) for child in children]
        rest = ctx.state["parts"]
        if not rest:
            return Done(value)
        return _scheduled([Signature(rest[0]).clone((value,)), *rest[1:]])

    def handle(self, error: BaseException, ctx: Context) -> Outcome:
        """What passes, or a task that only newer workers know, is waited for."""
        if isinstance(error, DatabaseUnavailableError) or isinstance(error.__cause__, UnknownTaskError):
            return Retry(delay=float(min(2**ctx.attempt, 60)))
        return Stop(error)


def _scheduled(parts: list[Any]) -> Outcome:
    part = Signature(parts[0])
    is_group = part.kind == "group" and not part["options"]
    children = part["parts"] if is_group else [part]
    state = {"parts": parts[1:], "group": is_group, "on_error": part.get("on_error", "fail")}
    return ScheduleChildren(children, then="joined", state=state)


def _error_of(child: Child) -> TaskFailed:
    error = child.error or {}
    return TaskFailed(child.id, error.get("type", child.status), error.get("message", ""), error.get("traceback") or "")


def _failure(child: Child) -> dict[str, Any]:
    error = _error_of(child)
    return {"failed": {"id": child.id, "type": error.error_type, "message": error.message}}


def _group_failed(count: int, failures: list[tuple[int, Child]]) -> GroupFailed:
    named = []
    for index, child in failures[:NAMED_FAILURES]:
        error = _error_of(child)
        named.append(f"{index} ({child.machine}, instance {child.id}): {error.error_type}: {error.message[:200]}")
    more = f"; and {len(failures) - NAMED_FAILURES} more" if len(failures) > NAMED_FAILURES else ""
    return GroupFailed(f"{len(failures)} of {count} parts failed: {'; '.join(named)}{more}")


def _map(ctx: Context, task: str, items: list[Any], star: bool) -> list[Any]:
    call = _mapped(ctx, task)
    return [_plain(task, call(*item) if star else call(item)) for item in items]


async def _amap(ctx: Context, task: str, items: list[Any], star: bool) -> list[Any]:
    call = _mapped(ctx, task)
    return [_plain(task, await (call(*item) if star else call(item))) for item in items]


def _mapped(ctx: Context, name: str) -> Callable[..., Any]:
    task = ctx.app.find_task(name)
    if not isinstance(task, Task):
        raise OutcomeError(f"{name!r} is a machine; map, starmap and chunks take tasks")
    function = task.function
    return (lambda *args: function(ctx, *args)) if task.options.bind else function


def _plain(task: str, value: Any) -> Any:
    if isinstance(value, OUTCOMES) or inspect.iscoroutine(value):
        kind = type(value).__name__
        raise OutcomeError(f"{task} returned {kind} for one of several items: a task that is mapped returns values")
    return value


def built_ins(encode: Encode, submit: Submit, asubmit: ASubmit) -> dict[tuple[str, int], Definition]:
    """Return the definitions that every app has."""
    return {
        (NAME, 1): MachineDefinition(Canvas, MachineOptions(NAME), encode),
        (MAP, 1): Task(_map, TaskOptions(MAP, bind=True), encode, submit, asubmit),
        (ASYNC_MAP, 1): AsyncTask(_amap, TaskOptions(ASYNC_MAP, bind=True), encode, submit, asubmit),
    }


def row(find: Find, signature: Signature, options: Mapping[str, Any]) -> NewInstance:
    """Return the checked row that runs a signature; `options` are those of `insert`, over the signature's own.

    Every task in it is looked up and tried with its arguments. Raises UnknownTaskError, TypeError, ValidationError.
    """
    chosen = {**insert_options(signature["options"]), **options}
    if signature.kind == "task":
        return find(signature["task"]).new(signature["args"], signature["kwargs"], **chosen)
    _check(find, signature, takes_result=False)
    queue, priority = _first_place(find, signature)
    parts = signature["parts"] if signature.kind == "chain" else [{**signature, "options": {}}]
    return find(NAME).new(state={"parts": parts}, **{"queue": queue, "priority": priority, **chosen})


def _check(find: Find, signature: Signature, takes_result: bool) -> None:
    if signature.kind == "task":
        args = signature["args"]
        if takes_result and not signature["immutable"]:
            args = [None, *args]
        find(signature["task"]).new(args, signature["kwargs"], **insert_options(signature["options"]))
        return
    for index, part in enumerate(signature["parts"]):
        _check(find, part, takes_result or (signature.kind == "chain" and index > 0))


def _first_place(find: Find, signature: Signature) -> tuple[str | None, int | None]:
    """Queue and priority of the first task; the app's default ones for an empty group."""
    while signature.kind != "task":
        if not signature["parts"]:
            return None, None
        signature = signature["parts"][0]
    definition, own = find(signature["task"]), signature["options"]
    return own.get("queue", definition.queue), own.get("priority", definition.options.priority)
