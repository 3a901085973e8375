"""The network: one decoder, its parts and its loss, without any code for ranks."""
