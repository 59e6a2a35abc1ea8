"""The functions that users call: checks, meaning and documentation of each kind of call."""
