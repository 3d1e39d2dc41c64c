"""The REST service: a clip and a question in, the perceptual trace and the answer out."""
