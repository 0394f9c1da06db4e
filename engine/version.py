"""The version, said once: setup.cfg, penstock.py and the command line read it from here."""

VERSION = "0.1.0"
