"""The version of the distribution `durable-pg`; setup.cfg and `durable --version` read it here."""

__version__ = "0.1.0"
