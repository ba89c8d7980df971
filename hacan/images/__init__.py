"""Image files: safe decoding and evaluation preprocessing."""
