"""The version of this package: setup.cfg takes it from here, and what is written to last names it."""

VERSION = "0.1.0"
