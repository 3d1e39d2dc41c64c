"""Recordings longer than one window: cutting, storing, searching, and answers from the timeline."""
