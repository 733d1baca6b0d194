"""Training: one loop for all codecs, data, schedules, recipes, and freezing. Needs torch, numpy, pillow, safetensors."""
