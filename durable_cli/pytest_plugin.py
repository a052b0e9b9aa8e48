"""The pytest plugin: the fixture `durable_app`, an app on a clean schema.

Loaded in every pytest run of the environment, so it imports nothing of ours: what it needs comes with the first test
that asks for the fixture. The app is the one of `--durable-app module:app`, of the ini option `durable_app`, of
DURABLE_APP, or of tasks.py or app.py in the working directory.
"""

from __future__ import annotations

import importlib
import uuid
from collections.abc import Iterator
from typing import Any

import pytest

OPTION = "durable_app"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Register where the app is."""
    text = "the app of the fixture durable_app, as module:app"
    parser.getgroup("durable").addoption("--durable-app", dest=OPTION, metavar="MODULE:APP", help=text)
    parser.addini(OPTION, text)


@pytest.fixture(scope="session")
def durable_test_app(request: pytest.FixtureRequest) -> Any:
    """The app, imported, on whatever schema it has; `durable_app` is the one to use."""
    given = request.config.getoption(OPTION) or request.config.getini(OPTION) or None
    loading, errors = importlib.import_module("durable_cli.loading"), importlib.import_module("durable.errors")
    try:
        return loading.find(given, "durable_app")
    except errors.DurableError as error:
        pytest.fail(f"{error}; pytest takes it as --durable-app module:app", pytrace=False)


@pytest.fixture(scope="session")
def durable_test_schema(durable_test_app: Any) -> Iterator[str]:
    """The name of a schema for this process's tests, so that xdist's do not meet; made now, dropped at the end."""
    testing = importlib.import_module("durable.testing")
    name = f"durable_test_{uuid.uuid4().hex[:12]}"
    with testing.on_schema(durable_test_app, name):
        pass
    yield name
    with testing.on_schema(durable_test_app, name, drop=True):
        pass


@pytest.fixture
def durable_app(durable_test_app: Any, durable_test_schema: str) -> Iterator[Any]:
    """The app, in its own database but on a schema for tests, which is empty when the test begins."""
    testing = importlib.import_module("durable.testing")
    with testing.on_schema(durable_test_app, durable_test_schema):
        testing.wipe(durable_test_app)
        yield durable_test_app
