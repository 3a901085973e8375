"""The tokenizer, the formats it is read from, and tools for changing one."""
