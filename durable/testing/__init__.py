"""Testing with durable: run an app's work in the test's own process, move its clock, assert where instances stand.

    drain(app)                              run everything runnable, through the production SQL
    fire_timeouts(app), travel(app, 3600)   let deadlines and delays pass
    assert_done(app, result), ...           and the others
    transaction(app)                        all of it in one transaction that is rolled back
    on_schema(app, "test")                  all of it in a schema of its own
    crash_every_commit(app, scenario)       die before and after every commit, and end the same

The pytest plugin's fixture `durable_app` is the app on a clean schema.
"""

from durable.errors import DrainError
from durable.testing.assertions import assert_awaiting, assert_done, assert_failed, assert_status
from durable.testing.clock import fire_timeouts, travel
from durable.testing.crashes import CrashReport, crash_every_commit
from durable.testing.draining import drain
from durable.testing.schemas import on_schema, wipe
from durable.testing.transactions import transaction

__all__ = [
    "CrashReport",
    "DrainError",
    "assert_awaiting",
    "assert_done",
    "assert_failed",
    "assert_status",
    "crash_every_commit",
    "drain",
    "fire_timeouts",
    "on_schema",
    "transaction",
    "travel",
    "wipe",
]
