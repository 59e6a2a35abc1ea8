"""Modules with attention inside."""
