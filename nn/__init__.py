"""Network blocks that several codecs share. Everything here is float: what decides a coding index lives in ``entropy``."""
