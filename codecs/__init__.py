"""One file per published system, on shared parts in ``nn`` and ``entropy``."""
