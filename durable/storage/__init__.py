"""Everything that talks to Postgres: rows in, rows out. Knows neither tasks nor threads.

Operations are generators (`session.Operation`): they yield a statement's name and parameters, are sent its rows, and
return a value. `session.run` and `session.arun` drive them, so that sync, async and the caller's own connection are
one code path.
"""
