"""Plumbing without models: errors, files, ranks, devices, start of a command. Imports nothing else of rawgpt."""
