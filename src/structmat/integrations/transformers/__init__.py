"""Structured networks in Hugging Face transformers: saving and loading, retraining, streaming, and speed."""
