"""Plumbing without models: errors, files, ranks, devices, the start of a command. Imports no other directory."""
