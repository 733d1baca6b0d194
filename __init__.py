"""neuralcodec: learned codecs for pictures, with trained weights, exact entropy coding and a file format that lasts."""

__version__ = "0.1.0"
