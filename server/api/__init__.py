"""The HTTP API: one module per family of endpoints, and the types and forms they share."""
