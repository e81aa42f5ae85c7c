"""The Hugging Face Hub: push, pull and model cards."""
