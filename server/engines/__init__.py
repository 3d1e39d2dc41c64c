"""The engine protocol, its implementations and their supervisor."""
