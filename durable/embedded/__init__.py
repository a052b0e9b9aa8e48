"""The embedded Postgres: a private server that durable starts when no DSN was given.

It is found or started by whoever needs it, listens on a private socket only, and stops by itself some seconds after the
last process that uses it ended. A default for development, tests and single hosts; production should be given a DSN.

locks      the files whose kernel locks say who starts, uses and keeps the server
layout     where its files are, and which account owns them
binaries   which Postgres is run
processes  which processes are that server
keeper     the process that is its parent and stops it when nobody uses it
server     Server: start or join, leave, stop, look                                     <- START HERE
"""

from durable.embedded.server import Server, ServerStatus

__all__ = ["Server", "ServerStatus"]
