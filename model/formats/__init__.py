"""Model files: rawgpt checkpoints, Hugging Face, nanoGPT, llm.c and llama2.c."""
