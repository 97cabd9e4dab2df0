"""The files a model is kept in: model.bin, Hugging Face, GGUF."""
