"""The GPT-2 tokenizer this project ships, and what builds and verifies it (`python -m tokenization.build`)."""
