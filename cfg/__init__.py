"""Flags, presets and their checks. Imports only util/."""
