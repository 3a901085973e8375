"""The network: one decoder, its parts and its loss. Knows nothing of ranks."""
