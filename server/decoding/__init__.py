"""Clip decoding in sandboxed processes."""
