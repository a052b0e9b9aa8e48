"""Finding the app: `-A module:app`, else DURABLE_APP, else tasks.py or app.py in the working directory."""

from __future__ import annotations

import importlib
import os
import re
import sys
import traceback
from pathlib import Path
from types import ModuleType

import durable
from durable import Durable
from durable.errors import DurableError
from durable_cli.exits import CONFIG, CommandError
from durable_cli.output import scrub

VARIABLE = "DURABLE_APP"
FILES = ("tasks", "app")
_OURS = {Path(__file__).parent, Path(durable.__file__).parent}
_DOTTED = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*")


class NoAppError(CommandError):
    """Nothing says where the app is."""


def find(path: str | None, source: str = "-A") -> Durable:
    """Return the app that `path` (from `source`) names, or DURABLE_APP, else the one in the working directory.

    Raises CommandError with code CONFIG, NoAppError when there is nothing to go by.
    """
    _import_from_here()
    if path is not None:
        return load(path, source)
    if os.environ.get(VARIABLE):
        return load(os.environ[VARIABLE], VARIABLE)
    here = [name for name in FILES if Path(f"{name}.py").is_file()]
    for name in here:
        module = _import(name, f"{name}.py")
        if _apps(module):
            return _the_app(module, name, f"{name}.py")
    if here:
        raise CommandError(
            f"{' and '.join(f'{name}.py' for name in here)} in {Path.cwd()} has no Durable app; give -A module:app",
            CONFIG,
        )
    raise NoAppError(
        f"which app? Give -A module:app or set {VARIABLE}; there is no tasks.py or app.py in {Path.cwd()}", CONFIG
    )


def load(path: str, source: str) -> Durable:
    """Return the app of `module:attribute`, or the app of `module`; `source` says who named it, for errors."""
    name, separator, attribute = path.partition(":")
    if not _DOTTED.fullmatch(name) or (separator and not _DOTTED.fullmatch(attribute)):
        looks = name.removesuffix(".py").strip("./").replace("/", ".")
        hint = f"; did you mean {looks}?" if name.endswith(".py") and _DOTTED.fullmatch(looks) else ""
        raise CommandError(f"{source} {path!r} must be module:app, for instance shop.tasks:app{hint}", CONFIG)
    if name.endswith(".py") and Path(name).is_file():
        raise CommandError(f"{source} {path!r} is a file; give its module: {name.removesuffix('.py')}", CONFIG)
    module = _import(name, source)
    if not separator:
        return _the_app(module, name, source)
    found: object = module
    for part in attribute.split("."):
        if not hasattr(found, part):
            apps = ", ".join(f"{name}:{known}" for known in _apps(module))
            raise CommandError(
                f"{source}: module {name!r} has no {attribute!r}" + (f"; its apps: {apps}" if apps else ""), CONFIG
            )
        found = getattr(found, part)
    if not isinstance(found, Durable):
        raise CommandError(f"{source}: {path} is a {type(found).__name__}, not a Durable app", CONFIG)
    return found


def _import_from_here() -> None:
    here = str(Path.cwd())
    if not sys.path or sys.path[0] not in ("", here):
        sys.path.insert(0, here)


def _import(name: str, source: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(f"{error.name}.")):
            raise CommandError(
                f"{source}: no module named {error.name!r} on sys.path, which starts with {Path.cwd()}; "
                "run from the folder that holds it, or install it",
                CONFIG,
            ) from error
        raise _failed(name, source, error) from error
    except (Exception, SystemExit) as error:
        raise _failed(name, source, error) from error


def _failed(name: str, source: str, error: BaseException) -> CommandError:
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "importlib" not in frame.filename]
    theirs = [frame for frame in frames if Path(frame.filename).parent not in _OURS]
    place = f" ({theirs[-1].filename}, line {theirs[-1].lineno})" if theirs else ""
    what = str(error) if isinstance(error, DurableError) else f"{type(error).__name__}: {error}".rstrip(": ")
    return CommandError(f"{source}: importing {name!r} failed: {scrub(what)}{place}", CONFIG)


def _apps(module: ModuleType) -> dict[str, Durable]:
    """The module's apps by name, each once."""
    found: dict[str, Durable] = {}
    for name, value in vars(module).items():
        if isinstance(value, Durable) and not any(value is known for known in found.values()):
            found[name] = value
    return found


def _the_app(module: ModuleType, name: str, source: str) -> Durable:
    default = getattr(module, "app", None)
    if isinstance(default, Durable):
        return default
    apps = _apps(module)
    if len(apps) == 1:
        return next(iter(apps.values()))
    if not apps:
        raise CommandError(f"{source}: module {name!r} has no Durable app", CONFIG)
    choices = ", ".join(f"{name}:{known}" for known in apps)
    raise CommandError(f"{source}: module {name!r} has several apps; name one: {choices}", CONFIG)
