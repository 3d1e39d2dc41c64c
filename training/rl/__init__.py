"""Stage II: GRPO with pauses (method, section 6)."""
