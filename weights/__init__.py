"""Trained weights, each with its card. Read through ``codecs.registry``."""
