"""Stage I: supervised training on perceptual traces (method, section 5)."""
