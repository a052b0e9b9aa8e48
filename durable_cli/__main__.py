"""`python -m durable_cli`: the same as `durable`."""

from durable_cli.main import main

main()
