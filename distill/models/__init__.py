"""Loading models and tokenizers; rows as padded tensors."""
