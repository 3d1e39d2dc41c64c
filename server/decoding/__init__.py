"""Decodes clips in sandboxed processes."""
