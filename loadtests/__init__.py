"""Load tests: drive a running service over HTTP, as its users do, without its internals."""
