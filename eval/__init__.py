"""What a checkpoint is worth. Each file is a module and, where it makes sense, a command."""
