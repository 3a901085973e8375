"""The engine room: ranks, strategy, optimizer, schedule, checkpoints, metrics."""
