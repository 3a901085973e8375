"""Tests. They mirror the directories of the project."""
