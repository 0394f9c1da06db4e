"""The version, said once: setup.cfg, `penstock` and the command line read it from here."""

VERSION = "0.1.0"
