"""The error that every command raises for what the user typed."""

from __future__ import annotations


class BadArgument(Exception):
    """Printed as one line; exit code 2"""
