"""What a run is told: flags, presets and their checks. Imports nothing else of rawgpt."""
