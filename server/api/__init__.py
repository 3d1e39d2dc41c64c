"""The HTTP API: one module per family of endpoints, with their shared types and forms."""
