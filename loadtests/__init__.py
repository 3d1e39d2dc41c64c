"""Drives a running service over HTTP, as its users do; knows nothing of how the service is built."""
