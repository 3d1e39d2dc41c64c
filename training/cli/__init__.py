"""The training side of the `hyper` command; no other package parses its command lines."""
