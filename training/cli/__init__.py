"""The training side of the `hyper` command. Only this package parses command lines."""
