"""The tasks of `durable demo`: index the Python files of the running Python's standard library."""

from __future__ import annotations

import ast
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

from durable import Durable

app = Durable("demo", schema="durable_demo")

TOP = 10
"""How many imported modules a summary names."""


@app.task(queue="files")
def index_file(path: str) -> dict[str, Any]:
    """Return what is in one Python file: lines, functions, classes, and how often it imports which module."""
    source = Path(path).read_bytes()
    counts = {"lines": source.count(b"\n"), "functions": 0, "classes": 0, "unparsable": 0}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # old test files are full of invalid escapes
        try:
            tree = ast.parse(source)
        except (SyntaxError, ValueError):
            # The library's own tests hold files that are broken on purpose.
            return {**counts, "unparsable": 1, "imports": {}}
    imports: Counter[str] = Counter()
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef():
                counts["functions"] += 1
            case ast.ClassDef():
                counts["classes"] += 1
            case ast.Import(names=names):
                imports.update(alias.name.partition(".")[0] for alias in names)
            case ast.ImportFrom(module=str(module), level=0):
                imports[module.partition(".")[0]] += 1
    return {**counts, "imports": dict(imports)}


@app.task(queue="summary")
def summarise(indexes: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the sum of many indexes (or of many summaries)."""
    total: Counter[str] = Counter()
    imports: Counter[str] = Counter()
    for index in indexes:
        total.update({name: index[name] for name in ("lines", "functions", "classes", "unparsable")})
        total["files"] += index.get("files", 1)
        imports.update(index["imports"])
    return {**total, "imports": dict(imports)}
