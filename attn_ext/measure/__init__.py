"""Measuring attention on the user's own machine: cases, peers, clocks, ceilings, result files.

Used by `attn-ext bench`, `attn-ext profile` and bench/.  Presets (`cases.PRESETS`) and peers
(`peers.PEERS`) are tables: a new row is all that a new one takes.
"""
